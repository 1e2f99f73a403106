"""The kernel suite: bytes that fused decode attention moves, counted by the CPU emulator.

It reads no clock, no weights and no text: a count that depends on the model's head shape, the code width and the
kernels' own text alone, so every figure is exact and the same on every machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veloxbench.errors import UsageError
from veloxbench.measure.quality import Measured
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


@dataclass(frozen=True)
class HeadShape:
    """What of a model the kernel depends on: channels of a head, and queries that share a KV head."""

    head_dim: int
    group: int


def head_shape(model: Path) -> HeadShape | None:
    """The shape of a model's attention from the ``config.json`` in its directory; None where that does not say."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    n_heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // n_heads if hidden and n_heads else None)
    if not n_heads or not head_dim:
        return None
    return HeadShape(int(head_dim), int(n_heads) // int(config.get("num_key_value_heads") or n_heads))


def refusal(shape: HeadShape | None, code_bits: int) -> str | None:
    """Why nothing can be counted here, or None."""
    if shape is None:
        return "the model's config.json does not say num_attention_heads and head_dim"
    try:
        find_compiler()
    except CompilerNotFound as error:
        return f"the emulator cannot count: {error}"
    return unsupported(shape.head_dim, shape.group, code_bits, code_bits)


def measure(task: Traffic, shape: HeadShape, code_bits: int) -> Measured:
    """Count one step with keys and values of one width.

    Returns:
        Metrics: ``packed_reads`` (how often each packed byte is read, 1 at best) and everything else in percent of
        the packed bytes, in all (``other_percent``) and by kind. No samples: a count has no spread.
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
    return {name: Estimate(value=float(value), unit=unit) for name, (value, unit) in figures.items()}, {}
