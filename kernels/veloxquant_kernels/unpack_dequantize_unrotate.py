"""Unpack, dequantize and rotate back the codes of a TurboQuant cache; the caches decode in plain MLX."""

from __future__ import annotations

import mlx.core as mx

from veloxquant_kernels.kernel import FLOAT_DTYPES, Backend, Kernel, as_rows, resolve_backend
from veloxquant_kernels.rotate_quantize_pack import SIMDGROUPS
from veloxquant_kernels.rotation import check_signs, hadamard_order, unrotate
from veloxquant_kernels.unpack_codes import check_words, unpack_codes_reference

_KERNEL = Kernel(
    "unpack_dequantize_unrotate", ("words", "norms", "centroids", "signs"), ("x",), ("exact", "packing", "rotation")
)


def check_norms(norms: mx.array, words: mx.array, name: str = "norms") -> None:
    """Raise unless ``norms`` is fp16 with one value for each row of ``words``."""
    expected = (*words.shape[:-1], 1)
    if norms.dtype != mx.float16 or tuple(norms.shape) != expected:
        raise ValueError(f"{name} must be float16 of shape {expected}, got {norms.dtype} {tuple(norms.shape)}")


def check_centroids(centroids: mx.array, code_bits: int, name: str = "centroids") -> None:
    """Raise unless ``centroids`` is ``[2**code_bits]`` fp32."""
    expected = (1 << code_bits,)
    if centroids.dtype != mx.float32 or tuple(centroids.shape) != expected:
        raise ValueError(f"{name} must be float32 of shape {expected}, got {centroids.dtype} {tuple(centroids.shape)}")


def unpack_dequantize_unrotate_reference(
    words: mx.array, norms: mx.array, centroids: mx.array, signs: mx.array, code_bits: int, dtype: mx.Dtype
) -> mx.array:
    """The definition: centroids of the codes, rotated back, times the norm."""
    codes = unpack_codes_reference(words, code_bits, signs.size)
    return (unrotate(mx.take(centroids, codes), signs) * norms.astype(mx.float32)).astype(dtype)


def unpack_dequantize_unrotate(
    words: mx.array,
    norms: mx.array,
    centroids: mx.array,
    signs: mx.array,
    code_bits: int,
    dtype: mx.Dtype = mx.float16,
    *,
    backend: Backend | None = None,
) -> mx.array:
    """Decode what :func:`veloxquant_kernels.rotate_quantize_pack.rotate_quantize_pack` wrote.

    Args:
        words: ``[..., ceil(D * code_bits / 32)]`` uint32.
        norms: ``[..., 1]`` fp16.
        centroids: ``[2**code_bits]`` fp32.
        signs: ``[D]`` fp32 of ±1, the rotation's diagonal.
        code_bits: width of a code, 1..8.
        dtype: of the result: fp16, bf16 or fp32.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[..., D]`` of ``dtype``.

    Raises:
        ValueError: arrays whose shapes do not belong together, or an unsupported head_dim.
        TypeError: an element type other than the stated ones.
    """
    head_dim = signs.size
    check_signs(signs, head_dim)
    order = hadamard_order(head_dim)
    check_words(words, code_bits, head_dim)
    check_norms(norms, words)
    check_centroids(centroids, code_bits)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    backend = resolve_backend(backend)
    if backend == "reference":
        return unpack_dequantize_unrotate_reference(words, norms, centroids, signs, code_bits, dtype)
    rows = as_rows(words)
    n_groups = -(-rows.shape[0] // SIMDGROUPS)
    (x,) = _KERNEL(
        [rows, norms.reshape(-1), centroids, signs],
        backend=backend,
        template=[
            ("T", dtype),
            ("HEAD_DIM", head_dim),
            ("ORDER", order),
            ("CODE_BITS", code_bits),
            ("SIMDGROUPS", SIMDGROUPS),
        ],
        grid=(n_groups * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(rows.shape[0], head_dim)],
        output_dtypes=[dtype],
    )
    return x.reshape(*words.shape[:-1], head_dim)
