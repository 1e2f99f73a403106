"""Seeded rotations that spread a vector's energy evenly over its coordinates.

Source: randomised Hadamard transform, Ailon & Chazelle 2006; its use for KV caches: QuaRot (2404.00456),
TurboQuant (2504.19874) section 3.1, where any rotation that makes coordinates near Gaussian serves.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from veloxquant_mlx.transforms.hadamard import hadamard_matrix


@functools.cache
def rotation_signs(head_dim: int, seed: int) -> mx.array:
    """The ±1 diagonal of the randomised transform, ``[head_dim]`` fp32, drawn from ``(seed, head_dim)``."""
    rng = np.random.default_rng([seed, head_dim])
    return mx.array(rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=head_dim))


@functools.cache
def rotation_matrix(head_dim: int, seed: int) -> mx.array:
    """Orthogonal ``[head_dim, head_dim]`` fp32; ``x @ rotation_matrix(...)`` rotates rows.

    Where a Hadamard matrix of order ``head_dim`` exists here (powers of two times 1, 12 or 20: all of
    48, 64, 80, 96, 128, 256), it is ``diag(signs) @ H.T / sqrt(head_dim)``. Otherwise it is the Q of a seeded Gaussian
    matrix, Haar distributed.
    """
    return inverse_rotation_matrix(head_dim, seed).T  # a view: both directions share one buffer


@functools.cache
def inverse_rotation_matrix(head_dim: int, seed: int) -> mx.array:
    """The transpose of :func:`rotation_matrix`, row-major (twice as quick a product on CPU)."""
    hadamard = hadamard_matrix(head_dim)
    if hadamard is not None:
        rotation = np.array(rotation_signs(head_dim, seed))[:, None] * hadamard.T / np.sqrt(head_dim)
    else:
        rng = np.random.default_rng([seed, head_dim])
        q, r = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
        rotation = q * np.sign(np.diag(r))
    return mx.array(np.ascontiguousarray(rotation.T, dtype=np.float32))


def rotation_arrays(head_dim: int, seed: int) -> tuple[mx.array, ...]:
    """Everything that stays in memory for a rotation and its inverse: what a method counts as static bytes."""
    return rotation_signs(head_dim, seed), inverse_rotation_matrix(head_dim, seed)


def matmul_rows(x: mx.array, matrix: mx.array) -> mx.array:
    """``x @ matrix`` over the last axis as one two-dimensional product (one BLAS call), fp32."""
    flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return (flat @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])
