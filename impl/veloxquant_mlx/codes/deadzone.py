"""A uniform code with a dead zone: integers of coefficients, and what the integers stand for.

``q = sign(y) ⌊|y|/Δ + 1 − z⌋`` with z = .6: a coefficient below .6 steps becomes zero, larger ones are cut at every
step from there. An integer stands for the centroid of its bin, as calibration coefficients fill it (Sullivan 1996).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]
Symbols = NDArray[np.int32]

DEAD_ZONE: Final = 0.6
"""A coefficient below this part of a step is sent to zero; larger ones are cut at every step from there."""
CENTROIDS: Final = 16
"""Bins on each side of zero with a centroid of their own; the last one's place within its bin serves all behind."""
LEAST_COUNT: Final = 50
"""Coefficients that a bin must hold for a centroid of its own."""


@dataclass(frozen=True, eq=False)
class DeadZone:
    """The code at one step.

    Attributes:
        step: Δ, above 0.
        magnitudes: ``[CENTROIDS + 1]`` fp32, what 0, 1, 2, … stand for, in steps.
    """

    step: float
    magnitudes: mx.array

    def __post_init__(self) -> None:
        if not (np.isfinite(self.step) and self.step > 0):
            raise ValueError(f"step must be finite and above 0, got {self.step!r}")
        if self.magnitudes.ndim != 1 or self.magnitudes.size < 2:
            raise ValueError(f"magnitudes must be one row of two or more, got {self.magnitudes.shape}")

    @classmethod
    def fit(cls, y: Singles, step: float) -> DeadZone:
        """With the centroids of coefficients ``y`` of any shape."""
        scaled = np.abs(np.asarray(y, dtype=np.float32)).ravel() / np.float32(step)
        bins = np.floor(scaled + np.float32(1 - DEAD_ZONE)).astype(np.int64)
        inside = bins <= CENTROIDS
        counts = np.bincount(bins[inside], minlength=CENTROIDS + 1)
        sums = np.bincount(bins[inside], weights=scaled[inside], minlength=CENTROIDS + 1)
        places = np.arange(CENTROIDS + 1)
        middle = places + (DEAD_ZONE - 0.5)
        magnitudes = np.where(counts >= LEAST_COUNT, sums / np.maximum(counts, 1), middle)
        magnitudes[0] = 0
        return cls(step, mx.array(magnitudes.astype(np.float32)))

    def quantize(self, y: Singles) -> Symbols:
        """Integers of coefficients."""
        scaled = np.abs(y) / np.float32(self.step)
        bins = np.minimum(np.floor(scaled + np.float32(1 - DEAD_ZONE)), 2.0**31 - 256)
        return np.asarray(np.copysign(bins, y).astype(np.int32))

    def values(self, symbols: Symbols) -> Singles:
        """What integers stand for."""
        magnitudes = np.array(self.magnitudes, copy=False)
        last = len(magnitudes) - 1
        bins = np.abs(symbols)
        near = magnitudes[np.minimum(bins, last)] * np.float32(self.step)
        if bins.size and int(bins.max()) > last:
            near = near + np.maximum(bins - last, 0).astype(np.float32) * np.float32(self.step)
        return np.asarray(np.copysign(near, symbols), dtype=np.float32)
