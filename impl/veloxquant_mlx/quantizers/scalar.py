"""Nearest-centroid coding of unit-variance coordinates, and table decoding straight from packed words."""

from __future__ import annotations

import functools
from typing import Final

import mlx.core as mx
import numpy as np

from veloxquant_mlx.packing import expand_table, lookup, lookup_table, table_group, unpack_groups
from veloxquant_mlx.quantizers.lloyd_max import Codebook, Gaussian, SphereMarginal, lloyd_max

BROADCAST_LIMIT: Final = 1 << 18
"""Comparisons up to which one broadcast beats a chain of operations (dispatch outweighs arithmetic)."""

CHAIN_LEVELS: Final = 16
"""Levels up to which a chain of comparisons beats two table lookups on CPU."""

CELLS: Final = 4096
"""Cells of the lookup grid; fine enough that none holds two boundaries of a 256-level codebook."""


SMALLEST_SPHERE: Final = 8
"""head_dim below which the Gaussian codebook is used: the sphere's density then has edges, not tails."""


def sphere_codebook(head_dim: int, levels: int) -> Codebook:
    """Lloyd–Max codebook of a coordinate of a rotated unit-RMS vector."""
    return lloyd_max(SphereMarginal(head_dim) if head_dim >= SMALLEST_SPHERE else Gaussian(), levels)


def gaussian_codebook(levels: int) -> Codebook:
    """Lloyd–Max codebook of N(0, 1)."""
    return lloyd_max(Gaussian(), levels)


@functools.cache
def sign_codebook() -> Codebook:
    """The two levels -1 and 1."""
    return Codebook(np.array([-1.0, 1.0]), np.zeros(1), 0.0)


@functools.cache
def boundaries_array(codebook: Codebook) -> mx.array:
    """The boundaries between centroids, ``[levels - 1]`` fp32."""
    return mx.array(codebook.boundaries.astype(np.float32))


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


@functools.cache
def centroids_array(codebook: Codebook) -> mx.array:
    """The centroids, ``[levels]`` fp32."""
    return mx.array(codebook.centroids.astype(np.float32))


@functools.cache
def _tuple_table(codebook: Codebook, group: int) -> mx.array:
    return lookup_table(expand_table(codebook.centroids.astype(np.float32), group))


def centroids_of(codes: mx.array, codebook: Codebook) -> mx.array:
    """The centroid of each code, fp32 of the shape of ``codes``."""
    return lookup(centroids_array(codebook)[:, None], codes)[..., 0]


def codebook_arrays(codebook: Codebook, code_bits: int, n_codes: int) -> tuple[mx.array, ...]:
    """Every table that encoding and decoding rows of ``n_codes`` codes keep in memory: the codebook's static bytes.

    The table of code tuples, which makes decoding one lookup, is much the largest of them.
    """
    tables = [centroids_array(codebook), boundaries_array(codebook)]
    if len(codebook.boundaries) >= CHAIN_LEVELS:
        tables += _grid(codebook)[2:]
    return *tables, _tuple_table(codebook, table_group(code_bits, n_codes))


def decode_words(words: mx.array, codebook: Codebook, code_bits: int, n_codes: int) -> mx.array:
    """Centroids of packed codes, several codes to one table lookup.

    Args:
        words: ``[..., W]`` uint32 of :func:`veloxquant_mlx.packing.pack_codes`.
        codebook: ``2**code_bits`` levels.
        code_bits: width of a code.
        n_codes: codes in a row.

    Returns:
        ``[..., n_codes]`` fp32.
    """
    group = table_group(code_bits, n_codes)
    index = unpack_groups(words, code_bits, n_codes, group)
    return lookup(_tuple_table(codebook, group), index).reshape(*words.shape[:-1], n_codes)
