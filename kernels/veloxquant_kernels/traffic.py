"""Bytes that fused decode attention moves, counted by the emulator: a figure that needs no Mac and has no noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np

from veloxquant_kernels import emulator
from veloxquant_kernels.fused_attention import PackedSide, fused_attention
from veloxquant_kernels.packing import packed_words

PACKED: Final = ("key_words", "key_norms", "value_words", "value_norms")
OTHER: Final[Mapping[str, tuple[str, ...]]] = {
    "partials": ("partial_values", "partial_stats"),
    "codebooks": ("key_centroids", "value_centroids"),
    "signs": ("key_signs", "value_signs"),
    "mask": ("mask",),
    "queries": ("queries",),
    "output": ("out",),
}
"""Everything else that a step over packed tokens alone moves, by kind."""
_SCALARS: Final = ("counts", "scale")


@dataclass(frozen=True)
class Item:
    """Bytes of one buffer, summed over all threads of both passes."""

    name: str
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class DecodeTraffic:
    """What one decode step moves for one KV head.

    Args:
        packed_nbytes: bytes of the packed keys and values in use.
        items: device buffers and tables, packed ones first; scalar arguments (counts, scale, shapes), which Metal
            passes in constant space, are left out.
    """

    packed_nbytes: int
    items: tuple[Item, ...]

    @property
    def packed_reads(self) -> float:
        """How often each packed byte is read: 1 at best."""
        return sum(item.bytes_read for item in self.items if item.name in PACKED) / self.packed_nbytes

    @property
    def overhead(self) -> float:
        """All other bytes, relative to the packed ones."""
        return self._share([item.name for item in self.items if item.name not in PACKED])

    @property
    def overhead_by_kind(self) -> dict[str, float]:
        """:attr:`overhead` in its parts, by the kinds of :data:`OTHER`."""
        return {kind: self._share(names) for kind, names in OTHER.items()}

    def _share(self, names: Sequence[str]) -> float:
        moved = sum(item.bytes_read + item.bytes_written for item in self.items if item.name in names)
        return moved / self.packed_nbytes


def itemise(launches: Sequence[emulator.LaunchReport]) -> tuple[Item, ...]:
    """Traffic by buffer, summed over launches, the packed buffers first."""
    totals: dict[str, tuple[int, int]] = dict.fromkeys(PACKED, (0, 0))
    for launch in launches:
        for buffer in launch.buffers:
            if buffer.name in _SCALARS or buffer.name.endswith("_shape"):
                continue
            read, written = totals.get(buffer.name, (0, 0))
            totals[buffer.name] = (read + buffer.bytes_read, written + buffer.bytes_written)
    return tuple(Item(name, *both) for name, both in totals.items() if any(both))


def decode_traffic(
    n_tokens: int,
    head_dim: int,
    group: int,
    key_bits: int,
    value_bits: int,
    dtype: mx.Dtype = mx.float16,
    *,
    masked: bool = False,
) -> DecodeTraffic:
    """Count the traffic of one decode step over ``n_tokens`` packed tokens of one KV head.

    Args:
        n_tokens: packed tokens.
        head_dim: channels of a head.
        group: queries that share the KV head.
        key_bits: width of a key code.
        value_bits: width of a value code.
        dtype: of the queries.
        masked: whether a bool mask is read, as batches of sequences of different lengths need.

    Raises:
        CompilerNotFound: the emulator has no compiler.
        ValueError: shapes that the kernel does not serve.
    """
    rng = np.random.default_rng(0)

    def side(code_bits: int) -> PackedSide:
        shape = (1, 1, n_tokens, packed_words(head_dim, code_bits))
        words = mx.array(rng.integers(0, 1 << 32, shape, dtype=np.uint32))
        norms = mx.ones((1, 1, n_tokens, 1), mx.float16)
        centroids = mx.array(np.linspace(-2, 2, 1 << code_bits, dtype=np.float32))
        return PackedSide(words, norms, centroids, mx.ones((head_dim,)), code_bits)

    keys, values = side(key_bits), side(value_bits)
    queries = mx.array(rng.standard_normal((1, group, 1, head_dim)).astype(np.float32)).astype(dtype)
    mask = mx.ones((1, 1, 1, n_tokens), mx.bool_) if masked else None
    with emulator.session("checked") as record:
        fused_attention(queries, keys, values, n_tokens, scale=head_dim**-0.5, mask=mask, backend="emulator")
    packed = sum(array.nbytes for array in (keys.words, keys.norms, values.words, values.norms))
    return DecodeTraffic(packed, itemise(record.launches))
