"""The holds suite: what is really resident, for caches of anybody, without their own account of it.

Keys and values of the model's shape are fed to the caches of one arm, and no forward pass is
needed: bytes do not depend on what a token was. Then every array that can be reached from the caches is counted, whole
buffers, fp16 copies and tables and all. Half way and at the end: what grew between is what a longer context costs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from pydantic import Field

from veloxbench.measure.account import Array, reachable
from veloxbench.measure.suite import Bench, Cell, Measured, Measurement, Rates, Suite, Tick, measures
from veloxbench.methods.cache_under_test import CacheUnderTest, arrays_of
from veloxbench.methods.registry import Geometry
from veloxbench.records.arm import Arm
from veloxbench.records.frozen import Frozen
from veloxbench.records.record import Estimate

PREFILL_CHUNK = 512
LONG = 32_768
"""Tokens for which the bits are extrapolated."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class HoldsSpec(Frozen):
    """Tokens that are fed; whole buffers are counted at the end and half way, so both should fill mlx-lm's steps."""

    tokens: int = Field(default=2048, ge=2)


@dataclass(frozen=True)
class Inventory:
    """The arrays that can be reached from an arm's caches at one moment.

    Attributes:
        nbytes: of each array by its path, each array once.
        full_width: paths of arrays of floats whose rows are as wide as a head: keys or values that were not coded.
    """

    nbytes: dict[str, int]
    full_width: frozenset[str]

    @property
    def total(self) -> int:
        """Bytes of all arrays."""
        return sum(self.nbytes.values())


def inventory(caches: Sequence[CacheUnderTest], widths: frozenset[int], known: Sequence[Array]) -> Inventory:
    """Count an arm's arrays.

    Args:
        caches: one per layer.
        widths: channels of a head's keys and values.
        known: arrays that a cache may refer to without holding them: the model's weights.
    """
    seen = {id(array) for array in known}
    arrays = dict(reachable([cache.inner for cache in caches], "", seen))
    full = {path for path, array in arrays.items() if _is_float(array) and array.ndim > 2 and array.shape[-1] in widths}
    return Inventory({path: int(array.nbytes) for path, array in arrays.items()}, frozenset(full))


def _is_float(array: Array) -> bool:
    return str(array.dtype).removeprefix("mlx.core.") in _FLOATS


def held_metrics(half: Inventory, whole: Inventory, tokens: int, n_values: int) -> dict[str, Estimate]:
    """Figures of two inventories, at ``tokens // 2`` and at ``tokens`` tokens of ``n_values`` values each.

    ``long_bits_per_value`` is a line through both, at :data:`LONG` tokens.
    """
    grown = max(whole.total - half.total, 0) / (tokens - tokens // 2)
    long_bytes = whole.total + grown * (LONG - tokens)
    full = sum(size for path, size in whole.nbytes.items() if path in whole.full_width and _grew(path, half, whole))

    def bits(nbytes: float, at: int) -> Estimate:
        return Estimate(value=8 * nbytes / (at * n_values), unit="bits")

    return {
        "bits_per_value": bits(whole.total, tokens),
        "long_bits_per_value": bits(long_bytes, LONG),
        "full_width_bits_per_value": bits(full, tokens),
        "constant_bytes": Estimate(value=max(whole.total - grown * tokens, 0.0), unit="bytes"),
        "cache_bytes": Estimate(value=whole.total, unit="bytes"),
    }


def _grew(path: str, half: Inventory, whole: Inventory) -> bool:
    return whole.nbytes[path] > half.nbytes.get(path, 0)


@measures
class Holds(Suite):
    """Every arm once."""

    name = "holds"
    section = "holds"
    tasks = HoldsSpec
    default = HoldsSpec()

    def cells(self, tasks: HoldsSpec, arms: Sequence[Arm]) -> Iterator[Cell]:
        """One per arm."""
        for arm in arms:
            yield Cell(self.name, "arrays", tasks, arm)

    def seconds(self, cell: Cell, rates: Rates) -> float:
        """What is fed passes no layer of the model."""
        return 4 + float(cell.task.tokens) / 256

    def measure(self, item: Measurement, bench: Bench, tick: Tick) -> Measured:
        """Feed all layers in two halves and count after each."""
        weights: Any = tree_flatten(bench.model.parameters())  # type: ignore[no-untyped-call]
        known = [array for _, array in weights]
        shapes = [shape for shape in bench.shapes if shape is not None]
        widths = frozenset(width for shape in shapes for width in (shape.head_dim, shape.value_dim))
        arm, tokens = bench.caches(item.cell.arm), item.cell.task.tokens
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        counted: list[Inventory] = []
        for first, last in ((0, tokens // 2), (tokens // 2, tokens)):
            for start in range(first, last, PREFILL_CHUNK):
                _feed(arm.caches, bench.shapes, start, min(start + PREFILL_CHUNK, last))
            counted.append(inventory(arm.caches, widths, known))
        peak = max(mx.get_peak_memory(), mx.get_active_memory()) - before
        gc.collect()
        mx.clear_cache()
        held = mx.get_active_memory() - before
        layers = arm.engagement()
        figures = held_metrics(counted[0], counted[1], tokens, sum(shape.n_values for shape in shapes))
        figures |= {
            "update_peak_bytes": Estimate(value=peak, unit="bytes"),
            "unaccounted_bytes": Estimate(value=held - counted[-1].total, unit="bytes"),
            "engaged_layers": Estimate(value=sum(layer.engaged for layer in layers), unit="layers"),
        }
        return Measured(figures, {}, layers)


def _feed(caches: Sequence[CacheUnderTest], shapes: Sequence[Geometry | None], start: int, stop: int) -> None:
    """Normal keys and values of some tokens into every layer, one layer after the other as a model does it."""
    for layer, (cache, shape) in enumerate(zip(caches, shapes, strict=True)):
        if shape is None:
            continue
        sides = (
            mx.random.normal((1, shape.n_kv_heads, stop - start, width), key=mx.random.key(2 * (layer + start) + side))
            for side, width in enumerate((shape.head_dim, shape.value_dim))
        )
        fetched = cache.update_and_fetch(*sides)
        mx.eval(fetched, arrays_of(cache))
