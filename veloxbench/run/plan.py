"""The measurements that a grid unfolds into, with their keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from veloxbench.errors import UsageError
from veloxbench.inputs.corpora import NO_TEXT, Text, TokenBlock, token_block
from veloxbench.inputs.models import ModelHandle
from veloxbench.measure.machine import machine_class
from veloxbench.measure.suite import Cell, Measurement, get_suite
from veloxbench.records.arm import REFERENCE
from veloxbench.records.provenance import changed_since, project_state
from veloxbench.records.record import NO_MODEL, ModelRef, Provenance, Record, Subject, content_hash
from veloxbench.run.grid import Grid

SEED = 0

CLOCK_SLACK = timedelta(days=1)
"""By how much the clocks of two machines may differ."""


@dataclass(frozen=True)
class Shard:
    """One part of a grid that several machines carry out together: ``index`` of ``of``, counted from 1.

    A cell belongs to the part that its identity says (model, suite, protocol, arm, settings), whatever other cells the
    grid has: a grid that grows moves no cell to another machine.
    """

    index: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/5``.

        Raises:
            UsageError: another form, or an index outside 1..of.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        shard = cls(int(match[1]), int(match[2])) if match else None
        if shard is None or not 1 <= shard.index <= shard.of:
            raise UsageError(f"--shard {text!r} must be INDEX/COUNT with an index from 1 to the count, for example 2/5")
        return shard

    def takes(self, model: str, cell: Cell) -> bool:
        """Whether a cell of a model is one of this part's."""
        return int(content_hash([model, identity(cell)]), 16) % self.of == self.index - 1


WHOLE = Shard()


def cells(grid: Grid) -> Iterator[Cell]:
    """The cells of a grid for one model, each once, in the order in which they are measured."""
    arms = [REFERENCE, *grid.arm_list()]
    places: set[str] = set()
    for suite in grid.chosen_suites():
        for cell in suite.cells(grid.tasks(suite), arms):
            if (place := identity(cell)) not in places:
                places.add(place)
                yield cell


def settings(cell: Cell) -> dict[str, Any]:
    """A cell's settings as they stand in a record's key."""
    return {**cell.settings, "seed": SEED}


def identity(cell: Cell) -> str:
    """What tells a cell from the others of a model, whatever the code: equal to its record's :func:`identity_of`."""
    return content_hash([cell.suite, cell.protocol, cell.arm.label, settings(cell)])


def identity_of(record: Record) -> str:
    """The identity of the cell that a record was made in."""
    subject = record.subject
    return content_hash([subject.suite, subject.protocol, subject.method.label, subject.settings])


def model_ref(handle: ModelHandle, n_layers: int | None) -> ModelRef:
    """A model that is here as it stands in a record's key."""
    return ModelRef(
        name=handle.name,
        weights_sha256=handle.weights_sha256,
        tokenizer_sha256=handle.tokenizer_sha256,
        config_sha256=handle.config_sha256,
        n_layers=n_layers,
    )


def measurements(
    grid: Grid, handle: ModelHandle, text: Text, tokenizer: Any, shard: Shard = WHOLE
) -> Iterator[Measurement]:
    """Every measurement of one model that a shard takes, one per cell and in the same order.

    Raises:
        UsageError: the text is too short, or a window exceeds the model's context.
    """
    model = model_ref(handle, grid.n_layers)
    blocks: dict[tuple[int, int], TokenBlock] = {(0, 0): NO_TEXT}
    for cell in cells(grid):
        if not shard.takes(handle.name, cell):
            continue
        if cell.fed > handle.context:
            raise UsageError(
                f"{cell.suite}/{cell.protocol} needs {cell.fed} tokens of context, {handle.name} has {handle.context}"
            )
        size = (cell.sequences, cell.length)
        if size not in blocks:
            blocks[size] = token_block(
                text, tokenizer, n_sequences=cell.sequences, length=cell.length, vocabulary=handle.vocabulary
            )
        yield measurement(cell, model, blocks[size])


