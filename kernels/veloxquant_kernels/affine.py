"""Affine codes of groups of values between their minimum and maximum: along channels, or along tokens (KIVI's keys).

``scale = fp16((max - min) / (2**code_bits - 1))``, ``zero = fp16(min)``, ``code = round((x - zero) / scale)``: codes
are computed against the rounded scale and zero point, the ones that decoding uses. At one bit, a group that spans more
than fp16's largest value has that as its scale and its levels in the middle. A group with a value that is not finite
has scale NaN, so all of it decodes to NaN. Kernels and plain MLX agree in every bit.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_float, launches_on, no_rows
from veloxquant_kernels.packing import check_code_bits, check_words, pack_codes, packed_words, unpack_codes
from veloxquant_kernels.rotation import MAX_HEAD_DIM
from veloxquant_kernels.signature import Template
from veloxquant_kernels.turboquant import check_result_dtype

SMALLEST_SCALE: Final = 2.0**-24
"""The least positive fp16: a group of equal values has scale 0, and its code is 0 divided by this."""
LARGEST_SCALE: Final = 65504.0
"""The largest fp16."""
MAX_BLOCK_VALUES: Final = 32 * 1024
"""A block's codes, a byte each, fill threadgroup memory."""
MAX_CHANNELS: Final = 1024
"""One thread per channel of a block."""

_AFFINE = Kernel("affine_quantize_pack", ("x",), ("words", "scales", "zeros"), ("exact", "packing", "affine"))
_KIVI = Kernel("kivi_quantize_pack", ("x",), ("words", "scales", "zeros"), ("exact", "packing", "affine"))
_DECODE = Kernel("affine_unpack_dequantize", ("words", "scales", "zeros"), ("x",), ("exact", "packing", "affine"))

Packed = tuple[mx.array, mx.array, mx.array]


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless ``group_size`` is a positive integer."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a positive integer, got {group_size!r}")


def _uniform_codes(x: mx.array, code_bits: int, axis: int) -> Packed:
    """Codes, scales and zero points of groups along ``axis``, the last two without it."""
    x = x.astype(mx.float32)
    top = (1 << code_bits) - 1
    low, high = mx.min(x, axis=axis, keepdims=True), mx.max(x, axis=axis, keepdims=True)
    finite = mx.all(mx.isfinite(x), axis=axis, keepdims=True)
    excess = mx.maximum((high - low) - top * LARGEST_SCALE, 0)
    zeros = mx.where(finite, low + excess * 0.5, 0).astype(mx.float16)
    scales = mx.where(finite, mx.minimum((high - low) * (1 / top), LARGEST_SCALE), mx.nan).astype(mx.float16)
    steps = mx.maximum(scales.astype(mx.float32), SMALLEST_SCALE)
    codes = mx.clip(mx.round((x - zeros.astype(mx.float32)) / steps), 0, top)
    return mx.where(finite, codes, 0).astype(mx.uint8), scales.squeeze(axis), zeros.squeeze(axis)


