"""What a run measures: the grid (a TOML file, validated) and the measurements that it unfolds into."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veloxbench.corpora import NO_TEXT, Role, Text, TokenBlock, token_block
from veloxbench.environment import harness_hash, machine_class
from veloxbench.errors import UsageError, unknown_name
from veloxbench.measure import kernels
from veloxbench.measure.exact import NO_MODEL, FixedInputs
from veloxbench.measure.kernels import Traffic
from veloxbench.measure.throughput import Timing
from veloxbench.methods import Arm, exact_cases, get_method, make_arm, parse_method
from veloxbench.models import ModelHandle
from veloxbench.protocol import Chunked, Decode, Protocol
from veloxbench.records import ModelRef, Record, Subject, Suite, TextRef, content_hash
from veloxbench.store import validation_reason

REFERENCE = Arm("fp16")
SEED = 0


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArmSpec(_Strict):
    """A method with the targets to measure; a parameter that is a list is measured at each of its values."""

    method: str
    targets: tuple[float, ...]
    parameters: dict[str, Any] = Field(default_factory=dict)

    def arms(self) -> Iterator[Arm]:
        """Every target with every combination of parameters."""
        values = [value if isinstance(value, list) else [value] for value in self.parameters.values()]
        for target, chosen in itertools.product(self.targets, itertools.product(*values)):
            yield make_arm(self.method, target, **dict(zip(self.parameters, chosen, strict=True)))


class MemorySpec(_Strict):
    """Tokens prefilled and decoded in the memory process, and the budget that tokens_in_budget fills."""

    tokens: int
    decode_steps: int
    budget_gib: float


class KernelSpec(_Strict):
    """Packed tokens that a fused decode step reads, and the code widths to count it at."""

    tokens: int = 4096
    code_bits: tuple[int, ...] = (8, 4, 3, 2)


class Grid(_Strict):
    """A profile: models x arms x suites, with the sizes of each suite."""

    summary: str
    models: tuple[str, ...]
    n_layers: int | None = None
    corpus: str
    part: Role = "evaluation"
    suites: tuple[Suite, ...]
    arms: tuple[ArmSpec, ...]
    protocols: tuple[Annotated[Chunked | Decode, Field(discriminator="name")], ...]
    throughput: tuple[Timing, ...]
    memory: MemorySpec
    kernels: KernelSpec = KernelSpec()

    def arm_list(self) -> list[Arm]:
        """Every arm but the reference, in order."""
        return [arm for spec in self.arms for arm in spec.arms()]


def load_grid(profile: str) -> Grid:
    """The grid of a profile: one of the package's own, or a TOML file of the same form.

    Raises:
        UsageError: no such profile, or its file is not a valid grid.
    """
    if profile.endswith(".toml"):
        path = Path(profile)
        if not path.is_file():
            raise UsageError(f"profile {profile!r} is not a file")
        return parse_grid(path.read_text(encoding="utf-8"), profile)
    folder = resources.files("veloxbench") / "grids"
    names = [entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")]
    if profile not in names:
        raise unknown_name("profile", profile, names)
    return parse_grid((folder / f"{profile}.toml").read_text(encoding="utf-8"), f"profile {profile!r}")


def parse_grid(text: str, origin: str) -> Grid:
    """Validate a grid's TOML text."""
    try:
        return Grid.model_validate(tomllib.loads(text))
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        detail = validation_reason(error) if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"{origin} is not a valid grid: {detail}") from error


def customise(
    grid: Grid,
    *,
    models: Sequence[str] = (),
    methods: Sequence[str] = (),
    targets: Sequence[float] = (),
    suites: Sequence[str] = (),
    corpus: str | None = None,
    budget_gib: float | None = None,
) -> Grid:
    """The grid with the user's choices in place of its own.

    Raises:
        UsageError: an unknown name, or a target that a chosen method cannot meet.
    """
    changes: dict[str, Any] = {}
    if models:
        changes["models"] = tuple(models)
    if corpus:
        changes["corpus"] = corpus
    if suites:
        for suite in suites:
            if suite not in get_args(Suite):
                raise unknown_name("suite", suite, get_args(Suite))
        changes["suites"] = tuple(suites)
    if budget_gib is not None:
        if not budget_gib > 0:
            raise UsageError(f"memory budget {budget_gib} GiB must be above zero")
        changes["memory"] = grid.memory.model_copy(update={"budget_gib": budget_gib})
    if methods or targets:
        changes["arms"] = tuple(_arm_specs(grid, methods, targets))
    chosen = grid.model_copy(update=changes)
    chosen.arm_list()  # every target is checked before anything is loaded
    return chosen


def _arm_specs(grid: Grid, methods: Sequence[str], targets: Sequence[float]) -> Iterator[ArmSpec]:
    if not methods:
        aimed = [spec for spec in grid.arms if get_method(spec.method).targets is not None]
        yield from (spec.model_copy(update={"targets": tuple(targets)}) for spec in aimed)
        return
    own = {spec.method: spec.targets for spec in grid.arms}
    for text in methods:
        name, parameters = parse_method(text)
        method = get_method(name)
        if method.targets is None:
            continue  # fp16 is in every run
        yield ArmSpec(method=name, targets=tuple(targets) or own.get(name) or method.targets, parameters=parameters)


