"""The grid: what a profile measures, as a TOML file, validated.

A grid names models, a text, suites and arms; every suite has a section of its own (``measure.suite.Suite.section``),
which a grid may leave out where it does not name the suite.
"""

from __future__ import annotations

import functools
import itertools
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from packaging.requirements import Requirement
from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator

from veloxbench.errors import UsageError, unknown_name, validation_reason
from veloxbench.inputs.corpora import Role
from veloxbench.measure.suite import Suite, get_suite, known_suites
from veloxbench.methods.peers import known_peers
from veloxbench.methods.registry import checked, get_method
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.frozen import Frozen
from veloxbench.records.suites import suite_row

ERRORS_SHOWN = 20


class ArmSpec(Frozen):
    """A method with the targets to measure, none where it has settings alone (a peer's).

    A parameter that is a list is measured at each of its values.
    """

    method: str
    targets: tuple[float, ...] = ()
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """``turboquant_mse@4:sinks=4`` in place of a table."""
        if not isinstance(value, str):
            return value
        arm = Arm.parse(value)
        if arm.target is None and get_method(arm.name).targets is not None:
            raise ValueError(f"{value!r} needs a target, as in {arm.name}@4")
        targets = () if arm.target is None else (arm.target,)
        return {"method": arm.name, "targets": targets, "parameters": arm.parameters}

    @model_validator(mode="after")
    def _exist(self) -> ArmSpec:
        problems: dict[str, None] = {}
        for arm in self._written():
            try:
                checked(arm)
            except UsageError as error:
                problems[str(error)] = None
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def arms(self) -> Iterator[Arm]:
        """Every target with every combination of parameters."""
        return map(checked, self._written())

    def _written(self) -> Iterator[Arm]:
        values = [value if isinstance(value, list) else [value] for value in self.parameters.values()]
        for target, chosen in itertools.product(self.targets or (None,), itertools.product(*values)):
            parameters = dict(zip(self.parameters, chosen, strict=True))
            yield Arm(name=self.method, target=target, parameters=parameters)


