"""Pack codes of 1 to 8 bits into 32-bit words."""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_not_empty, resolve_backend

MAX_CODE_BITS: Final = 8
WORD_BITS: Final = 32

_KERNEL = Kernel("pack_codes", ("codes",), ("words",), ("packing",))


def check_code_bits(code_bits: int, name: str = "code_bits") -> None:
    """Raise ValueError unless ``code_bits`` is an integer in 1..8."""
    if isinstance(code_bits, bool) or not isinstance(code_bits, int) or not 1 <= code_bits <= MAX_CODE_BITS:
        raise ValueError(f"{name} must be an integer in 1..{MAX_CODE_BITS}, got {code_bits!r}")


def packed_words(n_codes: int, code_bits: int) -> int:
    """32-bit words of a row of ``n_codes`` codes."""
    return -(-n_codes * code_bits // WORD_BITS)


def pack_codes_reference(codes: mx.array, code_bits: int) -> mx.array:
    """The definition: all bits of a row in order, 32 to a word, the lowest first."""
    lead, n_codes = codes.shape[:-1], codes.shape[-1]
    n_words = packed_words(n_codes, code_bits)
    bits = (codes.astype(mx.uint32)[..., None] >> mx.arange(code_bits, dtype=mx.uint32)) & 1
    bits = bits.reshape(*lead, n_codes * code_bits)
    bits = mx.pad(bits, [(0, 0)] * len(lead) + [(0, n_words * WORD_BITS - n_codes * code_bits)])
    weighted = bits.reshape(*lead, n_words, WORD_BITS) << mx.arange(WORD_BITS, dtype=mx.uint32)
    return mx.sum(weighted, axis=-1).astype(mx.uint32)


def pack_codes(codes: mx.array, code_bits: int, *, backend: Backend | None = None) -> mx.array:
    """Pack code ``j`` of a row into bits ``[j*code_bits, (j+1)*code_bits)``, little-endian.

    Args:
        codes: ``[..., D]`` uint8 or uint32, each below ``2**code_bits``.
        code_bits: width of a code, 1..8.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[..., ceil(D * code_bits / 32)]`` uint32; the tail is zero.

    Raises:
        ValueError: a width outside 1..8, an empty array.
        TypeError: codes of another dtype.
    """
    check_code_bits(code_bits)
    check_not_empty("codes", codes)
    if codes.dtype not in (mx.uint8, mx.uint32):
        raise TypeError(f"codes must be uint8 or uint32, got {codes.dtype}")
    backend = resolve_backend(backend)
    if backend == "reference":
        return pack_codes_reference(codes, code_bits)
    rows = as_rows(codes)
    shape = (rows.shape[0], packed_words(codes.shape[-1], code_bits))
    (words,) = _KERNEL(
        [rows],
        backend=backend,
        template=[("CODE_BITS", code_bits)],
        grid=(shape[1], shape[0], 1),
        threadgroup=(min(shape[1], 32), 8, 1),
        output_shapes=[shape],
        output_dtypes=[mx.uint32],
    )
    return words.reshape(*codes.shape[:-1], shape[1])