Task = Protocol | Timing | MemorySpec | Traffic | FixedInputs
"""What a measurement does with its arm."""


@dataclass(frozen=True)
class Measurement:
    """One record to be made: its subject (whose hash is the key) and what the runner needs to make it."""

    subject: Subject
    arm: Arm
    task: Task
    block: TokenBlock

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.subject.suite}/{self.subject.protocol} {self.arm.label}"


@dataclass(frozen=True)
class Cell:
    """One place of the grid, before any model or text is there: what a measurement will be called."""

    suite: Suite
    protocol: str
    task: Task
    arm: Arm
    sequences: int
    length: int
    """Tokens per sequence."""

    @property
    def fed(self) -> int:
        """Tokens of a sequence that the model reads; a quality protocol's last one is only a target."""
        return self.task.n_tokens if isinstance(self.task, (Chunked, Decode)) else self.length


def cells(grid: Grid) -> list[Cell]:
    """Every place of the grid for one model, once, in the order in which to measure."""
    arms = [REFERENCE, *grid.arm_list()]
    packed = [make_arm(kernels.METHOD, float(bits)) for bits in grid.kernels.code_bits]
    found: list[Cell] = []
    for suite, name, task, sequences, length in _tasks(grid):
        for arm in packed if suite == "kernels" else exact_cases.cases() if suite == "exact" else arms:
            cell = Cell(suite, name, task, arm, sequences, length)
            if cell not in found:
                found.append(cell)
    return found


def measurements(grid: Grid, handle: ModelHandle, text: Text, tokenizer: Any) -> list[Measurement]:
    """Every measurement of one model, one per cell and in the same order.

    Raises:
        UsageError: the text is too short, or a window exceeds the model's context.
    """
    model = ModelRef(
        name=handle.name,
        weights_sha256=handle.weights_sha256,
        tokenizer_sha256=handle.tokenizer_sha256,
        config_sha256=handle.config_sha256,
        n_layers=grid.n_layers,
    )
    blocks: dict[tuple[int, int], TokenBlock] = {(0, 0): NO_TEXT}
    found = []
    for cell in cells(grid):
        if cell.fed > handle.context:
            raise UsageError(
                f"{cell.suite}/{cell.protocol} needs {cell.fed} tokens of context, {handle.name} has {handle.context}"
            )
        size = (cell.sequences, cell.length)
        if size not in blocks:
            blocks[size] = token_block(text, tokenizer, n_sequences=cell.sequences, length=cell.length)
        found.append(_measurement(cell, model, blocks[size]))
    return found


def needs_model(grid: Grid) -> bool:
    """Whether anything of the grid reads weights or text."""
    return set(grid.suites) != {"exact"}


def measurements_without_model(grid: Grid) -> list[Measurement]:
    """Every measurement of a grid that needs no model, in order."""
    return [_measurement(cell, NO_MODEL, NO_TEXT) for cell in cells(grid)]


def _measurement(cell: Cell, model: ModelRef, block: TokenBlock) -> Measurement:
    subject = Subject(
        suite=cell.suite,
        protocol=cell.protocol,
        model=NO_MODEL if cell.suite == "exact" else model,
        method=cell.arm.ref(),
        text=_text(cell.task, block),
        settings=_all_settings(cell.task),
        harness=harness_hash(),
        machine_class=machine_class(cell.suite),
    )
    return Measurement(subject, cell.arm, cell.task, block)


def of_grid(grid: Grid, records: Iterable[Record]) -> list[Record]:
    """The records that a run of this grid makes, whatever the code and the model."""
    places = {
        (cell.suite, cell.protocol, cell.arm.label, _settings_hash(_all_settings(cell.task))) for cell in cells(grid)
    }
    return [
        record
        for record in records
        if (
            record.subject.suite,
            record.subject.protocol,
            record.subject.method.label,
            _settings_hash(record.subject.settings),
        )
        in places
    ]


def _settings_hash(settings: Mapping[str, Any]) -> str:
    return content_hash(dict(settings))


def _all_settings(task: Task) -> dict[str, Any]:
    return {**_settings(task), "seed": SEED}


def _text(task: Task, block: TokenBlock) -> TextRef:
    if isinstance(task, FixedInputs):
        return TextRef(name="fixed inputs", tokens_sha256=task.sha256)
    name = block.text if block.role == "evaluation" else f"{block.text} ({block.role})"
    return TextRef(name=name, tokens_sha256=block.sha256)


def _settings(task: Task) -> Mapping[str, Any]:
    fields = task.model_dump() if isinstance(task, MemorySpec) else vars(task)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _tasks(grid: Grid) -> Iterable[tuple[Suite, str, Task, int, int]]:
    if "exact" in grid.suites:
        yield "exact", "fixed inputs", exact_cases.INPUTS, 0, 0
    if "perplexity" in grid.suites:
        for protocol in grid.protocols:
            yield "perplexity", protocol.name, protocol, protocol.sequences, protocol.n_tokens + 1
    if "memory" in grid.suites:
        yield "memory", "process", grid.memory, 1, grid.memory.tokens + grid.memory.decode_steps
    if "throughput" in grid.suites:
        for timing in grid.throughput:
            yield "throughput", f"depth {timing.depth}", timing, 1, timing.n_tokens
    if "kernels" in grid.suites:
        yield "kernels", "decode traffic", Traffic(grid.kernels.tokens), 0, 0