def measurements_without_model(grid: Grid, shard: Shard = WHOLE) -> Iterator[Measurement]:
    """Every measurement of a grid that needs no model and that a shard takes, in order."""
    return (measurement(cell, NO_MODEL, NO_TEXT) for cell in cells(grid) if shard.takes(NO_MODEL.name, cell))


def measurement(cell: Cell, model: ModelRef, block: TokenBlock) -> Measurement:
    """The measurement of a cell on a model and tokens, by the code and on the machine that are here."""
    suite = get_suite(cell.suite)
    subject = Subject(
        suite=cell.suite,
        protocol=cell.protocol,
        model=model if suite.row.needs_model else NO_MODEL,
        method=suite.ref(cell.arm),
        text=suite.text(cell, block),
        settings=settings(cell),
        harness=suite.harness(),
        machine_class=machine_class(suite.row.moved_by),
    )
    return Measurement(subject, cell, block)


def current_records(
    grid: Grid, profile: str, records: Sequence[Record], origin: Path, *, any_checkout: bool = False
) -> list[Record]:
    """The records of a run of this grid, made by the code that is here.

    Args:
        any_checkout: take them whatever the project's checkout was: an approval looks at that itself.

    Raises:
        UsageError: there are none, or one of them was made by other code: that is not this code's result.
    """
    run = f"`veloxbench run --profile {profile} --out {origin}` measures"
    chosen = records_of(grid, records)
    if not chosen:
        other = f" ({len(records)} of other profiles)" if records else ""
        raise UsageError(
            f"there are no records of the profile {profile!r} at {origin}{other}: nothing was measured, so nothing can "
            f"be judged; {run}"
        )
    others = [(record, why) for record in chosen if (why := other_code(record, any_checkout=any_checkout)) is not None]
    if others:
        record, why = others[0]
        raise UsageError(
            f"{len(others)} of the {len(chosen)} records at {origin} are of other code than this (first: "
            f"{record.subject.protocol} {record.subject.method.label}: {why}); {run}"
        )
    return chosen


def records_of(grid: Grid, records: Iterable[Record]) -> list[Record]:
    """The records that a run of this grid makes, whatever the code and the model."""
    places = {identity(cell) for cell in cells(grid)}
    return [record for record in records if identity_of(record) in places]


def other_code(record: Record, *, any_checkout: bool = False) -> str | None:
    """What makes a record one of other code or another checkout than is here, or None."""
    subject, made = record.subject, record.provenance
    if made.started > datetime.now(UTC) + CLOCK_SLACK:
        return f"it says that it was measured on {made.started:%Y-%m-%d}: the clock was wrong then, or is now"
    try:
        suite = get_suite(subject.suite)
        if subject.harness != suite.harness():
            return f"the measuring code is {suite.harness()[:12]} here and was {subject.harness[:12]}"
        here = suite.ref(subject.method.alone)
    except (UsageError, KeyError) as error:
        return f"{subject.method.label} cannot be measured here any more: {error}"
    if here.implementation != subject.method.implementation:
        return f"the implementation is {here.implementation} here and was {subject.method.implementation}"
    return None if any_checkout else other_checkout(made)


def other_checkout(made: Provenance) -> str | None:
    """How the project's checkout differs from the one that a record was made in, or None."""
    here, was = project_state(Path.cwd()), (made.project_commit, made.project_dirty)
    if here == was:
        return None
    if made.project_commit is not None and not made.project_dirty and not here[1]:
        changed = changed_since(made.project_commit, Path.cwd())
        if changed == []:  # another commit of the same code
            return None
    states = [
        "none" if commit is None else f"commit {commit[:12]}{' with changes' if dirty else ''}"
        for commit, dirty in (here, was)
    ]
    return f"the project's checkout is {states[0]} here and was {states[1]}"
