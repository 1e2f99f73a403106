"""Unpack codes of 1 to 8 bits from 32-bit words."""

from __future__ import annotations

import mlx.core as mx

from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_not_empty, resolve_backend
from veloxquant_kernels.pack_codes import WORD_BITS, check_code_bits, packed_words

_KERNEL = Kernel("unpack_codes", ("words",), ("codes",), ("packing",))


def check_words(words: mx.array, code_bits: int, n_codes: int, name: str = "words") -> None:
    """Raise unless ``words`` is uint32 and a row holds exactly ``n_codes`` codes of ``code_bits``."""
    check_code_bits(code_bits)
    check_not_empty(name, words)
    if words.dtype != mx.uint32:
        raise TypeError(f"{name} must be uint32, got {words.dtype}")
    needed = packed_words(n_codes, code_bits)
    if n_codes < 1 or words.shape[-1] != needed:
        raise ValueError(f"{name} has {words.shape[-1]} words a row; {n_codes} codes of {code_bits} bits fill {needed}")


def unpack_codes_reference(words: mx.array, code_bits: int, n_codes: int) -> mx.array:
    """The definition: the row's bits in order, ``code_bits`` to a code, the lowest first."""
    lead = words.shape[:-1]
    bits = (words[..., None] >> mx.arange(WORD_BITS, dtype=mx.uint32)) & 1
    bits = bits.reshape(*lead, words.shape[-1] * WORD_BITS)[..., : n_codes * code_bits]
    weighted = bits.reshape(*lead, n_codes, code_bits) << mx.arange(code_bits, dtype=mx.uint32)
    return mx.sum(weighted, axis=-1).astype(mx.uint8)


def unpack_codes(words: mx.array, code_bits: int, n_codes: int, *, backend: Backend | None = None) -> mx.array:
    """The inverse of :func:`veloxquant_kernels.pack_codes.pack_codes`.

    Args:
        words: ``[..., ceil(n_codes * code_bits / 32)]`` uint32.
        code_bits: width of a code, 1..8.
        n_codes: codes in a row.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[..., n_codes]`` uint8.

    Raises:
        ValueError: a width outside 1..8, or rows that do not hold exactly ``n_codes``.
        TypeError: words of another dtype.
    """
    check_words(words, code_bits, n_codes)
    backend = resolve_backend(backend)
    if backend == "reference":
        return unpack_codes_reference(words, code_bits, n_codes)
    rows = as_rows(words)
    (codes,) = _KERNEL(
        [rows],
        backend=backend,
        template=[("CODE_BITS", code_bits)],
        grid=(n_codes, rows.shape[0], 1),
        threadgroup=(min(n_codes, 32), 8, 1),
        output_shapes=[(rows.shape[0], n_codes)],
        output_dtypes=[mx.uint8],
    )
    return codes.reshape(*words.shape[:-1], n_codes)
