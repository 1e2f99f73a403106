"""Bit packing of codes: the byte format that every cache of this package holds.

Code ``j`` of a row lies at bits ``[j * code_bits, (j + 1) * code_bits)`` of the row, little-endian, in
uint32 words; codes may straddle words, and the bits behind the last code are zero. Trits lie five to a
byte (1.6 bits each), the first in the lowest base-3 digit.

Eight codes of any width fill ``code_bits`` whole bytes, so packing merges neighbours pairwise (two, four,
eight codes to a container) and drops the container's empty bytes; unpacking shifts the container. No
step loops over tokens.
"""

from __future__ import annotations

import functools
from typing import Final

import mlx.core as mx
import numpy as np

MAX_CODE_BITS: Final = 8
WORD_BITS: Final = 32
TRITS_PER_BYTE: Final = 5

_CONTAINERS: Final = ((8, mx.uint8), (16, mx.uint16), (32, mx.uint32), (64, mx.uint64))


def check_code_bits(code_bits: int, *, name: str = "code_bits") -> int:
    """Return ``code_bits`` when it is a packable width.

    Raises:
        TypeError: not an int.
        ValueError: outside 1..8.
    """
    if isinstance(code_bits, bool) or not isinstance(code_bits, int):
        raise TypeError(f"{name} must be an int, got {code_bits!r}")
    if not 1 <= code_bits <= MAX_CODE_BITS:
        raise ValueError(f"{name} must be within 1..{MAX_CODE_BITS}, got {code_bits}")
    return code_bits


