"""The kernel suite: bytes that fused decode attention moves, counted by the CPU emulator.

It reads no clock, no weights and no text: a count that depends on the model's head shape, the code width and the
kernels' own text alone, so every figure is exact and the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from veloxbench.errors import UsageError
from veloxbench.measure.suite import Bench, Cell, Measured, Measurement, Rates, Suite, Tick, measures
from veloxbench.records.arm import Arm
from veloxbench.records.frozen import Frozen
from veloxbench.records.record import Estimate
from veloxquant_kernels.emulator import CompilerNotFound, find_compiler
from veloxquant_kernels.fused_attention import unsupported
from veloxquant_kernels.traffic import decode_traffic

METHOD = "turboquant_mse"
"""The method whose packed cache the fused kernel reads."""


@dataclass(frozen=True)
class Traffic:
    """One decode step of one KV head over ``tokens`` packed tokens, a mask included."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"kernels: tokens is {self.tokens}; it must be at least 1")


class KernelSection(Frozen):
    """Packed tokens that a fused decode step reads, and the code widths to count it at."""

    tokens: int = Field(default=4096, ge=1)
    code_bits: tuple[int, ...] = (8, 4, 3, 2)


@dataclass(frozen=True)
class HeadShape:
    """What of a model the kernel depends on: channels of a head, and queries that share a KV head."""

    head_dim: int
    group: int


def head_shape(model: Path) -> HeadShape | None:
    """The shape of a model's attention from the ``config.json`` in its directory; None where that does not say."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    if config.get("kv_lora_rank"):
        return None  # latents are cached, not heads of keys and values
    n_heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // n_heads if hidden and n_heads else None)
    if not n_heads or not head_dim:
        return None
    return HeadShape(int(head_dim), int(n_heads) // int(config.get("num_key_value_heads") or n_heads))


def refusal(shape: HeadShape | None, code_bits: int) -> str | None:
    """Why nothing can be counted here, or None."""
    if shape is None:
        return "the model's config.json does not say num_attention_heads and head_dim, or it caches latents"
    try:
        find_compiler()
    except CompilerNotFound as error:
        return f"the emulator cannot count: {error}"
    return unsupported(shape.head_dim, shape.group, code_bits, code_bits)


def count(task: Traffic, shape: HeadShape, code_bits: int) -> dict[str, Estimate]:
    """Count one step with keys and values of one width.

    Returns:
        Metrics: ``packed_reads`` (how often each packed byte is read, 1 at best) and everything else in percent of
        the packed bytes, in all (``other_percent``) and by kind.
    """
    traffic = decode_traffic(task.tokens, shape.head_dim, shape.group, code_bits, code_bits, masked=True)
    figures = {
        "head_dim": (shape.head_dim, "values"),
        "queries_per_kv_head": (shape.group, "queries"),
        "packed_bytes": (traffic.packed_nbytes, "bytes"),
        "packed_reads": (traffic.packed_reads, "x"),
        "other_percent": (100 * traffic.overhead, "%"),
        **{f"{kind}_percent": (100 * share, "%") for kind, share in traffic.overhead_by_kind.items()},
    }
    return {name: Estimate(value=float(value), unit=unit) for name, (value, unit) in figures.items()}


def _code_bits(arm: Arm) -> int:
    if arm.target is None:
        raise UsageError(f"kernels: {arm} has no code width to count at")
    return int(arm.target)


@measures
class Kernels(Suite):
    """The fused decode step at each width of the grid's section; it reads no weights and no text."""

    name = "kernels"
    section = "kernels"
    tasks = KernelSection
    default = KernelSection()

    def cells(self, tasks: KernelSection, arms: Sequence[Arm]) -> Iterator[Cell]:
        """One per width, whatever the grid's arms are."""
        for bits in tasks.code_bits:
            yield Cell(self.name, "decode traffic", Traffic(tasks.tokens), Arm(name=METHOD, target=float(bits)))

    def seconds(self, cell: Cell, rates: Rates) -> float:
        """Compiling two bodies, then a second."""
        return 8.0

    def refusal(self, cell: Cell, bench: Bench) -> str | None:
        """Why nothing can be counted here, or None."""
        shape = head_shape(bench.handle.directory)
        held = {(layer.head_dim, layer.value_dim) for layer in bench.shapes if layer}
        if shape is not None and held != {(shape.head_dim, shape.head_dim)}:
            dims = ", ".join(f"{keys} and {values}" for keys, values in sorted(held)) or "nothing that is counted"
            return f"its caches hold keys and values of {dims} channels, its config.json says {shape.head_dim}"
        return refusal(shape, _code_bits(cell.arm))

    def measure(self, item: Measurement, bench: Bench, tick: Tick) -> Measured:
        """Count one step."""
        shape = head_shape(bench.handle.directory)
        if shape is None:
            raise UsageError(f"kernels: {item.subject.model.name} has no head shape to count for")
        return Measured(count(item.cell.task, shape, _code_bits(item.cell.arm)))
