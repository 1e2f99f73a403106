"""Affine-quantize and pack, in groups of tokens of one channel."""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from veloxquant_kernels.affine_quantize_pack import Packed, affine_codes_reference, check_group_size
from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_float, check_not_empty, resolve_backend
from veloxquant_kernels.pack_codes import check_code_bits, pack_codes_reference, packed_words

_KERNEL = Kernel("kivi_quantize_pack", ("x",), ("words", "scales", "zeros"), ("exact", "packing", "affine"))

MAX_BLOCK_VALUES: Final = 32 * 1024
"""A block's codes, a byte each, fill threadgroup memory."""
MAX_CHANNELS: Final = 1024
"""One thread per channel."""


def kivi_quantize_pack_reference(x: mx.array, code_bits: int, group_size: int) -> Packed:
    """The definition: groups along the tokens, ``code = round((x - zero) / scale)``."""
    *lead, n_tokens, head_dim = x.shape
    groups = x.reshape(*lead, n_tokens // group_size, group_size, head_dim)
    codes, scales, zeros = affine_codes_reference(groups, code_bits, axis=-2)
    return pack_codes_reference(codes.reshape(x.shape), code_bits), scales[..., 0, :], zeros[..., 0, :]


def kivi_quantize_pack(x: mx.array, code_bits: int, group_size: int, *, backend: Backend | None = None) -> Packed:
    """Quantize every channel of every block of ``group_size`` tokens between its own minimum and maximum.

    The arithmetic is that of :func:`veloxquant_kernels.affine_quantize_pack.affine_quantize_pack`; codes are packed
    token by token all the same, so a token's words can be appended.

    Args:
        x: ``[..., T, D]`` fp16, bf16 or fp32.
        code_bits: width of a code, 1..8.
        group_size: divides T; ``group_size * D`` is at most 32768.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        words ``[..., T, ceil(D * code_bits / 32)]`` uint32, scales and zeros ``[..., T // group_size, D]`` fp16:
        ``code_bits + 32 / group_size`` bits per value.

    Raises:
        ValueError: a width outside 1..8, an empty array, a group_size that does not divide T, a block that does not
            fit threadgroup memory.
        TypeError: x of another dtype.

    Source: KIVI (arXiv 2402.02750), per-channel keys.
    """
    check_code_bits(code_bits)
    check_not_empty("x", x, min_ndim=2)
    check_float("x", x)
    *lead, n_tokens, head_dim = x.shape
    check_group_size(group_size)
    if n_tokens % group_size:
        raise ValueError(f"group_size must divide the number of tokens, {n_tokens}, got {group_size}")
    if group_size * head_dim > MAX_BLOCK_VALUES or head_dim > MAX_CHANNELS:
        raise ValueError(
            f"group_size * head_dim must be at most {MAX_BLOCK_VALUES} and head_dim at most {MAX_CHANNELS} to fit a "
            f"threadgroup, got {group_size} * {head_dim}"
        )
    backend = resolve_backend(backend)
    if backend == "reference":
        return kivi_quantize_pack_reference(x, code_bits, group_size)
    rows = as_rows(x)
    n_blocks, n_words = rows.shape[0] // group_size, packed_words(head_dim, code_bits)
    words, scales, zeros = _KERNEL(
        [rows],
        backend=backend,
        template=[("HEAD_DIM", head_dim), ("CODE_BITS", code_bits), ("GROUP_SIZE", group_size)],
        grid=(n_blocks * head_dim, 1, 1),
        threadgroup=(head_dim, 1, 1),
        output_shapes=[(rows.shape[0], n_words), (n_blocks, head_dim), (n_blocks, head_dim)],
        output_dtypes=[mx.uint32, mx.float16, mx.float16],
    )
    tables = (*lead, n_tokens // group_size, head_dim)
    return words.reshape(*lead, n_tokens, n_words), scales.reshape(tables), zeros.reshape(tables)