def packed_words(n_codes: int, code_bits: int) -> int:
    """uint32 words that hold ``n_codes`` codes of ``code_bits`` bits."""
    return -(-n_codes * check_code_bits(code_bits) // WORD_BITS)


def _container(bits: int) -> tuple[int, mx.Dtype]:
    return next((width, dtype) for width, dtype in _CONTAINERS if width >= bits)


def _group_codes(code_bits: int) -> int:
    """The fewest codes (1, 2, 4 or 8) that fill whole bytes."""
    return next(n for n in (1, 2, 4, 8) if n * code_bits % 8 == 0)


def _pad_last(x: mx.array, multiple: int) -> mx.array:
    missing = -x.shape[-1] % multiple
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pack_codes(codes: mx.array, code_bits: int) -> mx.array:
    """Pack codes into little-endian uint32 words.

    Args:
        codes: ``[..., D]`` of any unsigned dtype, each below ``2**code_bits``.
        code_bits: width of a code, 1..8.

    Returns:
        ``[..., ceil(D * code_bits / 32)]`` uint32.

    Raises:
        ValueError: a width outside 1..8, naming it.
    """
    n_words = packed_words(codes.shape[-1], code_bits)
    group = _group_codes(code_bits)
    merged = _pad_last(codes.astype(mx.uint8), group)
    width, n_merged = code_bits, 1
    while n_merged < group:
        pairs = merged.reshape(*merged.shape[:-1], -1, 2)
        width, n_merged = 2 * width, 2 * n_merged
        dtype = _container(width)[1]
        merged = pairs[..., 0].astype(dtype) | (pairs[..., 1].astype(dtype) << (width // 2))
    used, held = group * code_bits // 8, merged.itemsize
    data = mx.contiguous(merged).view(mx.uint8)
    if used != held:
        data = data.reshape(*merged.shape, held)[..., :used].reshape(*merged.shape[:-1], -1)
    data = _pad_last(data, 4)[..., : 4 * n_words]
    return mx.contiguous(data).view(mx.uint32)


def unpack_groups(words: mx.array, code_bits: int, n_codes: int, group: int) -> mx.array:
    """Read ``group`` neighbouring codes at a time as one integer, the first code in its lowest bits.

    Args:
        words: ``[..., W]`` uint32 from :func:`pack_codes`.
        code_bits: width of a code, 1..8.
        n_codes: codes in a row, a multiple of ``group``.
        group: 1, 2, 4 or 8 codes.

    Returns:
        ``[..., n_codes // group]``, the narrowest unsigned dtype that holds ``group * code_bits`` bits.

    Raises:
        ValueError: a width outside 1..8, ``n_codes`` no multiple of ``group``, or too few words.
    """
    check_code_bits(code_bits)
    if n_codes % group:
        raise ValueError(f"n_codes must be a multiple of group={group}, got {n_codes}")
    if words.shape[-1] < packed_words(n_codes, code_bits):
        raise ValueError(
            f"words has {words.shape[-1]} words a row; {n_codes} codes of {code_bits} bits need "
            f"{packed_words(n_codes, code_bits)}"
        )
    lead, width = words.shape[:-1], group * code_bits
    container_bits, dtype = _container(width)
    words = mx.contiguous(words)
    if container_bits == width and width <= WORD_BITS:  # aligned: reading is reinterpreting
        return words.view(dtype)[..., : n_codes // group]
    unit = max(group, _group_codes(code_bits))
    unit_bytes = unit * code_bits // 8
    n_units = -(-n_codes // unit)
    data = words.view(mx.uint8)
    data = _pad_last(data, unit_bytes) if data.shape[-1] < n_units * unit_bytes else data
    data = data[..., : n_units * unit_bytes].reshape(*lead, n_units, unit_bytes)
    unit_bits, unit_dtype = _container(8 * unit_bytes)
    merged = mx.contiguous(_pad_last(data, unit_bits // 8)).view(unit_dtype)
    if unit == group:
        split = merged
    else:
        shifts = (mx.arange(unit // group) * width).astype(unit_dtype)
        split = (merged >> shifts) & mx.array((1 << width) - 1, dtype=unit_dtype)
    return split.reshape(*lead, -1)[..., : n_codes // group].astype(dtype)


def unpack_codes(words: mx.array, code_bits: int, n_codes: int) -> mx.array:
    """Unpack ``n_codes`` codes of a row: the inverse of :func:`pack_codes`.

    Args:
        words: ``[..., W]`` uint32.
        code_bits: width of a code, 1..8.
        n_codes: codes in a row.

    Returns:
        ``[..., n_codes]`` uint8.

    Raises:
        ValueError: a width outside 1..8 or too few words.
    """
    return unpack_groups(words, code_bits, n_codes, 1)


INDEX_BITS: Final = 14
"""Bits of a table index at most: a table of pairs of centroids then fits a core's second-level cache."""


def table_group(code_bits: int, n_codes: int) -> int:
    """Codes that one table lookup reads: a power of two that divides ``n_codes``, within ``INDEX_BITS`` bits."""
    return max(n for n in (1, 2, 4, 8) if n * code_bits <= INDEX_BITS and n_codes % n == 0)


def expand_table(centroids: np.ndarray, group: int) -> np.ndarray:
    """Table of all ``group``-tuples of centroids, ``[levels**group, group]``, first code fastest."""
    levels = len(centroids)
    index = np.arange(levels**group)
    return np.stack([centroids[index // levels**j % levels] for j in range(group)], axis=-1)


def trit_bytes(n_trits: int) -> int:
    """Bytes that hold ``n_trits`` trits, five to a byte."""
    return -(-n_trits // TRITS_PER_BYTE)


def pack_trits(trits: mx.array) -> mx.array:
    """Pack values 0, 1, 2 five to a byte, the first in the lowest base-3 digit.

    Args:
        trits: ``[..., D]`` of any unsigned dtype.

    Returns:
        ``[..., ceil(D / 5)]`` uint8; missing trits are zero.
    """
    x = _pad_last(trits.astype(mx.uint8), TRITS_PER_BYTE)
    x = x.reshape(*x.shape[:-1], -1, TRITS_PER_BYTE)
    packed = x[..., TRITS_PER_BYTE - 1]
    for digit in reversed(range(TRITS_PER_BYTE - 1)):
        packed = packed * 3 + x[..., digit]
    return packed


def lookup_table(rows: np.ndarray) -> mx.array:
    """A table for :func:`lookup` from ``[N, G]`` entries; fp32 entries travel in pairs, as complex64."""
    table = mx.array(np.ascontiguousarray(rows))
    return table.view(mx.complex64) if rows.dtype == np.float32 and rows.shape[1] % 2 == 0 else table


def lookup(table: mx.array, index: mx.array) -> mx.array:
    """Entries of a :func:`lookup_table`: ``[...]`` unsigned indices to ``[..., G]``.

    A gather along an axis costs MLX on CPU a twentieth of ``mx.take`` of rows.
    """
    flat = index.reshape(-1, 1)
    found = mx.take_along_axis(table, mx.broadcast_to(flat, (flat.shape[0], table.shape[1])), axis=0)
    if found.dtype == mx.complex64:
        found = found.view(mx.float32)
    return found.reshape(*index.shape, found.shape[1])


@functools.cache
def _trit_table() -> mx.array:
    return lookup_table(expand_table(np.arange(3, dtype=np.uint8), TRITS_PER_BYTE))


def unpack_trits(data: mx.array, n_trits: int) -> mx.array:
    """Unpack ``n_trits`` values of a row: the inverse of :func:`pack_trits`, ``[..., n_trits]`` uint8.

    Raises:
        ValueError: too few bytes.
    """
    if data.shape[-1] < trit_bytes(n_trits):
        raise ValueError(f"data has {data.shape[-1]} bytes a row; {n_trits} trits need {trit_bytes(n_trits)}")
    trits = lookup(_trit_table(), data)
    return trits.reshape(*data.shape[:-1], -1)[..., :n_trits]
