"""Measured distortion curves and the allocations made from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx.allocators.curves import exponential_fit
from veloxquant_mlx.allocators.ratequant import (
    BitAllocation,
    DistortionCurves,
    Sensitivities,
    allocate_bits_continuous,
    allocate_bits_ratequant,
    fit_distortion_curve,
    shuffled,
)
from veloxquant_mlx.allocators.sensitivity import HeadSensitivities, Provenance
from veloxquant_mlx.cache.base import KVCacheConfig, PackedKVCache
from veloxquant_mlx.methods import make_options
from veloxquant_mlx.quantizers.affine import Affine
from veloxquant_mlx.quantizers.kivi import PerChannelAffine
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic

HEAD_DIM = 128

SPHERE_DISTORTION = {1: 0.36089, 2: 0.11600, 3: 0.03397, 4: 0.00931}
"""Lloyd-Max distortion of one coordinate of a uniform vector on the 128-sphere, by numeric integration."""


def directions(rng, shape):
    """Random unit vectors."""
    g = rng.standard_normal(shape)
    return g / np.linalg.norm(g, axis=-1, keepdims=True)


def sensitivities_of(weights, sigmas, *, head_dim=HEAD_DIM, tokens=256, seed=0):
    """Gaussian keys and values of known variance; ``weights`` and ``sigmas`` are ``[layers][kind][heads]``."""
    rng = np.random.default_rng(seed)
    heads = []
    for layer, (weight, sigma) in enumerate(zip(weights, sigmas, strict=True)):
        for kind, w, s in zip(("keys", "values"), weight, sigma, strict=True):
            x = rng.standard_normal((2, len(w), tokens, head_dim)) * np.array(s)[:, None, None]
            heads.append(
                HeadSensitivities(
                    layer,
                    kind,
                    np.broadcast_to(np.array(w, dtype=float)[:, None], x.shape[:3]),
                    mx.array(x.astype(np.float16)),
                    mx.array(directions(rng, x.shape) * np.sqrt(w)[:, None, None]).astype(mx.bfloat16),
                )
            )
    return Sensitivities(tuple(heads), Provenance("m", "t", 2, tokens, "llama", len(weights)))


def random_sensitivities(layers=6, heads=2, seed=0):
    rng = np.random.default_rng(seed)
    shape = (layers, 2, heads)
    return sensitivities_of(np.exp(rng.normal(0, 2, shape)), np.exp(rng.normal(0, 0.5, shape)), tokens=64, seed=seed)


@pytest.fixture(scope="module")
def curves():
    return fit_distortion_curve(random_sensitivities())


def test_gaussian_keys_give_the_lloyd_max_distortion_times_their_variance():
    """Measured D(b) on N(0, sigma^2) is sigma^2 times the codebook's own distortion, within 1%."""
    given = sensitivities_of([[[1.0], [1.0]]], [[[1.0], [3.0]]], tokens=4096)
    curves = fit_distortion_curve(given, widths=[1, 2, 3, 4])
    for curve, variance in zip(curves.curves, (1.0, 9.0), strict=True):
        expected = [variance * SPHERE_DISTORTION[b] for b in curves.widths]
        np.testing.assert_allclose(curve.distortions, expected, rtol=0.01)
        assert curve.variance == pytest.approx(variance, rel=0.01)


def test_variance_is_taken_around_the_heads_mean():
    """A constant offset changes the energy, not D(0)."""
    base = sensitivities_of([[[1.0], [1.0]]], [[[1.0], [1.0]]])
    moved = replace(base, heads=tuple(replace(h, vectors=h.vectors + 5.0) for h in base.heads))
    for a, b in zip(fit_distortion_curve(base).curves, fit_distortion_curve(moved).curves, strict=True):
        assert b.variance == pytest.approx(a.variance, rel=1e-2)
        assert b.distortions[0] > 10 * a.distortions[0]


def test_costs_are_the_quantizers_own():
    """TurboQuant MSE at head_dim 128: b + 16/128 bits."""
    curves = fit_distortion_curve(random_sensitivities(1, 1), widths=[1, 2, 4])
    assert curves.costs == {128: (Fraction(9, 8), Fraction(17, 8), Fraction(33, 8))}
    assert curves.quantizer == "turboquant_mse"


