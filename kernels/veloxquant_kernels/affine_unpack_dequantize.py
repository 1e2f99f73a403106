"""Unpack and dequantize affine codes, grouped along channels or along tokens."""

from __future__ import annotations

import mlx.core as mx

from veloxquant_kernels.affine_quantize_pack import check_group_size
from veloxquant_kernels.kernel import FLOAT_DTYPES, Backend, Kernel, as_rows, resolve_backend
from veloxquant_kernels.unpack_codes import check_words, unpack_codes_reference

_KERNEL = Kernel("affine_unpack_dequantize", ("words", "scales", "zeros"), ("x",), ("exact", "packing", "affine"))


def _group_shape(words: mx.array, head_dim: int, group_size: int, per_channel: bool) -> tuple[int, ...]:
    check_group_size(group_size)
    if per_channel:
        if words.ndim < 2 or words.shape[-2] % group_size:
            raise ValueError(f"group_size must divide the number of tokens of words {words.shape}, got {group_size}")
        return (*words.shape[:-2], words.shape[-2] // group_size, head_dim)
    return (*words.shape[:-1], -(-head_dim // group_size))


def affine_unpack_dequantize_reference(
    words: mx.array,
    scales: mx.array,
    zeros: mx.array,
    code_bits: int,
    head_dim: int,
    group_size: int,
    dtype: mx.Dtype,
    per_channel: bool,
) -> mx.array:
    """The definition: ``code * scale + zero`` in fp32, each value with its group's."""
    axis = -2 if per_channel else -1
    scale, zero = (mx.repeat(table.astype(mx.float32), group_size, axis=axis) for table in (scales, zeros))
    scale, zero = scale[..., :head_dim], zero[..., :head_dim]
    codes = unpack_codes_reference(words, code_bits, head_dim).astype(mx.float32)
    return (codes * scale + zero).astype(dtype)


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
    """Decode what ``affine_quantize_pack`` (or, with ``per_channel``, ``kivi_quantize_pack``) wrote.

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
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[..., T, head_dim]`` of ``dtype``.

    Raises:
        ValueError: arrays whose shapes do not belong together.
        TypeError: an element type other than the stated ones.
    """
    check_words(words, code_bits, head_dim)
    expected = _group_shape(words, head_dim, group_size, per_channel)
    for name, table in (("scales", scales), ("zeros", zeros)):
        if table.dtype != mx.float16 or tuple(table.shape) != expected:
            raise ValueError(f"{name} must be float16 of shape {expected}, got {table.dtype} {tuple(table.shape)}")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    backend = resolve_backend(backend)
    if backend == "reference":
        return affine_unpack_dequantize_reference(
            words, scales, zeros, code_bits, head_dim, group_size, dtype, per_channel
        )
    rows = as_rows(words)
    (x,) = _KERNEL(
        [rows, as_rows(scales), as_rows(zeros)],
        backend=backend,
        template=[("T", dtype), ("CODE_BITS", code_bits), ("GROUP_SIZE", group_size), ("PER_CHANNEL", per_channel)],
        grid=(head_dim, rows.shape[0], 1),
        threadgroup=(min(head_dim, 32), 8, 1),
        output_shapes=[(rows.shape[0], head_dim)],
        output_dtypes=[dtype],
    )
    return x.reshape(*words.shape[:-1], head_dim)