class Grid(Frozen):
    """A profile: models x arms x suites. The suites' sections are fields of the class that :func:`grid_class` makes."""

    summary: str
    suites: tuple[str, ...] = Field(min_length=1)
    models: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), validate_default=True)
    n_layers: int | None = Field(default=None, ge=1)
    corpus: str = Field(default="wikitext-2", min_length=1)
    part: Role = "evaluation"
    peers: tuple[str, ...] = ()
    """What ``run --peers`` gives to pip, each for an environment of its own, where it is not there."""
    arms: tuple[ArmSpec, ...] = ()

    @field_validator("suites")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        problems = []
        for name in names:
            try:
                get_suite(name)
            except UsageError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return names

    @field_validator("models")
    @classmethod
    def _named(cls, models: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not models and any(suite_row(name).needs_model for name in info.data.get("suites", ())):
            raise ValueError("it is empty: name at least one model")
        return models

    @property
    def needs_model(self) -> bool:
        """Whether anything of the grid reads weights or text."""
        return any(suite.row.needs_model for suite in self.chosen_suites())

    def chosen_suites(self) -> list[Suite]:
        """The grid's suites, in the order in which a run measures them."""
        return [suite for name, suite in known_suites().items() if name in self.suites]

    def tasks(self, suite: Suite) -> Any:
        """A suite's section."""
        return getattr(self, suite.section, None)

    def arm_list(self) -> list[Arm]:
        """Every arm but the reference, in order."""
        return [arm for spec in self.arms for arm in spec.arms()]


@functools.cache
def grid_class() -> type[Grid]:
    """:class:`Grid` with a field for every known suite's section."""
    suites = {suite.section: suite for suite in known_suites().values()}

    def present(section: Any, info: ValidationInfo) -> Any:
        suite = suites[str(info.field_name)]
        if section is None and suite.name in info.data.get("suites", ()):
            raise ValueError(f"the suite {suite.name} is in suites, and this section of it is missing")
        return section

    fields: dict[str, Any] = {
        section: (suite.tasks | None, Field(default=suite.default, validate_default=True))
        for section, suite in suites.items()
    }
    validators: dict[str, Any] = {"_present": field_validator(*suites)(present)}
    return create_model("Grid", __base__=Grid, __validators__=validators, **fields)


def load_grid(profile: str) -> Grid:
    """The grid of a profile: one of the package's own, or a TOML file of the same form.

    Raises:
        UsageError: no such profile, or its file is not a valid grid.
    """
    if profile.endswith(".toml"):
        path = Path(profile)
        if not path.is_file():
            raise UsageError(f"profile {profile!r} is not a file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"profile {profile!r} cannot be read: {error}") from error
        return parse_grid(text, profile)
    folder = resources.files("veloxbench.run") / "grids"
    names = [entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")]
    if profile not in names:
        raise unknown_name("profile", profile, names)
    return parse_grid((folder / f"{profile}.toml").read_text(encoding="utf-8"), f"profile {profile!r}")


def peers_grid(grid: Grid) -> Grid:
    """The grid of the profile ``peers`` on a grid's models and text.

    Raises:
        UsageError: the grid reads no model.
    """
    if not grid.needs_model:
        raise UsageError("--peers needs a profile that reads a model")
    same = ("models", "n_layers", "corpus", "part")
    return load_grid("peers").model_copy(update={name: getattr(grid, name) for name in same})


def missing_peers(grid: Grid) -> list[str]:
    """Those of a grid's peers that have no environment on this machine, as pip is asked for them."""
    here = known_peers()
    return [requirement for requirement in grid.peers if Requirement(requirement).name not in here]


def parse_grid(text: str, origin: str) -> Grid:
    """Validate a grid's TOML text.

    Raises:
        UsageError: it is no grid; says everything that is wrong with it.
    """
    try:
        return grid_class().model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise UsageError(f"{origin} is not a valid grid: {validation_reason(error, ERRORS_SHOWN)}") from error
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{origin} is not a valid grid: {error}") from error


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

    Args:
        methods: arms as they are written (``turboquant_mse@4:sinks=4``); one without a target is measured at
            ``targets``, or else at those that the grid has for it.

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
            get_suite(suite)
        changes["suites"] = tuple(suites)
    if budget_gib is not None:
        changes |= _with_budget(grid, budget_gib)
    if methods or targets:
        changes["arms"] = tuple(_arm_specs(grid, methods, targets))
    try:
        chosen = type(grid).model_validate(dict(grid) | changes)
    except ValidationError as error:
        raise UsageError(validation_reason(error, ERRORS_SHOWN)) from error
    chosen.arm_list()  # every target is checked before anything is loaded
    return chosen


def _with_budget(grid: Grid, budget_gib: float) -> dict[str, Any]:
    """Every section that has a memory budget, with this budget in it."""
    if not 0 < budget_gib < float("inf"):
        raise UsageError(f"memory budget {budget_gib} GiB must be above zero")
    sections = {suite.section: grid.tasks(suite) for suite in known_suites().values()}
    return {
        name: section.model_copy(update={"budget_gib": budget_gib})
        for name, section in sections.items()
        if hasattr(section, "budget_gib")
    }


def _arm_specs(grid: Grid, methods: Sequence[str], targets: Sequence[float]) -> Iterator[ArmSpec]:
    if not methods:
        aimed = [spec for spec in grid.arms if get_method(spec.method).targets is not None]
        yield from (spec.model_copy(update={"targets": tuple(targets)}) for spec in aimed)
        return
    own = {spec.method: spec.targets for spec in grid.arms}
    for arm in map(Arm.parse, methods):
        method = get_method(arm.name)
        if arm.alone == REFERENCE:
            continue  # it is in every run
        if method.targets is None:
            yield ArmSpec.model_construct(method=arm.name, targets=(), parameters=arm.parameters)
            continue
        given = tuple(targets) if arm.target is None else (arm.target,)
        aimed_at = given or own.get(arm.name) or method.targets
        # not checked here: a run's options end in a sentence of their own
        yield ArmSpec.model_construct(method=arm.name, targets=aimed_at, parameters=arm.parameters)