def test_keys_and_values_may_have_quantizers_of_their_own(tmp_path):
    """KIVI at head_dim 80 in groups of 32: keys cost b + 1, values b + 3 * 32/80; each side has its own error."""
    given = sensitivities_of([[[1.0], [1.0]]], [[[1.0], [1.0]]], head_dim=80, tokens=64)
    curves = fit_distortion_curve(given, make_options("kivi", {}).factories(), widths=[2, 4])
    assert curves.quantizer == "kivi_keys/affine"
    costs = [curves.cost(curve, 0) for curve in curves.curves]
    assert costs == [3, 2 + Fraction(6, 5)]
    alone = [fit_distortion_curve(given, code, widths=[2, 4]) for code in (PerChannelAffine, Affine)]
    assert [curve.distortions for curve in curves.curves] == [one.curves[i].distortions for i, one in enumerate(alone)]
    curves.save(tmp_path / "curves.json")
    assert DistortionCurves.load(tmp_path / "curves.json") == curves
    result = allocate_bits_ratequant(curves, 4.1, 2, unit="head")
    assert result.quantizer == "kivi_keys/affine"
    assert sorted(result.values()) == [2, 4]
    assert all(shuffled(result, seed).bits_per_value == result.bits_per_value for seed in range(9))
    assert all(dict(shuffled(result, seed)) == dict(result) for seed in range(9))  # one head on each side
    with pytest.raises(ValueError, match="quantizer must map keys and values, got 'keys'"):
        fit_distortion_curve(given, {"keys": Affine})


def test_exponential_fit_recovers_its_own_parameters():
    """D = 0.7 * 3.6^-b is fitted without error."""
    fit = exponential_fit([1, 2, 3, 4], [0.7 * 3.6**-b for b in (1, 2, 3, 4)])
    assert fit.alpha == pytest.approx(0.7, rel=1e-12)
    assert fit.beta == pytest.approx(3.6, rel=1e-12)
    assert fit.log_rmse < 1e-12


def test_exponential_fit_reports_how_far_off_it_is():
    """Residuals of ln D of +-0.1 alternating about a line leave the rmse of least squares, 0.0894."""
    bits = [1, 2, 3, 4]
    fit = exponential_fit(bits, [np.exp(-b + 0.1 * (-1) ** b) for b in bits])
    slope, intercept = np.polyfit(bits, [-b + 0.1 * (-1) ** b for b in bits], 1)
    residual = [-b + 0.1 * (-1) ** b - (slope * b + intercept) for b in bits]
    assert fit.log_rmse == pytest.approx(np.sqrt(np.mean(np.square(residual))), rel=1e-9)
    assert fit.log_rmse == pytest.approx(0.0894, abs=1e-4)


def test_the_fit_overshoots_the_signal_where_the_table_does_not():
    """The fit over 1-8 bits predicts more than the variance at zero bits; the measured table never does."""
    curve = fit_distortion_curve(sensitivities_of([[[1.0], [1.0]]], [[[1.0], [1.0]]])).curves[0]
    assert curve.fit.alpha > 1.2 * curve.variance
    assert max(curve.distortions) < curve.variance


def test_curves_survive_saving(curves, tmp_path):
    curves.save(tmp_path / "curves.json")
    assert DistortionCurves.load(tmp_path / "curves.json") == curves


def test_curves_follow_the_vectors():
    """Doubling every key quadruples every distortion of keys and leaves the values'."""
    base = random_sensitivities(2)
    louder = replace(
        base,
        heads=tuple(replace(h, vectors=2 * h.vectors) if h.kind == "keys" else h for h in base.heads),
    )
    before, after = fit_distortion_curve(base, widths=[1, 4]), fit_distortion_curve(louder, widths=[1, 4])
    for a, b in zip(before.curves, after.curves, strict=True):
        ratio = 4.0 if a.kind == "keys" else 1.0
        np.testing.assert_allclose(b.distortions, np.array(a.distortions) * ratio, rtol=2e-3)


