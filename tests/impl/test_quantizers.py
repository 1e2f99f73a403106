"""Every quantizer: distortion on Gaussian input against theory, cost, shapes, determinism."""

from __future__ import annotations

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gaussian

from veloxquant_mlx.packing import packed_words
from veloxquant_mlx.quantizers.base import Quantizer, quantizer_from_spec
from veloxquant_mlx.quantizers.lloyd_max import SphereMarginal, lloyd_max
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

HEAD_DIMS = (48, 64, 80, 96, 128, 256)
THEORY = 0.01
"""Agreement with theory that is asked for; the standard error of the samples below is at most a third of it."""

VALUES = {bits: 500_000 if bits <= 2 else 2_000_000 if bits <= 4 else 6_000_000 for bits in range(9)}
"""Sampled values: at high widths few values lie in the outer cells, which carry much of the error."""


def distortion(quantizer: Quantizer, x: np.ndarray) -> float:
    """Energy of the error over energy of the input."""
    decoded = quantizer.decode(quantizer.encode(mx.array(x)), mx.float32)
    return float(np.sum((np.array(decoded) - x) ** 2) / np.sum(x**2))


@pytest.mark.parametrize(
    ("code_bits", "head_dim"),
    [(bits, dim) for bits in range(1, 9) for dim in (HEAD_DIMS if bits <= 4 else (48, 128))],
)
def test_turboquant_mse_leaves_the_sphere_distortion(code_bits: int, head_dim: int) -> None:
    """On Gaussian vectors the relative error is the Lloyd–Max distortion of the sphere's marginal."""
    x = gaussian((1, 2, VALUES[code_bits] // head_dim // 2, head_dim), seed=code_bits)
    expected = lloyd_max(SphereMarginal(head_dim), 1 << code_bits).distortion
    assert distortion(TurboQuantMSE(code_bits), x) == pytest.approx(expected, rel=THEORY)


@pytest.mark.parametrize("code_bits", range(1, 9))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_turboquant_mse_costs_its_codes_and_a_norm(head_dim: int, code_bits: int) -> None:
    """The cost is the padded words plus 16 bits per vector; the encoded arrays have exactly that size."""
    quantizer = TurboQuantMSE(code_bits)
    expected = Fraction(32 * packed_words(head_dim, code_bits) + 16, head_dim)
    assert quantizer.bits_per_value(head_dim) == expected
    codes = quantizer.encode(mx.array(gaussian((2, 3, 5, head_dim))))
    assert Fraction(8 * sum(array.nbytes for array in codes.arrays), 2 * 3 * 5 * head_dim) == expected


def test_zero_vectors_decode_to_zero() -> None:
    """A zero vector has norm zero and comes back as zeros, not NaN."""
    quantizer = TurboQuantMSE(2)
    decoded = quantizer.decode(quantizer.encode(mx.zeros((1, 1, 3, 64))), mx.float32)
    assert mx.array_equal(decoded, mx.zeros((1, 1, 3, 64)))


def test_a_quantizer_survives_its_spec() -> None:
    """quantizer_from_spec(q.spec()) equals q."""
    quantizer = TurboQuantMSE(3, seed=7)
    assert quantizer_from_spec(quantizer.spec()) == quantizer
