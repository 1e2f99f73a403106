"""Codes in words and trits in bytes: the byte format, in plain MLX and as kernels, and the choice between them.

Code ``j`` of a row lies at bits ``[j * code_bits, (j + 1) * code_bits)`` of the row, little-endian, in uint32 words;
codes may straddle words, and the bits behind the last code are zero. Trits lie five to a byte (1.6 bits each), the
first in the lowest base-3 digit.

In plain MLX: eight codes of any width fill ``code_bits`` whole bytes, so packing merges neighbours pairwise (two, four,
eight codes to a container) and drops the container's empty bytes; unpacking shifts the container. No step loops over
tokens.
"""

from __future__ import annotations

import functools
from typing import Final

import mlx.core as mx
import numpy as np

from veloxquant_kernels.kernel import Backend, Kernel, launches_on, no_rows
from veloxquant_kernels.lookup import expand_table, lookup, lookup_table

MAX_CODE_BITS: Final = 8
WORD_BITS: Final = 32
TRITS_PER_BYTE: Final = 5

_CONTAINERS: Final = ((8, mx.uint8), (16, mx.uint16), (32, mx.uint32), (64, mx.uint64))

_PACK_CODES = Kernel("pack_codes", ("codes",), ("words",), ("packing",))
_UNPACK_CODES = Kernel("unpack_codes", ("words",), ("codes",), ("packing",))
_PACK_TRITS = Kernel("pack_trits", ("trits",), ("bytes",))
_UNPACK_TRITS = Kernel("unpack_trits", ("bytes",), ("trits",))


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


