"""The randomised Hadamard rotation, in plain MLX and in the order of sums that the kernels use.

Sources: Sylvester 1867; Paley 1933, construction I; randomised transform: Ailon & Chazelle 2006.
"""

from __future__ import annotations

import functools
from typing import Final

import mlx.core as mx
import numpy as np

PALEY_ORDERS: Final = (12, 20)
MAX_HEAD_DIM: Final = 512
"""Eight rows of two fp32 buffers fill 32 KiB of threadgroup memory."""


def hadamard_order(head_dim: int) -> int:
    """The Paley factor of ``head_dim``: 1, 12 or 20.

    Raises:
        ValueError: a ``head_dim`` that is no power of two times 1, 12 or 20, or does not fit threadgroup memory.
    """
    if not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be in 2..{MAX_HEAD_DIM} to fit threadgroup memory, got {head_dim}")
    for order in (1, *PALEY_ORDERS):
        quotient, rest = divmod(head_dim, order)
        if not rest and quotient & (quotient - 1) == 0:
            return order
    raise ValueError(f"head_dim must be a power of two times 1, 12 or 20, got {head_dim}")


@functools.cache
def paley_matrix(order: int) -> mx.array:
    """Hadamard matrix of order ``q + 1`` for the prime ``q`` = 11 or 19, ``[order, order]`` fp32."""
    prime = order - 1
    squares = {i * i % prime for i in range(1, prime)}
    matrix = np.ones((order, order), np.float32)
    for row in range(1, order):
        for column in range(order):
            square = (row - column) % prime in squares
            matrix[row, column] = 1 if column == row or (column and square) else -1
    return mx.array(matrix)


def hadamard_transform(x: mx.array, *, transposed: bool = False) -> mx.array:
    """``x`` times the unscaled Hadamard matrix ``kron(Sylvester, Paley)``, as a column over the last axis, fp32.

    Butterflies from the shortest stride to the longest, then each Paley row summed from its first column.
    """
    head_dim = x.shape[-1]
    lead, order = x.shape[:-1], hadamard_order(head_dim)
    half_step = order
    while half_step < head_dim:
        pairs = x.reshape(*lead, -1, 2, half_step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = mx.stack([a + b, a - b], axis=-2).reshape(*lead, head_dim)
        half_step *= 2
    if order == 1:
        return x
    matrix = paley_matrix(order).T if transposed else paley_matrix(order)
    blocks = x.reshape(*lead, head_dim // order, order)
    total = mx.zeros_like(blocks)
    for column in range(order):
        total = total + blocks[..., column : column + 1] * matrix[:, column]
    return total.reshape(*lead, head_dim)


def inverse_root(head_dim: int) -> float:
    """``1 / sqrt(head_dim)`` rounded in fp32 twice, as the kernels do."""
    return float(np.float32(1) / np.sqrt(np.float32(head_dim)))


def check_signs(signs: mx.array, head_dim: int) -> None:
    """Raise unless ``signs`` is ``[head_dim]`` fp32."""
    if signs.dtype != mx.float32 or tuple(signs.shape) != (head_dim,):
        raise ValueError(f"signs must be float32 of shape ({head_dim},), got {signs.dtype} {tuple(signs.shape)}")


def rotate(x: mx.array, signs: mx.array) -> mx.array:
    """``H diag(signs) x / sqrt(D)`` over the last axis of ``[..., D]``, fp32."""
    return hadamard_transform(x.astype(mx.float32) * signs) * inverse_root(x.shape[-1])


def unrotate(y: mx.array, signs: mx.array) -> mx.array:
    """The inverse of :func:`rotate`: ``diag(signs) Hᵀ y / sqrt(D)``, fp32."""
    return hadamard_transform(y.astype(mx.float32), transposed=True) * inverse_root(y.shape[-1]) * signs