def sink_sensitivities():
    """One head of 64 tokens: the first has a gradient 10^4 times the others' and a vector of length zero."""
    base = sensitivities_of([[[1.0], [1.0]]], [[[1.0], [1.0]]], tokens=64)
    heads = []
    for head in base.heads:
        squares = np.ones_like(head.squared_gradients)
        squares[:, :, 0] = 1e4
        vectors = np.array(head.vectors)
        vectors[:, :, 0] = 0
        heads.append(replace(head, squared_gradients=squares, vectors=mx.array(vectors)))
    return replace(base, heads=tuple(heads))


def test_token_weighting_pairs_each_gradient_with_its_own_error():
    """A sensitive token that is stored without error costs nothing: loss = 1/2 * 63/64 * mse of the others."""
    for curve in fit_distortion_curve(sink_sensitivities(), widths=[1, 2], weighting="token").curves:
        others = np.array(curve.distortions) * 64 / 63
        np.testing.assert_allclose(curve.losses, 0.5 * others * 63 / 64, rtol=1e-5)  # sums in fp32


def test_product_weighting_is_the_papers_and_overrates_sinks():
    """w * D / 2 with w = (10^4 + 63)/64: 157 times what the tokens with errors can cost."""
    for curve in fit_distortion_curve(sink_sensitivities(), widths=[1, 2], weighting="product").curves:
        assert curve.weight == pytest.approx((1e4 + 63) / 64)
        np.testing.assert_allclose(curve.losses, 0.5 * curve.weight * np.array(curve.distortions), rtol=1e-12)


def aligned_sensitivities(alpha=0.01, sigma=2.0, tokens=256):
    """One head whose gradient is alpha times its own vector, at every token."""
    base = sensitivities_of([[[1.0], [1.0]]], [[[sigma], [sigma]]], tokens=tokens)
    heads = []
    for head in base.heads:
        gradients = alpha * np.array(head.vectors, dtype=np.float64)
        squares = (gradients**2).sum(axis=-1)
        heads.append(replace(head, squared_gradients=squares, gradients=mx.array(gradients).astype(mx.bfloat16)))
    return replace(base, heads=tuple(heads))


@dataclass(frozen=True)
class Unbiased(TurboQuantMSE):
    """TurboQuant MSE divided by 1 - D: no part of its error is common to all tokens."""

    name = "unbiased"

    def _decode(self, codes):
        return super()._decode(codes) / (1 - self.codebook(codes.head_dim).distortion)


def test_shrinkage_that_all_tokens_share_is_charged_as_one_error():
    """With g_t = a x_t, shrinking all T vectors by D moves the loss by (D a T d s^2)^2 / 2T per token.

    Token by token it would be T d times less; the rest of the error is that of independent tokens.
    """
    alpha, sigma, tokens = 0.01, 2.0, 256
    given = aligned_sensitivities(alpha, sigma, tokens)
    for curve in fit_distortion_curve(given, widths=[1, 2]).curves:
        for bits, loss in zip((1, 2), curve.losses, strict=True):
            share = SPHERE_DISTORTION[bits]
            shrinkage = (share * alpha * tokens * HEAD_DIM * sigma**2) ** 2 / (2 * tokens)
            rest = 0.5 * curve.weight * sigma**2 * (share - share**2)
            # lambda is measured to sqrt(D / (512 * 128)), 1.1% at 2 bits; squared and three times that
            assert loss == pytest.approx(shrinkage + rest, rel=0.07)


def test_a_code_without_shrinkage_is_not_charged_for_it():
    """Aligned gradients make TurboQuant MSE's shrinkage cost over 1000 times the rest; dividing by 1 - D removes it.

    What is left of the common part is its own noise, D/S of the rest for S sequences: at most 1.5 times for S = 2.
    """
    given = aligned_sensitivities()
    ratio = {}
    for code in (TurboQuantMSE, Unbiased):
        coherent = fit_distortion_curve(given, code, widths=[2, 3])
        token = fit_distortion_curve(given, code, widths=[2, 3], weighting="token")
        ratio[code] = coherent.curves[0].losses[0] / token.curves[0].losses[0]
    assert ratio[TurboQuantMSE] > 1000
    assert 0.9 < ratio[Unbiased] < 3


