"""Hadamard matrices of the orders that attention heads have.

Sources: Sylvester 1867 for powers of two; Paley 1933, construction I, for orders ``q + 1`` with a prime
``q = 3 (mod 4)``: here 12 and 20, so that 48, 80 and 96 are reached.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

_PALEY_PRIMES = (11, 19)


def _paley(prime: int) -> NDArray[np.float64]:
    squares = {i * i % prime for i in range(1, prime)}
    residue = np.array([0 if i == 0 else (1 if i in squares else -1) for i in range(prime)])
    jacobsthal = residue[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    skew = np.zeros((prime + 1, prime + 1))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
    return skew + np.eye(prime + 1)


@functools.cache
def hadamard_matrix(order: int) -> NDArray[np.float64] | None:
    """A ``[order, order]`` matrix of ±1 with orthogonal rows, or None where none is constructed here.

    Orders are ``m * 2**k`` with m in {1, 12, 20}: ``kron(Sylvester(2**k), H_m)``.
    """
    for base in (1, *(q + 1 for q in _PALEY_PRIMES)):
        quotient, rest = divmod(order, base)
        if rest == 0 and quotient > 0 and quotient & (quotient - 1) == 0:
            matrix = np.ones((1, 1)) if base == 1 else _paley(base - 1)
            while len(matrix) < order:
                matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
            return matrix
    return None
