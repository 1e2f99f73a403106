"""Optimal scalar codebooks (Lloyd–Max) computed to convergence, not typed in.

Sources: Lloyd 1982, Max 1960. A coordinate of a vector that is uniform on the sphere of radius sqrt(d) has
density proportional to ``(1 - x²/d)**((d - 3)/2)``, which tends to N(0, 1) (TurboQuant 2504.19874, section 3.1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, special

from veloxquant_kernels.codebook import Codebook as Codebook

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SphereMarginal:
    """One coordinate of a uniform point on the sphere of radius sqrt(head_dim): variance 1."""

    head_dim: int

    def density(self, x: Array) -> Array:
        """Density at ``x``; zero outside ``±sqrt(head_dim)``."""
        d = self.head_dim
        inside = np.clip(1 - x * x / d, 0, None)
        log_norm = special.gammaln(d / 2) - special.gammaln((d - 1) / 2) - 0.5 * np.log(d * np.pi)
        return np.asarray(np.exp(log_norm) * inside ** ((d - 3) / 2))

    def below(self, x: Array) -> Array:
        """Probability below ``x``."""
        d = self.head_dim
        position = np.clip((1 + x / np.sqrt(d)) / 2, 0, 1)
        return np.asarray(special.betainc((d - 1) / 2, (d - 1) / 2, position))

    def mean_below(self, x: Array) -> Array:
        """Integral of ``t * density(t)`` from the lower end to ``x``."""
        d = self.head_dim
        inside = np.clip(1 - x * x / d, 0, None)
        return np.asarray(-d / (d - 1) * self.density(np.zeros(1)) * inside ** ((d - 1) / 2))

    def quantile(self, p: Array) -> Array:
        """Inverse of :meth:`below`."""
        d = self.head_dim
        return np.asarray((2 * special.betaincinv((d - 1) / 2, (d - 1) / 2, p) - 1) * np.sqrt(d))


@dataclass(frozen=True)
class Gaussian:
    """N(0, 1)."""

    def density(self, x: Array) -> Array:
        """Density at ``x``."""
        return np.asarray(np.exp(-x * x / 2) / np.sqrt(2 * np.pi))

    def below(self, x: Array) -> Array:
        """Probability below ``x``."""
        return np.asarray(special.ndtr(x))

    def mean_below(self, x: Array) -> Array:
        """Integral of ``t * density(t)`` up to ``x``."""
        return -self.density(x)

    def quantile(self, p: Array) -> Array:
        """Inverse of :meth:`below`."""
        return np.asarray(special.ndtri(p))


@functools.cache
def lloyd_max(source: Gaussian | SphereMarginal, levels: int) -> Codebook:
    """The ``levels`` centroids of least mean squared error for a unit-variance symmetric source.

    Starts at the companded quantiles (density**(1/3), Panter & Dite 1951), takes Lloyd steps, then Newton steps on
    the tridiagonal system of the stationarity condition until nothing moves.

    Raises:
        ValueError: fewer than two levels, or no convergence.
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    probabilities = (np.arange(levels) + 0.5) / levels
    centroids = source.quantile(special.ndtr(special.ndtri(probabilities) * np.sqrt(3)))
    for step in range(200):
        middle = (centroids[1:] + centroids[:-1]) / 2
        mass = np.diff(source.below(middle), prepend=0.0, append=1.0)
        moment = np.diff(source.mean_below(middle), prepend=0.0, append=0.0)
        if step < 20:
            centroids = moment / mass
            continue
        slope = source.density(middle) * np.diff(centroids) / 4
        bands = np.zeros((3, levels))
        bands[1] = mass
        bands[1, :-1] -= slope
        bands[1, 1:] -= slope
        bands[0, 1:] = bands[2, :-1] = -slope
        move = linalg.solve_banded((1, 1), bands, moment - centroids * mass)
        if np.any(np.diff(centroids + move) <= 0):
            centroids = moment / mass
            continue
        centroids = centroids + move
        if np.max(np.abs(move)) < 1e-7:  # Newton: the next step would be its square
            break
    else:
        raise ValueError(f"Lloyd–Max with {levels} levels did not converge for {source}")
    centroids = (centroids - centroids[::-1]) / 2  # the source is symmetric; remove rounding
    middle = (centroids[1:] + centroids[:-1]) / 2
    mass = np.diff(source.below(middle), prepend=0.0, append=1.0)
    moment = np.diff(source.mean_below(middle), prepend=0.0, append=0.0)
    distortion = 1 - 2 * float(centroids @ moment) + float(centroids**2 @ mass)
    return Codebook(centroids, middle, distortion)


SMALLEST_SPHERE: Final = 8
"""head_dim below which the Gaussian codebook is used: the sphere's density then has edges, not tails."""


@functools.cache
def sphere_codebook(head_dim: int, levels: int) -> Codebook:
    """Lloyd–Max codebook of a coordinate of a rotated unit-RMS vector."""
    return lloyd_max(SphereMarginal(head_dim) if head_dim >= SMALLEST_SPHERE else Gaussian(), levels)


def gaussian_codebook(levels: int) -> Codebook:
    """Lloyd–Max codebook of N(0, 1)."""
    return lloyd_max(Gaussian(), levels)


@functools.cache
def sign_codebook() -> Codebook:
    """The two levels -1 and 1."""
    return Codebook(np.array([-1.0, 1.0]), np.zeros(1), 0.0)
