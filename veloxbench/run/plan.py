"""The measurements that a grid unfolds into, with their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from veloxbench.errors import UsageError
from veloxbench.inputs.corpora import NO_TEXT, Text, TokenBlock, token_block
from veloxbench.inputs.models import ModelHandle
from veloxbench.measure import exact_cases, kernels
from veloxbench.measure.exact import NO_MODEL, FixedInputs
from veloxbench.measure.kernels import Traffic
from veloxbench.measure.machine import machine_class
from veloxbench.measure.protocol import Chunked, Decode, Protocol
from veloxbench.measure.throughput import Timing
from veloxbench.methods.registry import Arm, make_arm
from veloxbench.records.provenance import harness_hash
from veloxbench.records.record import ModelRef, Record, Subject, Suite, TextRef, content_hash
from veloxbench.run.grid import Grid, MemorySpec

REFERENCE = Arm("fp16")
SEED = 0


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
            blocks[size] = token_block(
                text, tokenizer, n_sequences=cell.sequences, length=cell.length, vocabulary=handle.vocabulary
            )
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
