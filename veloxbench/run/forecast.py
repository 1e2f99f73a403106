"""What a run would do, before anything is loaded: its cells, the minutes that records let expect, and what to fetch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from veloxbench.inputs.corpora import known_corpora
from veloxbench.inputs.models import known_models
from veloxbench.inputs.sources import PinnedFile, is_whole, path_of
from veloxbench.measure.suite import Cell
from veloxbench.records.arm import REFERENCE
from veloxbench.records.record import NO_MODEL, Record
from veloxbench.run.grid import Grid, missing_peers
from veloxbench.run.plan import Shard, cells, identity, identity_of, settings


@dataclass(frozen=True)
class Expected:
    """What one suite under one protocol would take on one model.

    Attributes:
        recorded: cells of which a record is there already, of whatever code.
        seconds: of the cells that are not recorded, by records of the same kind; None where no record tells.
    """

    model: str
    suite: str
    protocol: str
    cells: int
    recorded: int
    seconds: float | None


@dataclass(frozen=True)
class Fetched:
    """Something that has to be fetched first; ``nbytes`` is None where only the hub knows."""

    name: str
    nbytes: int | None


def model_name(model: str) -> str:
    """The name that a grid's model has in records: known by it, a directory's last part, or the hub's."""
    if model in known_models() or model == NO_MODEL.name:
        return model
    directory = path_of(model)
    return directory.resolve().name if directory.is_dir() else model


def expected(grid: Grid, shard: Shard, known: Iterable[Record], here: Iterable[Record]) -> list[Expected]:
    """What a run of a grid would take, a line for each model, suite and protocol.

    Args:
        known: records whose durations are taken for what such a measurement takes.
        here: records of the folder that the run would go on in.
    """
    times, kept = _Times([*known, *here]), Counter(_place(record) for record in here)
    lines: dict[tuple[str, str, str], list[Cell]] = {}
    for model in map(model_name, grid.models if grid.needs_model else (NO_MODEL.name,)):
        for cell in cells(grid):
            if shard.takes(model, cell):
                lines.setdefault((model, cell.suite, cell.protocol), []).append(cell)
    plan = []
    for (model, suite, protocol), group in lines.items():
        missing = [cell for cell in group if not kept[model, identity(cell)]]
        seconds = [times.of(model, cell) for cell in missing]
        told = None if None in seconds else sum(value for value in seconds if value is not None)
        plan.append(Expected(model, suite, protocol, len(group), len(group) - len(missing), told))
    return plan


def to_fetch(grid: Grid) -> list[Fetched]:
    """Models, texts and peers of a grid that are not on this machine."""
    missing = [Fetched(requirement, None) for requirement in missing_peers(grid)]
    if not grid.needs_model:
        return missing
    for model in grid.models:
        spec = known_models().get(model)
        if spec is not None and not spec.is_cached:
            missing.append(Fetched(model, spec.download_nbytes))
        elif spec is None and not path_of(model).is_dir():
            missing.append(Fetched(model, None))
    corpus = known_corpora().get(grid.corpus)
    file = None if corpus is None else corpus.files[grid.part]
    if isinstance(file, PinnedFile) and not is_whole(file):
        missing.append(Fetched(grid.corpus, file.nbytes))
    return missing


def _place(record: Record) -> tuple[str, str]:
    return record.subject.model.name, identity_of(record)


class _Times:
    """How long measurements took, from the nearest records: the same cell's, else the same kind's by tokens read."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.same: dict[tuple[str, str], list[float]] = {}
        self.kinds: dict[tuple[str, ...], list[float]] = {}
        for record in (record for record in records if record.status == "measured"):
            subject, seconds = record.subject, record.provenance.seconds
            self.same.setdefault(_place(record), []).append(seconds)
            per_token = seconds / _tokens(subject.settings)
            arm = "fp16" if subject.method.name == REFERENCE.name else "arm"
            model = subject.model.name
            for kind in ((subject.suite, subject.protocol, arm, model), (subject.suite, arm, model), (subject.suite,)):
                self.kinds.setdefault(kind, []).append(per_token)

    def of(self, model: str, cell: Cell) -> float | None:
        """Expected seconds of a cell; None where no record of its suite is there."""
        arm = "fp16" if cell.arm == REFERENCE else "arm"
        same = self.same.get((model, identity(cell)))
        if same is not None:
            return statistics.median(same)
        kinds = ((cell.suite, cell.protocol, arm, model), (cell.suite, arm, model), (cell.suite,))
        near = next((self.kinds[kind] for kind in kinds if kind in self.kinds), None)
        return None if near is None else statistics.median(near) * _tokens(settings(cell))


def _tokens(task: Mapping[str, object]) -> float:
    """Tokens that a task reads, by the names that the suites' settings have for them; 1 where it names none."""

    def number(name: str, absent: float = 0.0) -> float:
        value = task.get(name)
        return float(value) if isinstance(value, (int, float)) else absent

    length = number("length") + number("prefix") + number("steps") + number("tokens") + number("depth")
    return max(length * number("sequences", 1.0) * number("pairs", 1.0), 1.0)
