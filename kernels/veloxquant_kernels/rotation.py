"""Rotations of rows: the randomised Hadamard transform, as a matrix, and in the order of sums that the kernels use.

Sources: Sylvester 1867 for powers of two; Paley 1933, construction I, for orders ``q + 1`` with a prime
``q = 3 (mod 4)``: here 12 and 20, so that 48, 80 and 96 are reached; randomised transform: Ailon & Chazelle 2006.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

PALEY_ORDERS: Final = (12, 20)
MAX_HEAD_DIM: Final = 512
"""Eight rows of two fp32 buffers fill 32 KiB of threadgroup memory."""


def _paley(order: int) -> NDArray[np.float64]:
    prime = order - 1
    squares = {i * i % prime for i in range(1, prime)}
    residue = np.array([0 if i == 0 else (1 if i in squares else -1) for i in range(prime)])
    jacobsthal = residue[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
    return skew + np.eye(order)


def _paley_factor(head_dim: int) -> int | None:
    """The order m in {1, 12, 20} of which ``head_dim`` is a multiple by a power of two."""
    for order in (1, *PALEY_ORDERS):
        quotient, rest = divmod(head_dim, order)
        if rest == 0 and quotient > 0 and quotient & (quotient - 1) == 0:
            return order
    return None


@functools.cache
def hadamard_matrix(order: int) -> NDArray[np.float64] | None:
    """A ``[order, order]`` matrix of ±1 with orthogonal rows, or None where none is constructed here.

    Orders are ``m * 2**k`` with m in {1, 12, 20}: ``kron(Sylvester(2**k), Paley(m))``.
    """
    factor = _paley_factor(order)
    if factor is None:
        return None
    matrix = np.ones((1, 1)) if factor == 1 else _paley(factor)
    while len(matrix) < order:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def hadamard_order(head_dim: int) -> int:
    """The Paley factor of a ``head_dim`` that the kernels rotate: 1, 12 or 20.

    Raises:
        ValueError: a ``head_dim`` that is no power of two times 1, 12 or 20, or does not fit threadgroup memory.
    """
    if not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be in 2..{MAX_HEAD_DIM} to fit threadgroup memory, got {head_dim}")
    order = _paley_factor(head_dim)
    if order is None:
        raise ValueError(f"head_dim must be a power of two times 1, 12 or 20, got {head_dim}")
    return order


def matmul_rows(x: mx.array, matrix: mx.array) -> mx.array:
    """``x @ matrix`` over the last axis as one two-dimensional product (one BLAS call), fp32."""
    flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return (flat @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation of rows of ``head_dim`` values.

    Attributes:
        inverse: orthogonal ``[head_dim, head_dim]`` fp32, row-major (twice as quick a product on CPU); rows are rotated
            back by ``y @ inverse``.
        signs: ``[head_dim]`` fp32 of ±1 where the rotation is ``H diag(signs) / sqrt(head_dim)``, which kernels know;
            else None.
    """

    inverse: mx.array
    signs: mx.array | None = None

    @property
    def head_dim(self) -> int:
        """Values of a row."""
        return self.inverse.shape[0]

    @functools.cached_property
    def matrix(self) -> mx.array:
        """The transpose of :attr:`inverse`, a view: both directions share one buffer; evaluated, for all threads."""
        matrix = self.inverse.T
        mx.eval(matrix)
        return matrix

    @functools.cached_property
    def unserved(self) -> str | None:
        """Why no kernel knows this rotation, or None if kernels do."""
        if self.signs is None:
            return "kernels rotate by the randomised Hadamard transform alone, which this rotation is not"
        try:
            hadamard_order(self.head_dim)
        except ValueError as error:
            return str(error)
        return None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Everything that stays in memory for it and its inverse: what a method counts as static bytes."""
        return (self.inverse,) if self.signs is None else (self.signs, self.inverse)

    def apply(self, x: mx.array) -> mx.array:
        """Rotate the rows of ``[..., head_dim]`` by a product of matrices, fp32."""
        return matmul_rows(x, self.matrix)

    def undo(self, y: mx.array) -> mx.array:
        """Rotate back."""
        return matmul_rows(y, self.inverse)


def hadamard_rotation(signs: mx.array) -> Rotation:
    """``x -> H diag(signs) x / sqrt(head_dim)`` for ±1 ``signs``, ``[head_dim]`` fp32.

    Raises:
        ValueError: no Hadamard matrix of this order is constructed here.
    """
    head_dim = signs.size
    check_signs(signs, head_dim)
    hadamard = hadamard_matrix(head_dim)
    if hadamard is None:
        raise ValueError(f"head_dim must be a power of two times 1, 12 or 20, got {head_dim}")
    inverse = hadamard * np.array(signs) / np.sqrt(head_dim)
    return Rotation(mx.array(np.ascontiguousarray(inverse, dtype=np.float32)), signs)


def check_signs(signs: mx.array, head_dim: int) -> None:
    """Raise unless ``signs`` is ``[head_dim]`` fp32."""
    if signs.dtype != mx.float32 or tuple(signs.shape) != (head_dim,):
        raise ValueError(f"signs must be float32 of shape ({head_dim},), got {signs.dtype} {tuple(signs.shape)}")


# ---- the same in the kernels' order of sums, to compare with bit for bit -----------------------------------------


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
    paley = mx.array(_paley(order).astype(np.float32))
    matrix = paley.T if transposed else paley
    blocks = x.reshape(*lead, head_dim // order, order)
    total = mx.zeros_like(blocks)
    for column in range(order):
        total = total + blocks[..., column : column + 1] * matrix[:, column]
    return total.reshape(*lead, head_dim)


def inverse_root(head_dim: int) -> float:
    """``1 / sqrt(head_dim)`` rounded in fp32 twice, as the kernels do."""
    return float(np.float32(1) / np.sqrt(np.float32(head_dim)))


def rotate_in_order(x: mx.array, signs: mx.array) -> mx.array:
    """``H diag(signs) x / sqrt(D)`` over the last axis of ``[..., D]``, fp32."""
    return hadamard_transform(x.astype(mx.float32) * signs) * inverse_root(x.shape[-1])


def unrotate_in_order(y: mx.array, signs: mx.array) -> mx.array:
    """The inverse of :func:`rotate_in_order`: ``diag(signs) Hᵀ y / sqrt(D)``, fp32."""
    return hadamard_transform(y.astype(mx.float32), transposed=True) * inverse_root(y.shape[-1]) * signs
