"""Affine-quantize and pack, in groups of neighbouring channels of one token."""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_float, check_not_empty, resolve_backend
from veloxquant_kernels.pack_codes import check_code_bits, pack_codes_reference, packed_words
from veloxquant_kernels.rotate_quantize_pack import SIMDGROUPS
from veloxquant_kernels.rotation import MAX_HEAD_DIM

_KERNEL = Kernel("affine_quantize_pack", ("x",), ("words", "scales", "zeros"), ("exact", "packing", "affine"))

SMALLEST_SCALE: Final = 2.0**-24
"""The least positive fp16: a group of equal values has scale 0 and divides 0 by this."""

Packed = tuple[mx.array, mx.array, mx.array]


def affine_codes_reference(groups: mx.array, code_bits: int, axis: int) -> Packed:
    """Codes, scales and zeros of groups that lie along ``axis``; scales and zeros keep that axis with size 1."""
    levels = (1 << code_bits) - 1
    groups = groups.astype(mx.float32)
    low, high = mx.min(groups, axis=axis, keepdims=True), mx.max(groups, axis=axis, keepdims=True)
    scales, zeros = ((high - low) * (1 / levels)).astype(mx.float16), low.astype(mx.float16)
    steps = mx.maximum(scales.astype(mx.float32), SMALLEST_SCALE)
    codes = mx.clip(mx.round((groups - zeros.astype(mx.float32)) / steps), 0, levels)
    return codes.astype(mx.uint8), scales, zeros


def affine_quantize_pack_reference(x: mx.array, code_bits: int, group_size: int) -> Packed:
    """The definition: groups along the last axis, ``code = round((x - zero) / scale)``."""
    lead, head_dim = x.shape[:-1], x.shape[-1]
    missing = -head_dim % group_size  # a repeated value changes neither minimum nor maximum
    padded = mx.concatenate([x, mx.repeat(x[..., -1:], missing, axis=-1)], axis=-1) if missing else x
    groups = padded.reshape(*lead, -1, group_size)
    codes, scales, zeros = affine_codes_reference(groups, code_bits, axis=-1)
    codes = codes.reshape(*lead, -1)[..., :head_dim]
    return pack_codes_reference(codes, code_bits), scales[..., 0], zeros[..., 0]


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError where rows of ``head_dim`` do not fit threadgroup memory."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM} to fit threadgroup memory, got {head_dim}")


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless ``group_size`` is a positive integer."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a positive integer, got {group_size!r}")


def affine_quantize_pack(x: mx.array, code_bits: int, group_size: int, *, backend: Backend | None = None) -> Packed:
    """Quantize every group of ``group_size`` neighbouring channels between its own minimum and maximum.

    ``scale = fp16((max - min) / (2**code_bits - 1))``, ``zero = fp16(min)``, ``code = round((x - zero) / scale)``.

    Args:
        x: ``[..., D]`` fp16, bf16 or fp32; D at most 512.
        code_bits: width of a code, 1..8.
        group_size: channels per group; the last group is shorter where it does not divide D.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        words ``[..., ceil(D * code_bits / 32)]`` uint32, scales and zeros ``[..., ceil(D / group_size)]`` fp16:
        ``code_bits + 32 / group_size`` bits per value.

    Raises:
        ValueError: a width outside 1..8, an empty array, or a group_size below 1.
        TypeError: x of another dtype.
    """
    check_code_bits(code_bits)
    check_not_empty("x", x)
    check_float("x", x)
    head_dim = x.shape[-1]
    check_head_dim(head_dim)
    check_group_size(group_size)
    backend = resolve_backend(backend)
    if backend == "reference":
        return affine_quantize_pack_reference(x, code_bits, group_size)
    rows = as_rows(x)
    n_rows, n_words, n_groups = rows.shape[0], packed_words(head_dim, code_bits), -(-head_dim // group_size)
    words, scales, zeros = _KERNEL(
        [rows],
        backend=backend,
        template=[
            ("HEAD_DIM", head_dim),
            ("CODE_BITS", code_bits),
            ("GROUP_SIZE", group_size),
            ("SIMDGROUPS", SIMDGROUPS),
        ],
        grid=(-(-n_rows // SIMDGROUPS) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(n_rows, n_words), (n_rows, n_groups), (n_rows, n_groups)],
        output_dtypes=[mx.uint32, mx.float16, mx.float16],
    )
    lead = x.shape[:-1]
    return words.reshape(*lead, n_words), scales.reshape(*lead, n_groups), zeros.reshape(*lead, n_groups)
