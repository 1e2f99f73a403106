"""Codes of a codebook: the nearest centroid of a value, and centroids straight from packed codes or trits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.kernel import Backend, launches_on, no_rows
from veloxquant_kernels.lookup import expand_table, lookup, lookup_table
from veloxquant_kernels.packing import (
    TRITS_PER_BYTE,
    check_trit_bytes,
    check_words,
    unpack_codes,
    unpack_groups,
    unpack_trits,
)

BROADCAST_LIMIT: Final = 1 << 18
"""Comparisons up to which one broadcast beats a chain of operations (dispatch outweighs arithmetic)."""

CHAIN_LEVELS: Final = 16
"""Levels up to which a chain of comparisons beats two table lookups on CPU."""

CELLS: Final = 4096
"""Cells of the lookup grid; fine enough that none holds two boundaries of a 256-level codebook."""

INDEX_BITS: Final = 14
"""Bits of a table index at most: a table of pairs of centroids then fits a core's second-level cache."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Levels in ascending order, the boundaries between them, and the mean squared error they leave."""

    centroids: NDArray[np.float64]
    boundaries: NDArray[np.float64]
    distortion: float


@functools.cache
def boundaries_array(codebook: Codebook) -> mx.array:
    """The boundaries between centroids, ``[levels - 1]`` fp32."""
    return mx.array(codebook.boundaries.astype(np.float32))


@functools.cache
def centroids_array(codebook: Codebook) -> mx.array:
    """The centroids, ``[levels]`` fp32."""
    return mx.array(codebook.centroids.astype(np.float32))


@functools.cache
def _grid(codebook: Codebook) -> tuple[float, float, mx.array, mx.array]:
    edges = codebook.boundaries.astype(np.float32).astype(np.float64)
    low, high = edges[0], edges[-1]
    scale = (CELLS - 2) / (high - low)
    slack = 1e-2  # cells; far above fp32 rounding of the cell index
    cell_of_edge = (edges - low) * scale + 1
    cells = np.arange(CELLS)
    first = np.searchsorted(cell_of_edge, cells - slack, side="left")
    if np.any(np.searchsorted(cell_of_edge, cells + 1 + slack, side="left") - first > 1):
        raise ValueError(f"{CELLS} cells are too coarse for {len(edges) + 1} levels")
    next_edge = np.append(edges, np.inf).astype(np.float32)
    codes = lookup_table(first.astype(np.uint8)[:, None])
    return float(scale), float(1 - low * scale), codes, lookup_table(next_edge[:, None])


def nearest_codes(y: mx.array, codebook: Codebook) -> mx.array:
    """Index of the nearest centroid: the number of boundaries below each value.

    Args:
        y: any shape, fp32.
        codebook: at most 256 levels.

    Returns:
        uint8 of the shape of ``y``.
    """
    n_edges = len(codebook.boundaries)
    if y.size * n_edges <= BROADCAST_LIMIT:
        below: mx.array = y[..., None] > boundaries_array(codebook)
        return mx.sum(below, axis=-1).astype(mx.uint8)
    if n_edges < CHAIN_LEVELS:
        edges = codebook.boundaries.astype(np.float32).tolist()
        code: mx.array = (y > edges[0]).astype(mx.uint8)
        for edge in edges[1:]:
            code = code + (y > edge)
        return code
    scale, shift, first, next_edge = _grid(codebook)
    cell = mx.clip(y * scale + shift, 0, CELLS - 1).astype(mx.uint16)
    low_code = lookup(first, cell)[..., 0]
    above: mx.array = y > lookup(next_edge, low_code)[..., 0]
    return low_code + above


def centroids_of(codes: mx.array, codebook: Codebook) -> mx.array:
    """The centroid of each code, fp32 of the shape of ``codes``."""
    return lookup(centroids_array(codebook)[:, None], codes)[..., 0]


@functools.cache
def table_group(code_bits: int, n_codes: int) -> int:
    """Codes that one table lookup reads: a power of two that divides ``n_codes``, within ``INDEX_BITS`` bits."""
    return max(n for n in (1, 2, 4, 8) if n * code_bits <= INDEX_BITS and n_codes % n == 0)


@functools.cache
def _tuple_table(codebook: Codebook, group: int) -> mx.array:
    return lookup_table(expand_table(codebook.centroids.astype(np.float32), group))


def codebook_arrays(codebook: Codebook, code_bits: int, n_codes: int) -> tuple[mx.array, ...]:
    """Every table that encoding and decoding rows of ``n_codes`` codes keep in memory: the codebook's static bytes.

    The table of code tuples, which makes decoding one lookup, is much the largest of them.
    """
    tables = [centroids_array(codebook), boundaries_array(codebook)]
    if len(codebook.boundaries) >= CHAIN_LEVELS:
        tables += _grid(codebook)[2:]
    return *tables, _tuple_table(codebook, table_group(code_bits, n_codes))


def trit_arrays(codebook: Codebook) -> tuple[mx.array, ...]:
    """The same for trits of a codebook of three levels: the table of bytes to five centroids, and the boundaries."""
    return _tuple_table(codebook, TRITS_PER_BYTE), boundaries_array(codebook)


def decode_words(
    words: mx.array, codebook: Codebook, code_bits: int, n_codes: int, *, backend: Backend | None = None
) -> mx.array:
    """Centroids of packed codes: in plain MLX several codes to one table lookup.

    Args:
        words: ``[..., ceil(n_codes * code_bits / 32)]`` uint32 of :func:`veloxquant_kernels.packing.pack_codes`.
        codebook: ``2**code_bits`` levels.
        code_bits: width of a code.
        n_codes: codes in a row.
        backend: of ``unpack_codes``; see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        ``[..., n_codes]`` fp32.

    Raises:
        ValueError: rows that do not hold exactly ``n_codes``.
    """
    check_words(words, code_bits, n_codes)
    if launches_on(backend, no_rows("words", words)) is not None:
        return mx.take(centroids_array(codebook), unpack_codes(words, code_bits, n_codes, backend=backend))
    group = table_group(code_bits, n_codes)
    index = unpack_groups(words, code_bits, n_codes, group)
    return lookup(_tuple_table(codebook, group), index).reshape(*words.shape[:-1], n_codes)


def decode_trits(data: mx.array, codebook: Codebook, n_trits: int, *, backend: Backend | None = None) -> mx.array:
    """Centroids of packed trits, as :func:`decode_words`: in plain MLX one table lookup a byte.

    Args:
        data: ``[..., ceil(n_trits / 5)]`` uint8 of :func:`veloxquant_kernels.packing.pack_trits`.
        codebook: three levels.
        n_trits: trits in a row.
        backend: of ``unpack_trits``.
    """
    check_trit_bytes(data, n_trits)
    if launches_on(backend, no_rows("data", data)) is not None:
        return mx.take(centroids_array(codebook), unpack_trits(data, n_trits, backend=backend))
    centroids = lookup(_tuple_table(codebook, TRITS_PER_BYTE), data)
    return centroids.reshape(*data.shape[:-1], data.shape[-1] * TRITS_PER_BYTE)[..., :n_trits]
