"""Rotate, quantize and pack vectors into the codes of a TurboQuant cache; the caches encode in plain MLX."""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_float, check_not_empty, resolve_backend
from veloxquant_kernels.pack_codes import check_code_bits, pack_codes_reference, packed_words
from veloxquant_kernels.rotation import check_signs, hadamard_order, rotate

TINY_NORM: Final = 1e-12
"""Keeps the division defined for a zero vector, whose stored norm is zero anyway."""
SIMDGROUPS: Final = 4
"""Rows of a threadgroup."""

_KERNEL = Kernel("rotate_quantize_pack", ("x", "signs", "edges"), ("words", "norms"), ("exact", "packing", "rotation"))


def root_mean_square(x: mx.array) -> mx.array:
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


def rotate_quantize_pack_reference(
    x: mx.array, signs: mx.array, edges: mx.array, code_bits: int
) -> tuple[mx.array, mx.array]:
    """The definition: rotate ``x / rms``, count the edges below each value, pack."""
    norm = root_mean_square(x)
    unit = x.astype(mx.float32) * (1 / mx.maximum(norm, TINY_NORM))
    rotated = rotate(unit, signs)
    codes = mx.zeros(rotated.shape, mx.uint8)
    for i in range(edges.size):  # one edge at a time: a broadcast would hold 2**code_bits copies of x
        codes = codes + (rotated > edges[i])
    return pack_codes_reference(codes, code_bits), norm.astype(mx.float16)


def rotate_quantize_pack(
    x: mx.array, signs: mx.array, edges: mx.array, code_bits: int, *, backend: Backend | None = None
) -> tuple[mx.array, mx.array]:
    """Encode vectors as TurboQuant MSE does: rotation, RMS norm, nearest centroid, packed codes.

    Args:
        x: ``[..., D]`` fp16, bf16 or fp32; D a power of two times 1, 12 or 20, at most 512.
        signs: ``[D]`` fp32 of ±1, the rotation's diagonal.
        edges: ``[2**code_bits - 1]`` fp32, ascending: the midpoints between centroids of unit variance.
        code_bits: width of a code, 1..8.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        words ``[..., ceil(D * code_bits / 32)]`` uint32 and norms ``[..., 1]`` fp16.

    Raises:
        ValueError: a width, head_dim or table of the wrong size.
        TypeError: an element type other than the stated ones.

    Source: TurboQuant (arXiv 2504.19874), algorithm 1.
    """
    check_code_bits(code_bits)
    check_not_empty("x", x)
    check_float("x", x)
    head_dim = x.shape[-1]
    order = hadamard_order(head_dim)
    check_signs(signs, head_dim)
    n_edges = (1 << code_bits) - 1
    if edges.dtype != mx.float32 or tuple(edges.shape) != (n_edges,):
        raise ValueError(f"edges must be float32 of shape ({n_edges},), got {edges.dtype} {tuple(edges.shape)}")
    backend = resolve_backend(backend)
    if backend == "reference":
        return rotate_quantize_pack_reference(x, signs, edges, code_bits)
    rows = as_rows(x)
    n_rows, n_words = rows.shape[0], packed_words(head_dim, code_bits)
    n_groups = -(-n_rows // SIMDGROUPS)
    words, norms = _KERNEL(
        [rows, signs, edges],
        backend=backend,
        template=[("HEAD_DIM", head_dim), ("ORDER", order), ("CODE_BITS", code_bits), ("SIMDGROUPS", SIMDGROUPS)],
        grid=(n_groups * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(n_rows, n_words), (n_rows,)],
        output_dtypes=[mx.uint32, mx.float16],
    )
    return words.reshape(*x.shape[:-1], n_words), norms.reshape(*x.shape[:-1], 1)