def test_sinks_are_left_out_of_weights_and_curves():
    """Kept in fp16, the first token adds no loss; the other 63 of 64 tokens have weight 1."""
    for curve in fit_distortion_curve(sink_sensitivities(), widths=[1, 2], sinks=1, weighting="token").curves:
        assert curve.weight == pytest.approx(63 / 64)
        np.testing.assert_allclose(curve.losses, 0.5 * curve.weight * np.array(curve.distortions), rtol=1e-5)


def test_sinks_are_paid_for_at_the_stated_length():
    """4 fp16 tokens of 64 at 2 + 16/128 bits: (60 * 2.125 + 4 * 16) / 64 = 2.9921875."""
    curves = fit_distortion_curve(sink_sensitivities(), widths=[1, 2], sinks=4)
    result = allocate_bits_ratequant(curves, 2.9921875, min_bits=2, max_bits=2, at_tokens=64)
    assert result.bits_per_value == Fraction(383, 128)
    assert (result.sinks, result.at_tokens) == (4, 64)
    with pytest.raises(ValueError, match=r"already costs 2\.99219"):
        allocate_bits_ratequant(curves, 2.9, min_bits=2, max_bits=2, at_tokens=64)


def test_a_window_is_paid_for_at_the_stated_length():
    """16 fp16 tokens of 64 at 2 + 16/128 bits: (48 * 2.125 + 16 * 16) / 64 = 5.59375."""
    curves = fit_distortion_curve(sink_sensitivities(), widths=[1, 2])
    result = allocate_bits_ratequant(curves, 5.59375, min_bits=2, max_bits=2, window=16, at_tokens=64)
    assert result.bits_per_value == Fraction(179, 32)
    assert result.window == 16
    with pytest.raises(ValueError, match="at_tokens=16 must exceed the 0 sinks and the window of 16"):
        allocate_bits_ratequant(curves, 4.0, max_bits=2, window=16, at_tokens=16)
    with pytest.raises(ValueError, match="window=-1 must not be negative"):
        allocate_bits_ratequant(curves, 4.0, max_bits=2, window=-1)


def test_sliding_window_layers_have_no_sinks():
    """Their first tokens leave the window, so nothing is left out and nothing is paid."""
    base = sink_sensitivities()
    moved = replace(base, heads=tuple(replace(head, max_size=32) for head in base.heads))
    curves = fit_distortion_curve(moved, widths=[1, 2], sinks=4)
    assert [curve.sinks for curve in curves.curves] == [0, 0]
    result = allocate_bits_ratequant(curves, 2.125, min_bits=2, max_bits=2, at_tokens=64)
    assert result.bits_per_value == Fraction(17, 8)


GEMMA_WINDOWS = [None if layer % 6 == 5 else 512 for layer in range(18)]
"""Sliding windows of gemma3-270m: every sixth layer has full attention."""


def gemma_curves(seed=0, **options):
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(0, 2, (18, 2, 1)))
    base = sensitivities_of(weights, np.ones((18, 2, 1)), head_dim=64, tokens=128)
    heads = tuple(replace(head, max_size=GEMMA_WINDOWS[head.layer]) for head in base.heads)
    return fit_distortion_curve(replace(base, heads=heads), **options)


def filled_cost(allocation, tokens, **config):
    """Bits per value that caches of random keys and values hold after ``tokens`` tokens, from their arrays."""
    config = KVCacheConfig("ratequant", bit_allocation=allocation, **config)
    bits = values = 0
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, tokens, 64)).astype(np.float16))
    for layer, widths in enumerate(config.layer_widths([True] * 18)):
        cache = PackedKVCache(config.layer_spec(layer, *widths, GEMMA_WINDOWS[layer]))
        cache.update_and_fetch(x, x)
        bits += cache.bits_per_value() * cache.values_held()
        values += cache.values_held()
    return bits / values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", ["layer", "head"])
def test_layers_with_a_sliding_window_weigh_what_they_hold(seed, unit):
    """A window of 512 holds a quarter of 2048 tokens: the caches hold exactly the claimed cost, below the target."""
    result = allocate_bits_ratequant(gemma_curves(seed, widths=range(1, 5)), 2.0, unit=unit)
    assert 1.95 < filled_cost(result, 2048) == result.bits_per_value <= 2
    assert BitAllocation.from_json(result.to_json()) == result
    assert all(shuffled(result, i).bits_per_value == filled_cost(shuffled(result, i), 2048) for i in range(2))


