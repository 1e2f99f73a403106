"""The seeded rotations of this package's quantizers: they spread a vector's energy evenly over its coordinates.

Source: QuaRot (2404.00456) and TurboQuant (2504.19874) section 3.1, where any rotation that makes coordinates near
Gaussian serves.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from veloxquant_kernels.rotation import Rotation, hadamard_matrix, hadamard_rotation, matmul_rows

__all__ = ["inverse_rotation_matrix", "matmul_rows", "rotation", "rotation_matrix"]


@functools.cache
def rotation(head_dim: int, seed: int) -> Rotation:
    """The rotation of rows of ``head_dim`` values that ``seed`` draws.

    Where a Hadamard matrix of order ``head_dim`` exists (powers of two times 1, 12 or 20: all of 48, 64, 80, 96, 128,
    256), the randomised Hadamard transform. Otherwise the Q of a seeded Gaussian matrix, Haar distributed.
    """
    rng = np.random.default_rng([seed, head_dim])
    if hadamard_matrix(head_dim) is not None:
        signs = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=head_dim)
        return hadamard_rotation(mx.array(signs))
    q, r = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
    inverse = (q * np.sign(np.diag(r))).T
    return Rotation(mx.array(np.ascontiguousarray(inverse, dtype=np.float32)))


def rotation_matrix(head_dim: int, seed: int) -> mx.array:
    """Orthogonal ``[head_dim, head_dim]`` fp32: ``x @ rotation_matrix(...)`` rotates rows."""
    return rotation(head_dim, seed).matrix


def inverse_rotation_matrix(head_dim: int, seed: int) -> mx.array:
    """The transpose of :func:`rotation_matrix`, which rotates rows back."""
    return rotation(head_dim, seed).inverse
