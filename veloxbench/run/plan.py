"""The measurements that a grid unfolds into, with their keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from veloxbench.errors import UsageError
from veloxbench.inputs.corpora import NO_TEXT, Text, TokenBlock, token_block
from veloxbench.inputs.models import ModelHandle
from veloxbench.measure.machine import machine_class
from veloxbench.measure.suite import Cell, Measurement, get_suite
from veloxbench.records.arm import REFERENCE
from veloxbench.records.provenance import harness_hash
from veloxbench.records.record import NO_MODEL, ModelRef, Record, Subject, content_hash
from veloxbench.run.grid import Grid

SEED = 0


def cells(grid: Grid) -> list[Cell]:
    """Every place of the grid for one model, once, in the order in which to measure."""
    arms = [REFERENCE, *grid.arm_list()]
    places: dict[str, Cell] = {}
    for suite in grid.chosen_suites():
        for cell in suite.cells(grid.tasks(suite), arms):
            places.setdefault(_place(cell.suite, cell.protocol, cell.arm.label, settings(cell)), cell)
    return list(places.values())


def settings(cell: Cell) -> dict[str, Any]:
    """A cell's settings as they stand in a record's key."""
    return {**cell.settings, "seed": SEED}


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
    planned = []
    for cell in cells(grid):
        if cell.fed > handle.context:
            raise UsageError(
                f"{cell.suite}/{cell.protocol} needs {cell.fed} tokens of context, {handle.name} has {handle.context}"
            )
        size = (cell.sequences, cell.length)
        if size not in blocks:
            blocks[size] = token_block(text, tokenizer, n_sequences=cell.sequences, length=cell.length)
        planned.append(_measurement(cell, model, blocks[size]))
    return planned


def measurements_without_model(grid: Grid) -> list[Measurement]:
    """Every measurement of a grid that needs no model, in order."""
    return [_measurement(cell, NO_MODEL, NO_TEXT) for cell in cells(grid)]


def _measurement(cell: Cell, model: ModelRef, block: TokenBlock) -> Measurement:
    suite = get_suite(cell.suite)
    subject = Subject(
        suite=cell.suite,
        protocol=cell.protocol,
        model=model if suite.row.needs_model else NO_MODEL,
        method=suite.ref(cell.arm),
        text=suite.text(cell, block),
        settings=settings(cell),
        harness=harness_hash(),
        machine_class=machine_class(suite.row.moved_by),
    )
    return Measurement(subject, cell, block)


def records_of(grid: Grid, records: Iterable[Record]) -> list[Record]:
    """The records that a run of this grid makes, whatever the code and the model."""
    places = {_place(cell.suite, cell.protocol, cell.arm.label, settings(cell)) for cell in cells(grid)}
    subjects = ((record, record.subject) for record in records)
    return [record for record, of in subjects if _place(of.suite, of.protocol, of.method.label, of.settings) in places]


def _place(suite: str, protocol: str, arm: str, settings: dict[str, Any]) -> str:
    return content_hash([suite, protocol, arm, settings])