def affine_quantize_pack(x: mx.array, code_bits: int, group_size: int, *, backend: Backend | None = None) -> Packed:
    """Quantize every group of ``group_size`` neighbouring channels between its own minimum and maximum.

    Args:
        x: ``[..., D]`` fp16, bf16 or fp32; the kernel serves D at most 512.
        code_bits: width of a code, 1..8.
        group_size: channels per group; the last group is shorter where it does not divide D.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        words ``[..., ceil(D * code_bits / 32)]`` uint32, scales and zeros ``[..., ceil(D / group_size)]`` fp16:
        ``code_bits + 32 / group_size`` bits per value.

    Raises:
        ValueError: a width outside 1..8, a group_size below 1, or a D that a named backend does not serve.
        TypeError: x of another dtype.
    """
    check_code_bits(code_bits)
    check_float("x", x)
    check_group_size(group_size)
    *lead, head_dim = x.shape
    n_groups = -(-head_dim // group_size)
    problem = None
    if head_dim > MAX_HEAD_DIM:
        problem = f"head_dim must be at most {MAX_HEAD_DIM} to fit threadgroup memory, got {head_dim}"
    if (where := launches_on(backend, no_rows("x", x), problem)) is not None:
        words, scales, zeros = _AFFINE.per_row(
            x,
            [],
            [(packed_words(head_dim, code_bits), mx.uint32), (n_groups, mx.float16), (n_groups, mx.float16)],
            backend=where,
            template=[("HEAD_DIM", head_dim), ("CODE_BITS", code_bits), ("GROUP_SIZE", group_size)],
        )
        return words, scales, zeros
    missing = -head_dim % group_size  # a repeated value changes neither minimum nor maximum
    padded = mx.concatenate([x, mx.repeat(x[..., -1:], missing, axis=-1)], axis=-1) if missing else x
    codes, scales, zeros = _uniform_codes(padded.reshape(*lead, n_groups, group_size), code_bits, -1)
    codes = codes.reshape(*lead, n_groups * group_size)[..., :head_dim]
    return pack_codes(codes, code_bits, backend=backend), scales, zeros


def kivi_quantize_pack(x: mx.array, code_bits: int, group_size: int, *, backend: Backend | None = None) -> Packed:
    """Quantize every channel of every block of ``group_size`` tokens between its own minimum and maximum.

    Codes are packed token by token all the same, so a token's words can be appended.

    Args:
        x: ``[..., T, D]`` fp16, bf16 or fp32.
        code_bits: width of a code, 1..8.
        group_size: divides T; the kernel serves ``group_size * D`` at most 32768 and D at most 1024.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        words ``[..., T, ceil(D * code_bits / 32)]`` uint32, scales and zeros ``[..., T // group_size, D]`` fp16:
        ``code_bits + 32 / group_size`` bits per value.

    Raises:
        ValueError: a width outside 1..8, a group_size that does not divide T, or a block that a named backend does
            not serve.
        TypeError: x of another dtype.

    Source: KIVI (arXiv 2402.02750), per-channel keys.
    """
    check_code_bits(code_bits)
    check_float("x", x)
    check_group_size(group_size)
    *lead, n_tokens, head_dim = x.shape
    if n_tokens % group_size:
        raise ValueError(f"group_size must divide the number of tokens, {n_tokens}, got {group_size}")
    n_blocks = n_tokens // group_size
    problem = None
    if group_size * head_dim > MAX_BLOCK_VALUES or head_dim > MAX_CHANNELS:
        problem = (
            f"group_size * head_dim must be at most {MAX_BLOCK_VALUES} and head_dim at most {MAX_CHANNELS} to fit a "
            f"threadgroup, got {group_size} * {head_dim}"
        )
    if (where := launches_on(backend, no_rows("x", x), problem)) is not None:
        rows, n_words = as_rows(x), packed_words(head_dim, code_bits)
        n_all = rows.shape[0] // group_size
        words, scales, zeros = _KIVI(
            [rows],
            backend=where,
            template=[("HEAD_DIM", head_dim), ("CODE_BITS", code_bits), ("GROUP_SIZE", group_size)],
            grid=(n_all * head_dim, 1, 1),
            threadgroup=(head_dim, 1, 1),
            output_shapes=[(rows.shape[0], n_words), (n_all, head_dim), (n_all, head_dim)],
            output_dtypes=[mx.uint32, mx.float16, mx.float16],
        )
        tables = (*lead, n_blocks, head_dim)
        return words.reshape(*lead, n_tokens, n_words), scales.reshape(tables), zeros.reshape(tables)
    codes, scales, zeros = _uniform_codes(x.reshape(*lead, n_blocks, group_size, head_dim), code_bits, -2)
    return pack_codes(codes.reshape(x.shape), code_bits, backend=backend), scales, zeros


def affine_unpack_dequantize(
    words: mx.array,
    scales: mx.array,
    zeros: mx.array,
    code_bits: int,
    head_dim: int,
    group_size: int,
    dtype: mx.Dtype = mx.float16,
    *,
    per_channel: bool = False,
    backend: Backend | None = None,
) -> mx.array:
    """Decode what :func:`affine_quantize_pack` (or, with ``per_channel``, :func:`kivi_quantize_pack`) wrote.

    Args:
        words: ``[..., T, ceil(head_dim * code_bits / 32)]`` uint32.
        scales: fp16, ``[..., T, ceil(head_dim / group_size)]``, or with
            ``per_channel`` ``[..., T // group_size, head_dim]``.
        zeros: like ``scales``.
        code_bits: width of a code, 1..8.
        head_dim: values in a row.
        group_size: values that share a scale.
        dtype: of the result: fp16, bf16 or fp32.
        per_channel: whether groups lie along the tokens.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        ``[..., T, head_dim]`` of ``dtype``.

    Raises:
        ValueError: arrays whose shapes do not belong together.
        TypeError: an element type other than the stated ones.
    """
    check_words(words, code_bits, head_dim)
    check_group_size(group_size)
    n_groups = -(-head_dim // group_size)
    expected: tuple[int, ...] = (*words.shape[:-1], n_groups)
    if per_channel:
        if words.ndim < 2 or words.shape[-2] % group_size:
            raise ValueError(f"group_size must divide the number of tokens of words {words.shape}, got {group_size}")
        expected = (*words.shape[:-2], words.shape[-2] // group_size, head_dim)
    for name, table in (("scales", scales), ("zeros", zeros)):
        if table.dtype != mx.float16 or tuple(table.shape) != expected:
            raise ValueError(f"{name} must be float16 of shape {expected}, got {table.dtype} {tuple(table.shape)}")
    check_result_dtype(dtype)
    if (where := launches_on(backend, no_rows("words", words))) is not None:
        template: Template = [
            ("T", dtype),
            ("CODE_BITS", code_bits),
            ("GROUP_SIZE", group_size),
            ("PER_CHANNEL", per_channel),
        ]
        return _DECODE.per_value([words, scales, zeros], head_dim, dtype, backend=where, template=template)
    codes, axis = unpack_codes(words, code_bits, head_dim, backend=backend), -2 if per_channel else -1
    if per_channel:
        groups = codes.reshape(*expected[:-1], group_size, head_dim)
    else:
        missing = n_groups * group_size - head_dim
        codes = mx.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)]) if missing else codes
        groups = codes.reshape(*expected, group_size)
    scale, zero = (mx.expand_dims(table.astype(mx.float32), axis) for table in (scales, zeros))
    x = groups.astype(mx.float32) * scale + zero
    return x.reshape(*words.shape[:-1], head_dim if per_channel else n_groups * group_size)[..., :head_dim].astype(
        dtype
    )
