"""TurboQuant's code of a vector: rotate, divide by the RMS norm, nearest centroids, packed; and back.

In plain MLX the rotation is a matrix product, in the kernels a chain of butterflies. Both round differently, which puts
fewer than 1 code in 10,000 on the other side of a boundary; ``_in_order`` is the kernels' arithmetic in plain MLX, for
comparisons bit for bit.

Source: TurboQuant (arXiv 2504.19874), algorithm 1.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from veloxquant_kernels.codebook import Codebook, boundaries_array, centroids_array, decode_words, nearest_codes
from veloxquant_kernels.kernel import FLOAT_DTYPES, Backend, Kernel, check_float, launches_on, no_rows
from veloxquant_kernels.packing import check_code_bits, check_words, pack_codes, packed_words, unpack_codes
from veloxquant_kernels.rotation import (
    Rotation,
    hadamard_order,
    rotate_in_order,
    unrotate_in_order,
)

TINY_RMS: Final = 1e-12
"""Keeps the division defined for a zero vector, whose stored norm is zero anyway."""

_ENCODE = Kernel("rotate_quantize_pack", ("x", "signs", "edges"), ("words", "norms"), ("exact", "packing", "rotation"))
_DECODE = Kernel(
    "unpack_dequantize_unrotate", ("words", "norms", "centroids", "signs"), ("x",), ("exact", "packing", "rotation")
)


def unit_rms(x: mx.array) -> tuple[mx.array, mx.array]:
    """Vectors divided by their root mean square, and that root mean square.

    Args:
        x: ``[..., D]``.

    Returns:
        ``[..., D]`` fp32 and ``[..., 1]`` fp32.
    """
    x = x.astype(mx.float32)
    rms = mx.sqrt(mx.mean(mx.square(x), axis=-1, keepdims=True))
    return x * (1 / mx.maximum(rms, TINY_RMS)), rms


def check_codebook(codebook: Codebook, code_bits: int) -> None:
    """Raise ValueError unless the codebook has ``2**code_bits`` levels."""
    levels = 1 << check_code_bits(code_bits)
    if codebook.centroids.shape != (levels,) or codebook.boundaries.shape != (levels - 1,):
        raise ValueError(
            f"codebook must have {levels} centroids and {levels - 1} boundaries, got {codebook.centroids.shape} and "
            f"{codebook.boundaries.shape}"
        )


def check_head_dim(name: str, head_dim: int, rotation: Rotation) -> None:
    """Raise ValueError unless ``rotation`` is one of rows of ``head_dim``."""
    if rotation.head_dim != head_dim:
        raise ValueError(f"rotation must be of {name}'s {head_dim} values a row, got one of {rotation.head_dim}")


def check_norms(norms: mx.array, words: mx.array, name: str = "norms") -> None:
    """Raise unless ``norms`` is fp16 with one value for each row of ``words``."""
    expected = (*words.shape[:-1], 1)
    if norms.dtype != mx.float16 or norms.shape != expected:
        raise ValueError(f"{name} must be float16 of shape {expected}, got {norms.dtype} {norms.shape}")


def check_result_dtype(dtype: mx.Dtype) -> None:
    """Raise TypeError unless ``dtype`` is one that decoding can give."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")


def rotate_quantize_pack(
    x: mx.array, rotation: Rotation, codebook: Codebook, code_bits: int, *, backend: Backend | None = None
) -> tuple[mx.array, mx.array]:
    """Encode vectors: rotation, RMS norm, nearest centroids, packed codes.

    Args:
        x: ``[..., D]`` fp16, bf16 or fp32.
        rotation: of rows of D values; the kernel serves Hadamard rotations of D at most 512.
        codebook: ``2**code_bits`` levels of a value of unit variance.
        code_bits: width of a code, 1..8.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        words ``[..., ceil(D * code_bits / 32)]`` uint32 and norms ``[..., 1]`` fp16.

    Raises:
        ValueError: a width, rotation or codebook of the wrong size, or a head_dim that a named backend does not serve.
        TypeError: an element type other than the stated ones.
    """
    check_codebook(codebook, code_bits)
    check_float("x", x)
    head_dim = x.shape[-1]
    check_head_dim("x", head_dim, rotation)
    if (where := launches_on(backend, no_rows("x", x), rotation.unserved)) is not None:
        assert rotation.signs is not None  # it is served
        words, norms = _ENCODE.per_row(
            x,
            [rotation.signs, boundaries_array(codebook)],
            [(packed_words(head_dim, code_bits), mx.uint32), (1, mx.float16)],
            backend=where,
            template=[("HEAD_DIM", head_dim), ("ORDER", hadamard_order(head_dim)), ("CODE_BITS", code_bits)],
        )
        return words, norms
    unit, rms = unit_rms(x)
    codes = nearest_codes(rotation.apply(unit), codebook)
    return pack_codes(codes, code_bits, backend=backend), rms.astype(mx.float16)


