import numpy as np
import pytest
from scipy import stats as scipy_stats

from veloxbench.records import intervals as stats


def test_mean_interval_is_student_t():
    """The interval of ten samples is scipy's."""
    values = np.random.default_rng(0).normal(3, 2, 10)
    found = stats.mean_interval(values, "x")
    low, high = scipy_stats.t.interval(0.95, 9, loc=values.mean(), scale=scipy_stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))


def test_one_sample_has_no_interval():
    """Nothing is claimed from one sample."""
    assert stats.mean_interval([2.0], "x").low is None


def test_mean_interval_covers_95_percent():
    """Of 2000 intervals from normal samples, 95% hold the true mean (binomial 99.9% band: 93.4% to 96.6%)."""
    rng = np.random.default_rng(1)
    draws = rng.normal(0, 1, (2000, 8))
    held = sum(e.low <= 0 <= e.high for e in (stats.mean_interval(row, "x") for row in draws))
    assert 0.934 < held / 2000 < 0.966


def test_ratio_of_paired_times_ignores_what_moves_both():
    """A drift common to both sides of a pair leaves the ratio and its interval alone."""
    rng = np.random.default_rng(2)
    base = rng.uniform(1, 3, 12)
    drift = rng.uniform(0.5, 4, 12)
    plain, drifting = stats.ratio_interval(base * 1.25, base), stats.ratio_interval(base * drift * 1.25, base * drift)
    assert plain.value == pytest.approx(1.25)
    assert (drifting.low, drifting.high) == pytest.approx((plain.low, plain.high))


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_ratio_of_two_pairs_has_no_interval(pairs):
    """Two pairs that agree by chance, or do not, say nothing of the next; three have an interval around the value."""
    times = np.array([1.0, 1.5, 2.0])
    few, three = (stats.ratio_interval(1.1 * times[:n] ** 1.1, times[:n]) for n in (pairs, 3))
    assert (few.low, few.high, few.interval) == (None, None, None)
    assert few.value == pytest.approx(float(np.exp(np.log(1.1 * times[:pairs] ** 0.1).mean())))
    assert three.low < three.value < three.high


def test_median_interval_is_the_order_statistics():
    """For n = 10, ranks 2 and 9 cover 97.9% (binomial table)."""
    found = stats.median_interval(np.arange(1, 11), "x")
    assert (found.value, found.low, found.high) == (5.5, 2.0, 9.0)
    assert found.interval is not None
    assert "98%" in found.interval


def test_quantile_interval_resamples_whole_groups():
    """When groups differ, the interval is wide however many positions each one has."""
    groups = [np.full(1000, float(i)) for i in range(8)]
    found = stats.quantile_interval(groups, 0.5, "x")
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low >= 2


def test_holm_steps_down():
    """Textbook example: .01 .04 .03 .005 at .05 rejects the two smallest (Holm 1979)."""
    p_values = [0.01, 0.04, 0.03, 0.005]
    levels = stats.holm_levels(p_values, 0.05)
    assert [p <= level for p, level in zip(p_values, levels, strict=True)] == [True, False, False, True]
    assert levels[3] == pytest.approx(0.05 / 4)
    assert levels[1] == 0.0  # never looked at: the step before it stopped