def test_sinks_and_window_weigh_what_a_sliding_window_holds():
    """64 fp16 tokens are a thirty-second of 2048 tokens and an eighth of 512; sinks stay on full attention only."""
    curves = gemma_curves(quantizer=TurboQuantStatic, widths=range(5), sinks=4)
    result = allocate_bits_ratequant(curves, 3.0, 0, window=64)
    assert 2.9 < filled_cost(result, 2048, base="turboquant_static", sinks=4, window=64) == result.bits_per_value <= 3


def test_a_window_of_the_cache_may_exceed_the_layers():
    """A layer that holds 512 tokens keeps all of them in fp16 under a window of 600: 16 bits, whatever its width."""
    result = allocate_bits_ratequant(gemma_curves(widths=[2, 3]), 11.7, 2, 3, window=600)
    assert {float(entry.bits_per_value) for entry in result.entries if entry.max_size} == {16.0}
    spec = KVCacheConfig("ratequant", bit_allocation=result, window=600).layer_spec(0, 2, 2, 512)
    assert spec.expected_nbytes(2048, key_dim=64, value_dim=64) == 512 * 2 * 64 * 2


def test_the_closed_form_weighs_layers_by_what_they_hold():
    """The mean of its widths over held values is the target less the norm's 16/64 bits."""
    widths = allocate_bits_continuous(gemma_curves(widths=range(1, 5)), 2.5)
    held = [2048 if size is None else size for size in GEMMA_WINDOWS]
    assert np.average(list(widths.values()), weights=held) == pytest.approx(2.25, abs=1e-9)


def test_an_allocation_knows_the_parameters_that_were_measured(tmp_path):
    """Groups of 64 channels cost 1/2 bit, groups of 8 four: the saved curves' allocation tells a configuration so."""
    measured = fit_distortion_curve(sink_sensitivities(), lambda bits: Affine(bits, 64), widths=[2, 3])
    measured.save(tmp_path / "curves.json")
    allocation = allocate_bits_ratequant(DistortionCurves.load(tmp_path / "curves.json"), 2.5, 2, 3)
    KVCacheConfig("affine", group_size=64, bit_allocation=allocation)
    with pytest.raises(ValueError, match=r"quantizer of keys is 'affine\(group_size=8\)' here") as error:
        KVCacheConfig("affine", group_size=8, bit_allocation=allocation)
    assert "affine(group_size=64)" in str(error.value)


def test_curves_saved_before_sliding_windows_were_kept_are_read(curves, tmp_path):
    """A file without max_size, value_costs and codings gives curves of full attention, coded token by token."""
    curves.save(tmp_path / "curves.json")
    fields = json.loads((tmp_path / "curves.json").read_text())
    del fields["value_costs"], fields["codings"]
    for curve in fields["curves"]:
        del curve["max_size"]
    (tmp_path / "old.json").write_text(json.dumps(fields))
    loaded = DistortionCurves.load(tmp_path / "old.json")
    assert loaded == replace(curves, codings=None)
    result = allocate_bits_ratequant(loaded, 2.125)
    assert result == replace(allocate_bits_ratequant(curves, 2.125), codings=None)
    old = json.loads(result.to_json())
    del old["codings"]
    for entry in old["entries"]:
        del entry["max_size"]
    assert BitAllocation.from_json(json.dumps(old)) == result


def test_a_quantizer_that_calibrates_does_so_on_its_first_tokens():
    """64 tokens of scale 1, then tokens of scale 3: the scale of the first is kept, as a cache would."""
    base = sensitivities_of([[[1.0], [1.0]]], [[[1.0], [1.0]]], tokens=1024)
    scale = np.where(np.arange(1024) < 64, 1.0, 3.0).astype(np.float16)[:, None]
    moved = replace(base, heads=tuple(replace(h, vectors=h.vectors * mx.array(scale)) for h in base.heads))
    curves = fit_distortion_curve(moved, TurboQuantStatic, widths=[4, 5])
    fitted = fit_distortion_curve(moved, lambda bits: TurboQuantStatic(bits, 1024), widths=[4, 5])
    for early, late in zip(curves.curves, fitted.curves, strict=True):
        assert early.distortions[0] > 3 * late.distortions[0]


