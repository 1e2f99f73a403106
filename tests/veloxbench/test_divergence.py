import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from veloxbench.measure import divergence

import mlx.core as mx  # isort: skip

VOCABULARY = 1031  # odd, so that no row is a whole number of vector registers


@pytest.fixture
def pool():
    with divergence.worker_pool() as pool:
        yield pool


def _pair(seed: int, spread: float = 3.0, noise: float = 0.05, rows: int = 37):
    rng = np.random.default_rng(seed)
    reference = (rng.standard_normal((rows, VOCABULARY)) * spread).astype(np.float32)
    arm = (reference + rng.standard_normal(reference.shape) * noise).astype(np.float32)
    return reference, arm, rng.integers(0, VOCABULARY, rows).astype(np.int32)


def _reference(logits, targets, pool):
    return divergence.reference_rows(logits, targets, np.empty(logits.shape, np.float16), pool)


@pytest.mark.parametrize("noise", [0.02, 0.3, 2.0])
def test_figures_of_an_arm_are_scipys(pool, noise):
    """NLL, KLD, top-1 and target probability equal what scipy.special computes in fp64."""
    reference, arm, targets = _pair(1, noise=noise)
    found = divergence.compare_rows(_reference(reference, targets, pool), arm, targets, pool)
    p, q = softmax(reference.astype(np.float64), axis=1), softmax(arm.astype(np.float64), axis=1)
    kld = rel_entr(p, q).sum(axis=1)
    nll = -log_softmax(arm.astype(np.float64), axis=1)[np.arange(len(targets)), targets]
    # the reference is rounded to fp16: relative error of each log-probability up to 2^-11
    np.testing.assert_allclose(found.kld_nats, kld, rtol=0.02, atol=2e-5)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(found.target_prob, np.exp(-nll), rtol=1e-4)
    assert (found.same_top1 == (p.argmax(axis=1) == q.argmax(axis=1))).all()


def test_fast_path_equals_the_definition_in_mlx(pool):
    """compare_rows on the cached reference gives what compare_positions gives on the same fp16 values."""
    reference, arm, targets = _pair(2)
    rows = _reference(reference, targets, pool)
    fast = divergence.compare_rows(rows, arm, targets, pool)
    plain = divergence.compare_positions(mx.array(rows.log_probs), mx.array(arm), mx.array(targets))
    # two logsumexps of magnitude 16, each rounded to 2^-20 in fp32
    np.testing.assert_allclose(fast.kld_nats, plain.kld_nats, rtol=1e-4, atol=4e-6)
    np.testing.assert_allclose(fast.nll, plain.nll, rtol=1e-5)
    assert (fast.same_top1 == plain.same_top1).all()


def test_identical_logits_have_no_divergence_and_full_agreement(pool):
    """fp16 rounding of the reference is all that is left: second order in 2^-11."""
    reference, _, targets = _pair(3)
    found = divergence.compare_rows(_reference(reference, targets, pool), reference, targets, pool)
    assert np.abs(found.kld_nats).max() < 1e-5
    assert found.same_top1.all()


def test_half_precision_round_trip_is_exact():
    """Every finite fp16 value <= 0 becomes its own fp32 value."""
    half = np.arange(1 << 15, dtype=np.uint16).view(np.float16)
    half = -half[np.isfinite(half)]
    single = divergence.log_probs_to_single(half, np.empty(half.shape, np.float32))
    assert (single == half.astype(np.float32)).all()


def test_rounding_to_half_is_numpys_above_subnormals():
    """log_probs_to_half rounds to nearest even as astype does; beyond fp16's range it saturates."""
    rng = np.random.default_rng(4)
    single = -np.exp(rng.uniform(np.log(1e-4), np.log(6e4), 100_000)).astype(np.float32)
    out = np.empty(single.shape, np.float16)
    divergence.log_probs_to_half(single.copy(), out)
    assert (out == single.astype(np.float16)).all()
    divergence.log_probs_to_half(np.array([-1e6, -np.inf], np.float32), saturated := np.empty(2, np.float16))
    assert (saturated == np.float16(-65504)).all()


def test_a_wrong_top1_and_a_shifted_target_are_seen(pool):
    """The comparison can fail: another argmax and another target change the figures."""
    reference, arm, targets = _pair(5, noise=0.01)
    rows = _reference(reference, targets, pool)
    worse = arm.copy()
    worse[:, 7] += 50
    assert not divergence.compare_rows(rows, worse, targets, pool).same_top1.any()
    moved = divergence.compare_rows(rows, arm, (targets + 1) % VOCABULARY, pool)
    assert np.abs(moved.nll - divergence.compare_rows(rows, arm, targets, pool).nll).min() > 1e-4