def trit_bytes(n_trits: int) -> int:
    """Bytes that hold ``n_trits`` trits, five to a byte."""
    return -(-n_trits // TRITS_PER_BYTE)


def check_words(words: mx.array, code_bits: int, n_codes: int, name: str = "words") -> None:
    """Raise unless ``words`` is uint32 and a row holds exactly ``n_codes`` codes of ``code_bits``."""
    if words.dtype != mx.uint32:
        raise TypeError(f"{name} must be uint32, got {words.dtype}")
    needed = packed_words(n_codes, code_bits)
    if n_codes < 1 or words.shape[-1] != needed:
        raise ValueError(f"{name} has {words.shape[-1]} words a row; {n_codes} codes of {code_bits} bits fill {needed}")


def check_trit_bytes(data: mx.array, n_trits: int) -> None:
    """Raise unless ``data`` is uint8 and a row holds exactly ``n_trits`` trits."""
    if data.dtype != mx.uint8:
        raise TypeError(f"data must be uint8, got {data.dtype}")
    if n_trits < 1 or data.shape[-1] != trit_bytes(n_trits):
        raise ValueError(f"data has {data.shape[-1]} bytes a row; {n_trits} trits fill {trit_bytes(n_trits)}")


@functools.cache
def _container(bits: int) -> tuple[int, mx.Dtype]:
    return next((width, dtype) for width, dtype in _CONTAINERS if width >= bits)


@functools.cache
def _group_codes(code_bits: int) -> int:
    """The fewest codes (1, 2, 4 or 8) that fill whole bytes."""
    return next(n for n in (1, 2, 4, 8) if n * code_bits % 8 == 0)


def _pad_last(x: mx.array, multiple: int) -> mx.array:
    missing = -x.shape[-1] % multiple
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pack_codes(codes: mx.array, code_bits: int, *, backend: Backend | None = None) -> mx.array:
    """Pack codes into little-endian uint32 words.

    Args:
        codes: ``[..., D]`` bool, uint8 or uint32, each below ``2**code_bits``.
        code_bits: width of a code, 1..8.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        ``[..., ceil(D * code_bits / 32)]`` uint32; the tail is zero.

    Raises:
        ValueError: a width outside 1..8, naming it.
        TypeError: codes of another dtype.
    """
    *lead, n_codes = codes.shape
    n_words = packed_words(n_codes, code_bits)
    if codes.dtype not in (mx.bool_, mx.uint8, mx.uint32):
        raise TypeError(f"codes must be bool, uint8 or uint32, got {codes.dtype}")
    if (where := launches_on(backend, no_rows("codes", codes))) is not None:
        codes = codes.astype(mx.uint8) if codes.dtype == mx.bool_ else codes
        return _PACK_CODES.per_value([codes], n_words, mx.uint32, backend=where, template=[("CODE_BITS", code_bits)])
    group = _group_codes(code_bits)
    merged = _pad_last(codes.astype(mx.uint8), group)
    width, n_merged = code_bits, -(-n_codes // group) * group
    while width < group * code_bits:
        width, n_merged = 2 * width, n_merged // 2
        dtype = _container(width)[1]
        pairs = merged.reshape(*lead, n_merged, 2)
        merged = pairs[..., 0].astype(dtype) | (pairs[..., 1].astype(dtype) << (width // 2))
    used, held = width // 8, merged.itemsize
    data = mx.contiguous(merged).view(mx.uint8)
    if used != held:
        data = data.reshape(*lead, n_merged, held)[..., :used].reshape(*lead, n_merged * used)
    if n_merged * used != 4 * n_words:
        data = mx.contiguous(_pad_last(data, 4)[..., : 4 * n_words])
    return data.view(mx.uint32)


def unpack_groups(words: mx.array, code_bits: int, n_codes: int, group: int) -> mx.array:
    """Read ``group`` neighbouring codes at a time as one integer, the first code in its lowest bits; plain MLX.

    Args:
        words: ``[..., ceil(n_codes * code_bits / 32)]`` uint32 from :func:`pack_codes`.
        code_bits: width of a code, 1..8.
        n_codes: codes in a row, a multiple of ``group``.
        group: 1, 2, 4 or 8 codes.

    Returns:
        ``[..., n_codes // group]``, the narrowest unsigned dtype that holds ``group * code_bits`` bits.
    """
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
    return split.reshape(*lead, n_units * (unit // group))[..., : n_codes // group].astype(dtype)


def unpack_codes(words: mx.array, code_bits: int, n_codes: int, *, backend: Backend | None = None) -> mx.array:
    """Unpack the codes of a row: the inverse of :func:`pack_codes`.

    Args:
        words: ``[..., ceil(n_codes * code_bits / 32)]`` uint32.
        code_bits: width of a code, 1..8.
        n_codes: codes in a row.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        ``[..., n_codes]`` uint8.

    Raises:
        ValueError: a width outside 1..8, or rows that do not hold exactly ``n_codes``.
        TypeError: words of another dtype.
    """
    check_words(words, code_bits, n_codes)
    if (where := launches_on(backend, no_rows("words", words))) is not None:
        return _UNPACK_CODES.per_value([words], n_codes, mx.uint8, backend=where, template=[("CODE_BITS", code_bits)])
    return unpack_groups(words, code_bits, n_codes, 1)


def pack_trits(trits: mx.array, *, backend: Backend | None = None) -> mx.array:
    """Pack values 0, 1, 2 five to a byte, the first in the lowest base-3 digit.

    Args:
        trits: ``[..., D]`` uint8, each below 3.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        ``[..., ceil(D / 5)]`` uint8; missing trits are zero.

    Raises:
        TypeError: trits of another dtype.
    """
    if trits.dtype != mx.uint8:
        raise TypeError(f"trits must be uint8, got {trits.dtype}")
    if (where := launches_on(backend, no_rows("trits", trits))) is not None:
        return _PACK_TRITS.per_value([trits], trit_bytes(trits.shape[-1]), mx.uint8, backend=where)
    x = _pad_last(trits, TRITS_PER_BYTE)
    x = x.reshape(*x.shape[:-1], x.shape[-1] // TRITS_PER_BYTE, TRITS_PER_BYTE)
    packed = x[..., TRITS_PER_BYTE - 1]
    for digit in reversed(range(TRITS_PER_BYTE - 1)):
        packed = packed * 3 + x[..., digit]
    return packed


@functools.cache
def _trit_table() -> mx.array:
    return lookup_table(expand_table(np.arange(3, dtype=np.uint8), TRITS_PER_BYTE))


def unpack_trits(data: mx.array, n_trits: int, *, backend: Backend | None = None) -> mx.array:
    """Unpack the trits of a row: the inverse of :func:`pack_trits`.

    Args:
        data: ``[..., ceil(n_trits / 5)]`` uint8.
        n_trits: trits in a row.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        ``[..., n_trits]`` uint8.

    Raises:
        ValueError: rows that do not hold exactly ``n_trits``.
        TypeError: data of another dtype.
    """
    check_trit_bytes(data, n_trits)
    if (where := launches_on(backend, no_rows("data", data))) is not None:
        return _UNPACK_TRITS.per_value([data], n_trits, mx.uint8, backend=where)
    trits = lookup(_trit_table(), data)
    return trits.reshape(*data.shape[:-1], data.shape[-1] * TRITS_PER_BYTE)[..., :n_trits]
