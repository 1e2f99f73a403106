"""Codebooks against published constants."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate

from veloxquant_mlx.quantizers.lloyd_max import Gaussian, SphereMarginal, lloyd_max

MAX_1960 = {2: 0.36338, 3: 0.19017, 4: 0.11748, 8: 0.03455, 16: 0.00950, 32: 0.00250}
"""Mean squared error of the optimal quantizer of N(0, 1) by number of levels (Max 1960, table I)."""

SPHERE_128 = {2: 0.36089, 4: 0.11600, 8: 0.03397, 16: 0.00931}
"""The same for a coordinate of a unit-RMS vector at head_dim 128."""

ROUNDING = 6e-6
"""The tables carry five decimals."""


@pytest.mark.parametrize(("levels", "expected"), MAX_1960.items())
def test_gaussian_distortion_is_max_1960(levels: int, expected: float) -> None:
    """The optimal N(0, 1) codebooks leave the errors of Max's table."""
    assert abs(lloyd_max(Gaussian(), levels).distortion - expected) < ROUNDING


@pytest.mark.parametrize(("levels", "expected"), SPHERE_128.items())
def test_sphere_distortion_at_head_dim_128(levels: int, expected: float) -> None:
    """After normalisation a finite dimension leaves slightly less than the Gaussian."""
    assert abs(lloyd_max(SphereMarginal(128), levels).distortion - expected) < ROUNDING


@pytest.mark.parametrize("levels", [2, 4, 16, 256])
@pytest.mark.parametrize("head_dim", [48, 64, 256])
def test_centroids_are_the_means_of_their_cells(head_dim: int, levels: int) -> None:
    """Each centroid is the conditional mean of its cell, by adaptive quadrature of the density."""
    source = SphereMarginal(head_dim)
    book = lloyd_max(source, levels)
    edges = np.concatenate([[-np.sqrt(head_dim)], book.boundaries, [np.sqrt(head_dim)]])
    for i in {0, levels // 2, levels - 1}:
        mass = integrate.quad(source.density, edges[i], edges[i + 1])[0]
        moment = integrate.quad(lambda x: x * source.density(x), edges[i], edges[i + 1])[0]
        assert book.centroids[i] == pytest.approx(moment / mass, abs=1e-6)


def test_sphere_density_has_unit_mass_and_variance() -> None:
    """The marginal's formulas integrate to 1 and to variance 1."""
    source = SphereMarginal(48)
    edge = np.sqrt(48)
    assert integrate.quad(source.density, -edge, edge)[0] == pytest.approx(1, abs=1e-8)
    assert integrate.quad(lambda x: x * x * source.density(x), -edge, edge)[0] == pytest.approx(1, abs=1e-8)


def test_one_level_is_refused() -> None:
    """A codebook needs two levels."""
    with pytest.raises(ValueError, match="at least 2, got 1"):
        lloyd_max(Gaussian(), 1)