@pytest.mark.parametrize("widths", [[1, 1], [9], [-1, 2], [1.5, 2]])
def test_widths_that_are_no_widths_are_refused(widths):
    with pytest.raises(ValueError, match=r"widths must be distinct integers in 0\.\.8"):
        fit_distortion_curve(random_sensitivities(1, 1), widths=widths)


@pytest.mark.filterwarnings("ignore:target_bits")
@pytest.mark.parametrize("target", [1.25, 1.5, 2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("unit", ["layer", "layer_kv", "head"])
@pytest.mark.parametrize("solver", ["optimal", "greedy"])
def test_realised_cost_is_below_the_target_by_less_than_one_step(curves, target, unit, solver):
    """One more bit on one unit (all of equal size here) would exceed the target."""
    result = allocate_bits_ratequant(curves, target, unit=unit, solver=solver)
    step = Fraction(1, len(result))
    assert Fraction(str(target)) - step < result.bits_per_value <= Fraction(str(target))
    assert set(result.values()) <= {1, 2, 3, 4}


def test_names_of_units_follow_the_models_order(curves):
    """Layer by layer, keys before values, head by head."""
    by_layer = allocate_bits_ratequant(curves, 4.125)
    assert list(by_layer) == [f"layer_{i}" for i in range(6)]
    assert list(allocate_bits_ratequant(curves, 4.125, unit="layer_kv"))[:3] == [
        "layer_0.keys",
        "layer_0.values",
        "layer_1.keys",
    ]
    assert list(allocate_bits_ratequant(curves, 4.125, unit="head"))[:3] == [
        "layer_0.keys.head_0",
        "layer_0.keys.head_1",
        "layer_0.values.head_0",
    ]


def test_more_sensitive_layers_get_more_bits():
    """Equal data, weights 1, 10^2, 10^4: widths ascend with the weight."""
    equal = [[1.0], [1.0]]
    curves = fit_distortion_curve(
        sensitivities_of([[[w], [w]] for w in (1.0, 1e2, 1e4)], [equal] * 3, tokens=64), widths=range(1, 7)
    )
    result = allocate_bits_ratequant(curves, 3.125, min_bits=1, max_bits=6)
    assert list(result.values()) == sorted(result.values())
    assert result["layer_2"] > result["layer_0"]


def test_finer_units_never_forecast_a_larger_loss(curves):
    """A layer's width is also open to its heads: layer >= layer_kv >= head in the allocator's own objective."""
    losses = [allocate_bits_ratequant(curves, 2.125, unit=u).forecast_nats for u in ("layer", "layer_kv", "head")]
    assert losses[0] >= losses[1] >= losses[2]
    assert losses[2] < losses[0]


def test_forecast_is_half_the_weighted_distortion():
    """Two heads, w = 2 and 6, sigma 1: at 2 bits each forecasts (2 + 6)/2 * 0.116 nats."""
    given = sensitivities_of([[[2.0], [6.0]]], [[[1.0], [1.0]]], tokens=4096)
    curves = fit_distortion_curve(given, widths=[1, 2], weighting="token")
    result = allocate_bits_ratequant(curves, 2.125, min_bits=2, max_bits=2)
    assert result.forecast_nats == pytest.approx(4.0 * SPHERE_DISTORTION[2], rel=0.01)


def test_an_allocation_forecasts_less_than_its_shuffles(curves):
    """The optimum over all allocations is at most any permutation of itself."""
    tables = {f"layer_{i}": [] for i in range(6)}
    for curve in curves.curves:
        tables[f"layer_{curve.layer}"].append(np.array(curve.losses))
    result = allocate_bits_ratequant(curves, 2.125)

    def forecast(allocation):
        return sum(sum(tables[name])[curves.widths.index(bits)] for name, bits in allocation.items())

    assert forecast(result) == pytest.approx(result.forecast_nats, rel=1e-12)
    assert all(forecast(shuffled(result, seed)) >= result.forecast_nats for seed in range(20))


def test_a_target_below_the_smallest_width_names_what_can_be_reached(curves):
    """One bit and a norm cost 1.125 at head_dim 128: target 1.0 is refused with that number."""
    with pytest.raises(ValueError, match=r"target_bits=1.0 .* min_bits=1 already costs 1.125 bits_per_value"):
        allocate_bits_ratequant(curves, 1.0)


def test_a_target_above_the_largest_width_is_not_met_in_silence(curves):
    with pytest.raises(ValueError, match=r"target_bits=6.0 .* max_bits=4 costs 4.125 bits_per_value"):
        allocate_bits_ratequant(curves, 6.0)


def test_target_one_is_reached_by_a_code_that_costs_one_bit():
    """Widths 0..4 without overhead: exactly 1.0, by any unit."""
    curves = fit_distortion_curve(random_sensitivities(), TurboQuantStatic, widths=range(5))
    for unit in ("layer", "layer_kv", "head"):
        result = allocate_bits_ratequant(curves, 1.0, min_bits=0, max_bits=4, unit=unit)
        assert result.bits_per_value == 1
        assert min(result.values()) == 0


def test_coarse_widths_warn_with_the_realised_cost():
    """Two layers of 1 or 4 bits at 2.0: only 1.125 is below; the warning says so."""
    curves = fit_distortion_curve(random_sensitivities(2), widths=[1, 4])
    with pytest.warns(UserWarning, match=r"target_bits=2.0.*1\.1250 bits_per_value"):
        allocate_bits_ratequant(curves, 2.0)


def test_decimal_targets_admit_their_exact_cost():
    """2.1 as binary lies above or below 21/10; one layer in ten at 3 bits costs exactly 2.1 and is admitted."""
    curves = fit_distortion_curve(random_sensitivities(10), TurboQuantStatic, widths=[2, 3])
    assert allocate_bits_ratequant(curves, 2.1, min_bits=2, max_bits=3).bits_per_value == Fraction(21, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_bits": 0}, "width 0 was not measured"),
        ({"min_bits": 3, "max_bits": 2}, "must satisfy"),
        ({"max_bits": 9}, "must satisfy"),
        ({"unit": "layers"}, "unit='layers' must be one of layer, layer_kv, head"),
        ({"solver": "best"}, "solver='best' must be one of optimal, greedy"),
        ({"target_bits": float("nan")}, "target_bits=nan"),
    ],
)
def test_arguments_out_of_range_are_named(curves, options, message):
    with pytest.raises(ValueError, match=message):
        allocate_bits_ratequant(curves, **({"target_bits": 2.0} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sinks": 64}, r"sinks=64 must lie in 0\.\.63"), ({"weighting": "sum"}, "weighting='sum' must be one of")],
)
def test_curve_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit_distortion_curve(random_sensitivities(1), **options)


def test_a_weight_that_is_nan_is_named(curves):
    with pytest.raises(ValueError, match=r"weight of layer_0\.keys\.head_0 .* got nan"):
        replace(curves.curves[0], weight=float("nan"))


def test_continuous_widths_follow_the_log_weight_rule():
    """Equal Gaussian data: b_i - mean = (ln w_i - mean ln w) / ln beta with the fitted beta."""
    weights = [1.0, 4.0, 16.0]
    curves = fit_distortion_curve(
        sensitivities_of([[[w], [w]] for w in weights], [[[1.0], [1.0]]] * 3),
        widths=[1, 2, 3, 4],
        weighting="token",
    )
    result = allocate_bits_continuous(curves, 2.625)
    beta = curves.curves[0].fit.beta
    expected = 2.5 + (np.log(weights) - np.log(weights).mean()) / np.log(beta)
    np.testing.assert_allclose(list(result.values()), expected, atol=0.02)  # D measured on 2 x 256 vectors


def test_continuous_and_integer_widths_are_close(curves):
    """Rounding moves no unit by more than a bit and a half where curves are nearly exponential."""
    continuous = allocate_bits_continuous(curves, 2.625, unit="head")
    integers = allocate_bits_ratequant(curves, 2.625, unit="head")
    assert max(abs(continuous[name] - integers[name]) for name in integers) < 1.5
