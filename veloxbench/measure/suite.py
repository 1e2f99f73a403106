"""What a suite is to a run: which cells it makes of a grid's section, how long one takes, and how it is measured.

A suite of this project is one module of this room with one class in it; :mod:`veloxbench.records.suites` holds its
row. Nothing else knows it by name.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_origin

from mlx.nn.layers.base import Module
from pydantic import BaseModel, TypeAdapter, ValidationError

from veloxbench import measure
from veloxbench.errors import UsageError, validation_reason
from veloxbench.inputs.corpora import TokenBlock
from veloxbench.inputs.models import ModelHandle
from veloxbench.measure.account import engagement
from veloxbench.measure.reference import ReferenceCache
from veloxbench.methods.cache_under_test import CacheUnderTest
from veloxbench.methods.registry import BuildContext, Geometry, build, geometry, get_method, probe, reference_of
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.plugins import load_plugins
from veloxbench.records.provenance import code_hash, harness_hash
from veloxbench.records.record import Estimate, LayerEngagement, MethodRef, Subject, TextRef, content_hash
from veloxbench.records.suites import SuiteRow, all_suites, suite_row

Tick = Callable[[int], None]
"""Called with the number of units (tokens scored, say) just done."""


@dataclass(frozen=True)
class Cell:
    """One place of a grid, before any model or text is there: what a measurement will be of.

    Attributes:
        task: what the suite does with the arm; its fields are the settings in the record's key.
        sequences: how many of the text are read; 0 where none is.
        length: tokens per sequence.
        fed: those of these tokens that the model reads; they must fit its context.
    """

    suite: str
    protocol: str
    task: Any
    arm: Arm
    sequences: int = 0
    length: int = 0
    fed: int = 0

    @property
    def slower(self) -> float:
        """How many times longer than fp16 the arm's cache is assumed to take, for estimates."""
        return 1.0 if self.arm == REFERENCE else 1.5

    @property
    def settings(self) -> dict[str, Any]:
        """The task's fields as a record keeps them."""
        fields = self.task.model_dump() if isinstance(self.task, BaseModel) else dataclasses.asdict(self.task)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


@dataclass(frozen=True)
class Measurement:
    """One record to be made: its subject (whose hash is the key), its cell and the tokens that are read."""

    subject: Subject
    cell: Cell
    block: TokenBlock

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.subject.suite}/{self.subject.protocol} {self.cell.arm}"


@dataclass(frozen=True)
class Measured:
    """What a suite measured: metrics, the raw samples behind them, and what held each layer."""

    metrics: dict[str, Estimate]
    samples: dict[str, list[float]] = field(default_factory=dict)
    layers: list[LayerEngagement] = field(default_factory=list)


@dataclass(frozen=True)
class Rates:
    """This machine's speed on a model, from three short passes: for estimates only.

    Attributes:
        token_seconds: what one token takes in a batch of short sequences.
        step_seconds: what one decode step takes.
        attention_seconds: what each pair of tokens of one long prompt adds (MLX's attention on a processor).
    """

    token_seconds: float
    step_seconds: float
    attention_seconds: float

    def prefix_seconds(self, tokens: int) -> float:
        """Estimated seconds of one prompt through fp16 caches."""
        return tokens * self.token_seconds + tokens**2 * self.attention_seconds


@dataclass(frozen=True)
class ArmCaches:
    """An arm's caches, the layers that it claims, and the classes that must hold them."""

    caches: Sequence[CacheUnderTest]
    claimed: Sequence[bool]
    expected: tuple[type, ...]

    def engagement(self) -> list[LayerEngagement]:
        """Read after the tokens went through."""
        return engagement(self.caches, self.claimed, self.expected)


@dataclass
class Bench:
    """One loaded model and what the suites share while they measure on it."""

    handle: ModelHandle
    n_layers: int | None
    model: Module
    context: BuildContext
    references: ReferenceCache
    pool: ThreadPoolExecutor
    say: Callable[[str], None]
    """Shows the user one line."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What a suite keeps from one measurement to the next, by a name of its own."""
    refusals: dict[str, str | None] = field(default_factory=dict)

    @functools.cached_property
    def shapes(self) -> list[Geometry | None]:
        """Stored shape of each layer's keys and values, None where there are none, from one token; asked once."""
        return geometry(self.caches(REFERENCE).caches, self.model)

    def caches(self, arm: Arm) -> ArmCaches:
        """Fresh caches of an arm."""
        caches, claimed = build(self.context, arm)
        return ArmCaches(caches, claimed, get_method(arm.name).cache_classes)

    def refusal(self, arm: Arm) -> str | None:
        """Why a foreign implementation does not take the arm on this model, from two tokens, asked once; or None."""
        if arm.label not in self.refusals:
            self.refusals[arm.label] = probe(self.context, arm)
        return self.refusals[arm.label]


