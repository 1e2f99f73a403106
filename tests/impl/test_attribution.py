"""What heads contribute to the divergence of a coarse cache, and the curves corrected by it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_ratequant_sensitivity import ByteTokenizer, calibrate, tiny_llama

from veloxquant_mlx.allocators.attribution import (
    LEAST_CORRECTION,
    ErrorCache,
    divergence_from_errors,
    head_contributions,
    refine_distortion_curve,
)
from veloxquant_mlx.allocators.curves import DistortionCurves, fit_distortion_curve
from veloxquant_mlx.allocators.sensitivity import bundled_texts, calibration_sequences
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic

KINDS = ("keys", "values")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def curves(model) -> DistortionCurves:
    return fit_distortion_curve(calibrate(model), sinks=1)


@pytest.fixture(scope="module")
def sequences():
    return calibration_sequences(ByteTokenizer(), bundled_texts(), num_samples=6, seq_len=24)


def everywhere(bits):
    return {(layer, kind): (bits, bits) for layer in range(3) for kind in KINDS}


def divergence(model, tokens, bits, scales):
    """Nats per token with every head's error scaled."""
    logits = model(mx.array(tokens))
    reference = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    quantizer = TurboQuantMSE(bits)
    caches = {layer: ErrorCache(quantizer, quantizer, 1, mx.array(scales[layer])) for layer in range(3)}
    return divergence_from_errors(model, mx.array(tokens), reference, caches).item() / tokens.size


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_contribution_is_half_the_slope_of_the_divergence(model, curves, sequences, kind, head):
    """Half a central difference in s: of the last layer, because the codes of later layers would move with s."""
    found, _ = head_contributions(model, sequences, curves, everywhere(2), TurboQuantMSE, quiet=True)
    h = 0.05
    sides = []
    for step in (h, -h):
        scales = np.ones((3, 2, 2), dtype=np.float32)
        scales[2, kind, head] += step
        sides.append(divergence(model, sequences, 2, scales))
    difference = 0.5 * (sides[0] - sides[1]) / (2 * h)
    # truncation h^2 of the third derivative, and fp32 sums of 144 tokens
    assert found[2, KINDS[kind]][head] == pytest.approx(difference, rel=0.02, abs=2e-5)


def test_contributions_add_up_to_the_divergence_where_it_is_quadratic(model, curves, sequences):
    """At 5 bits errors are small: the heads' shares sum to the divergence, which the caches really have."""
    found, total = head_contributions(model, sequences, curves, everywhere(5), TurboQuantMSE, quiet=True)
    assert sum(share.sum() for share in found.values()) == pytest.approx(total, rel=0.05)
    assert total == pytest.approx(divergence(model, sequences, 5, np.ones((3, 2, 2), dtype=np.float32)), rel=1e-3)


def test_without_errors_nothing_is_contributed(model, sequences):
    """Scales of zero are the fp16 cache: no divergence but rounding."""
    assert abs(divergence(model, sequences, 1, np.zeros((3, 2, 2), dtype=np.float32))) < 1e-6


def test_refined_curves_forecast_what_was_measured(model, curves, sequences):
    """At the measured width a head's loss is its contribution, and ratios between widths stay as they were."""
    refined = refine_distortion_curve(model, ByteTokenizer(), curves, 2, num_samples=6, quiet=True)
    found, _ = head_contributions(model, sequences, curves, everywhere(2), TurboQuantMSE, quiet=True)
    column = curves.widths.index(2)
    for before, after in zip(curves.curves, refined.curves, strict=True):
        measured = found[before.layer, before.kind][before.head]
        expected = max(measured, LEAST_CORRECTION * before.losses[column])
        assert after.losses[column] == pytest.approx(expected, rel=1e-3)
        np.testing.assert_allclose(
            np.array(after.losses) / after.losses[column], np.array(before.losses) / before.losses[column], rtol=1e-6
        )
        assert after.distortions == before.distortions


def test_half_trust_is_the_geometric_mean(model, curves):
    """Losses at trust 0.5 are the geometric mean of the forecast's and the fully corrected ones; 0 changes nothing."""
    options = {"num_samples": 2, "quiet": True}
    full = refine_distortion_curve(model, ByteTokenizer(), curves, 2, **options)
    half = refine_distortion_curve(model, ByteTokenizer(), curves, 2, trust=0.5, **options)
    for before, after, middle in zip(curves.curves, full.curves, half.curves, strict=True):
        np.testing.assert_allclose(middle.losses, np.sqrt(np.array(before.losses) * after.losses), rtol=1e-3)
    assert refine_distortion_curve(model, ByteTokenizer(), curves, 2, trust=0.0, **options) == curves
    with pytest.raises(ValueError, match=r"trust=1.5 must lie in 0\.\.1"):
        refine_distortion_curve(model, ByteTokenizer(), curves, 2, trust=1.5)


def test_curves_are_refined_with_the_quantizer_they_were_measured_with(model):
    """Another's contributions would correct the wrong losses: both are named, the default one too."""
    curves = fit_distortion_curve(calibrate(model), TurboQuantStatic, widths=[2, 3])
    with pytest.raises(ValueError, match=r"quantizer is 'turboquant_mse', but the curves .* 'turboquant_static'"):
        refine_distortion_curve(model, ByteTokenizer(), curves, 2, quiet=True)


def test_each_side_is_measured_with_its_own_quantizer(model, sequences):
    """Keys in one bit and values in eight: the keys contribute nearly all, and the other way round."""
    curves = fit_distortion_curve(calibrate(model), widths=[2, 3])
    for loud, still in (KINDS, KINDS[::-1]):
        factories = {loud: lambda _: TurboQuantMSE(1), still: lambda _: TurboQuantMSE(8)}
        found, _ = head_contributions(model, sequences, curves, everywhere(2), factories, quiet=True)
        total = {kind: sum(abs(found[layer, kind]).sum() for layer in range(3)) for kind in KINDS}
        assert total[loud] > 10 * total[still]


def test_an_allocation_says_where_to_measure(model, curves):
    """Layers, sides and heads are understood; equal widths by any names give equal curves."""
    one = refine_distortion_curve(model, ByteTokenizer(), curves, 3, num_samples=2, quiet=True)
    mixed = {"layer_0": 3, "layer_1.keys": 3, "layer_1.values": 3}
    mixed |= {f"layer_2.{kind}.head_{head}": 3 for kind in KINDS for head in range(2)}
    assert refine_distortion_curve(model, ByteTokenizer(), curves, mixed, num_samples=2, quiet=True) == one


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"layer_0": 2}, r"names none of layer_1\.keys\.head_0, layer_1\.keys, layer_1"),
        (0, r"width 0 of layer_0\.keys\.head_0 was not measured"),
    ],
)
def test_a_head_without_a_measured_width_is_named(model, curves, widths, message):
    """Nothing is guessed for it."""
    with pytest.raises(ValueError, match=message):
        refine_distortion_curve(model, ByteTokenizer(), curves, widths, num_samples=2, quiet=True)