def unpack_dequantize_unrotate(
    words: mx.array,
    norms: mx.array,
    rotation: Rotation,
    codebook: Codebook,
    code_bits: int,
    dtype: mx.Dtype = mx.float16,
    *,
    backend: Backend | None = None,
) -> mx.array:
    """Decode what :func:`rotate_quantize_pack` wrote.

    Args:
        words: ``[..., ceil(D * code_bits / 32)]`` uint32.
        norms: ``[..., 1]`` fp16.
        rotation: of rows of D values; the kernel serves Hadamard rotations of D at most 512.
        codebook: ``2**code_bits`` levels.
        code_bits: width of a code, 1..8.
        dtype: of the result: fp16, bf16 or fp32.
        backend: see :func:`veloxquant_kernels.kernel.launches_on`.

    Returns:
        ``[..., D]`` of ``dtype``.

    Raises:
        ValueError: arrays whose shapes do not belong together, or a head_dim that a named backend does not serve.
        TypeError: an element type other than the stated ones.
    """
    head_dim = rotation.head_dim
    check_codebook(codebook, code_bits)
    check_words(words, code_bits, head_dim)
    check_norms(norms, words)
    check_result_dtype(dtype)
    if (where := launches_on(backend, no_rows("words", words), rotation.unserved)) is not None:
        assert rotation.signs is not None  # it is served
        (x,) = _DECODE.per_row(
            words,
            [norms.reshape(-1), centroids_array(codebook), rotation.signs],
            [(head_dim, dtype)],
            backend=where,
            template=[
                ("T", dtype),
                ("HEAD_DIM", head_dim),
                ("ORDER", hadamard_order(head_dim)),
                ("CODE_BITS", code_bits),
            ],
        )
        return x
    unit = unpack_unrotate(words, rotation, codebook, code_bits, backend=backend)
    return (unit * norms.astype(mx.float32)).astype(dtype)


def kernel_decodes(words: mx.array, rotation: Rotation) -> bool:
    """Whether :func:`unpack_dequantize_unrotate` launches its kernel for these rows, where no backend is named."""
    return launches_on(None, no_rows("words", words), rotation.unserved) is not None


def unpack_unrotate(
    words: mx.array, rotation: Rotation, codebook: Codebook, code_bits: int, *, backend: Backend | None = None
) -> mx.array:
    """Unit vectors ``[..., D]`` fp32 of packed codes, in plain MLX: centroids of the codes, rotated back."""
    return rotation.undo(decode_words(words, codebook, code_bits, rotation.head_dim, backend=backend))


# ---- the same in the kernels' order of sums, to compare with bit for bit -----------------------------------------


def root_mean_square_in_order(x: mx.array) -> mx.array:
    """RMS over the last axis, ``[..., 1]`` fp32, summed as a simdgroup does: 32 lanes, then a butterfly over them."""
    head_dim = x.shape[-1]
    squares = mx.square(x.astype(mx.float32))
    squares = mx.pad(squares, [(0, 0)] * (x.ndim - 1) + [(0, -head_dim % 32)])
    strides = squares.reshape(*x.shape[:-1], -1, 32)
    lanes = strides[..., 0, :]
    for i in range(1, strides.shape[-2]):
        lanes = lanes + strides[..., i, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return mx.sqrt(lanes / head_dim)


def encode_in_order(x: mx.array, signs: mx.array, edges: mx.array, code_bits: int) -> tuple[mx.array, mx.array]:
    """Words and norms of ``[..., D]``: rotate ``x / rms``, count the edges below each value, pack."""
    norm = root_mean_square_in_order(x)
    rotated = rotate_in_order(x.astype(mx.float32) * (1 / mx.maximum(norm, TINY_RMS)), signs)
    codes = mx.zeros(rotated.shape, mx.uint8)
    for i in range(edges.size):  # one edge at a time: a broadcast would hold 2**code_bits copies of x
        codes = codes + (rotated > edges[i])
    return pack_codes(codes, code_bits, backend="reference"), norm.astype(mx.float16)


def decode_in_order(
    words: mx.array, norms: mx.array, centroids: mx.array, signs: mx.array, code_bits: int, dtype: mx.Dtype
) -> mx.array:
    """``[..., D]`` of ``dtype``: centroids of the codes, rotated back, times the norm."""
    codes = unpack_codes(words, code_bits, signs.size, backend="reference")
    return (unrotate_in_order(mx.take(centroids, codes), signs) * norms.astype(mx.float32)).astype(dtype)
