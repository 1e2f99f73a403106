"""Rotations preserve lengths and spread energy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_kernels.rotation import hadamard_matrix
from veloxquant_mlx.transforms.rotation import inverse_rotation_matrix, matmul_rows, rotation, rotation_matrix

HEAD_DIMS = (48, 64, 80, 96, 100, 128, 256)


@pytest.mark.parametrize("order", [1, 2, 12, 20, 48, 64, 80, 96, 128, 256])
def test_hadamard_rows_are_orthogonal(order: int) -> None:
    """H is ±1 and H Hᵀ = order · I exactly."""
    matrix = hadamard_matrix(order)
    assert matrix is not None
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


def test_powers_of_two_are_mlx_hadamard() -> None:
    """At a power of two the rotation is MLX's Hadamard transform of the signed vector."""
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    signs = np.array(rotation_matrix(64, 3))[:, 0] * 8  # the first Hadamard column is all ones
    expected = mx.hadamard_transform(mx.array(x * signs))
    np.testing.assert_allclose(np.array(matmul_rows(mx.array(x), rotation_matrix(64, 3))), expected, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_inverse_undoes_the_rotation(head_dim: int) -> None:
    """R R⁻¹ is the identity to fp32 rounding, also where no Hadamard matrix exists (100)."""
    product = rotation_matrix(head_dim, 0) @ inverse_rotation_matrix(head_dim, 0)
    np.testing.assert_allclose(np.array(product), np.eye(head_dim), atol=2e-6)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_single_channel_is_spread_over_all(head_dim: int) -> None:
    """A one-hot vector becomes coordinates of size at most 6/sqrt(d): exactly 1/sqrt(d) under Hadamard."""
    rotated = np.abs(np.array(rotation_matrix(head_dim, 0)))
    assert rotated.max() * np.sqrt(head_dim) < (6 if hadamard_matrix(head_dim) is None else 1 + 1e-6)


def test_seeds_give_different_rotations() -> None:
    """The seed decides the signs; the same seed gives the same matrix."""
    assert mx.array_equal(rotation_matrix(64, 1), rotation_matrix(64, 1))
    assert not mx.array_equal(rotation_matrix(64, 1), rotation_matrix(64, 2))


@pytest.mark.parametrize("head_dim", [120, 256])
def test_both_directions_hold_the_bytes_that_are_counted(head_dim: int) -> None:
    """Active memory grows by ``Rotation.arrays``, also where no Hadamard matrix exists (120)."""
    seed = 1234  # nobody else's: the tables are made here
    before = mx.get_active_memory()
    mx.eval(rotation_matrix(head_dim, seed), inverse_rotation_matrix(head_dim, seed))
    counted = sum(array.nbytes for array in rotation(head_dim, seed).arrays)
    page = 16 * 1024  # to which Metal's allocator rounds each of the two buffers
    assert 0 <= mx.get_active_memory() - before - counted < 2 * page