class Suite(ABC):
    """One suite's behaviour.

    Attributes:
        name: that of its row.
        section: the grid's key that holds its tasks.
        tasks: the section's type, for pydantic.
        default: the section where a grid does not have it; None: a grid that names the suite must have it.
    """

    name: ClassVar[str]
    section: ClassVar[str]
    tasks: ClassVar[Any]
    default: ClassVar[Any] = None

    @property
    def row(self) -> SuiteRow:
        """Its pure data."""
        return suite_row(self.name)

    @abstractmethod
    def cells(self, tasks: Any, arms: Sequence[Arm]) -> Iterator[Cell]:
        """Its cells, in the order in which to measure.

        Args:
            tasks: the grid's section.
            arms: the reference, then the grid's arms.
        """

    @abstractmethod
    def seconds(self, cell: Cell, rates: Rates) -> float:
        """Estimated seconds of a measurement."""

    def units(self, cell: Cell) -> int:
        """How many units ``tick`` will be told of; 0 where nothing is told before the end."""
        return 0

    def harness(self) -> str:
        """Hash of the measuring code, part of every key: this project's, and that of a package of one's own."""
        own = type(self).__module__.startswith(f"{measure.__name__}.")
        return harness_hash() if own else content_hash([harness_hash(), code_hash(type(self))])

    def ref(self, arm: Arm) -> MethodRef:
        """The arm as it stands in a record's key."""
        return reference_of(arm)

    def text(self, cell: Cell, block: TokenBlock) -> TextRef:
        """The text as it stands in a record's key."""
        name = block.text if block.role == "evaluation" else f"{block.text} ({block.role})"
        return TextRef(name=name, tokens_sha256=block.sha256)

    def refusal(self, cell: Cell, bench: Bench) -> str | None:
        """Why the arm cannot be measured on this model, or None."""
        return bench.refusal(cell.arm)

    @abstractmethod
    def measure(self, item: Measurement, bench: Any, tick: Tick) -> Measured:
        """Measure one cell.

        Args:
            bench: a :class:`Bench`; None for a suite whose row needs no model.

        Raises:
            EngagementError: the method did not hold a layer that it claims, or its bytes differ from its formula.
        """


def cell_of(suite: Suite, settings: Mapping[str, Any], arm: Arm) -> Cell:
    """The cell of an arm whose task has the settings that stand in a record.

    Raises:
        UsageError: the suite makes no such cell (any more).
    """
    task = {name: value for name, value in settings.items() if name != "seed"}
    try:
        tasks = TypeAdapter(suite.tasks).validate_python([task] if get_origin(suite.tasks) is tuple else task)
    except ValidationError as error:
        raise UsageError(f"the suite {suite.name} has no such task here: {validation_reason(error)}") from error
    cells = [cell for cell in suite.cells(tasks, [arm]) if (cell.arm.label, cell.settings) == (arm.label, task)]
    if not cells:
        raise UsageError(f"the suite {suite.name} does not measure {arm} with these settings here: {task}")
    return cells[0]


_SUITES: dict[str, Suite] = {}


def measures(suite: type[Suite]) -> type[Suite]:
    """Class decorator: enter a suite's class under its name.

    Raises:
        ValueError: the name has no row, or is taken.
    """
    if suite.name not in all_suites():
        raise ValueError(f"suite {suite.name!r} has no row in veloxbench.records.suites")
    if suite.name in _SUITES:
        raise ValueError(f"suite {suite.name!r} is entered twice")
    _SUITES[suite.name] = suite()
    return suite


def known_suites() -> Mapping[str, Suite]:
    """Every suite's behaviour by name, in the order of the rows."""
    load_plugins("veloxbench.measures", measure.__name__)
    return {name: _SUITES[name] for name in all_suites() if name in _SUITES}


def get_suite(name: str) -> Suite:
    """The suite of that name; ``UsageError`` with near matches otherwise."""
    suite_row(name)
    return _SUITES.get(name) or known_suites()[name]  # a peer's worker has those alone that it was asked for
