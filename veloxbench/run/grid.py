"""The grid: what a profile measures, as a TOML file, validated."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veloxbench.errors import UsageError, unknown_name
from veloxbench.inputs.corpora import Role
from veloxbench.measure.protocol import Chunked, Decode
from veloxbench.measure.throughput import Timing
from veloxbench.methods.registry import Arm, get_method, make_arm, parse_method
from veloxbench.records.record import Suite
from veloxbench.records.store import validation_reason


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
    folder = resources.files("veloxbench.run") / "grids"
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
