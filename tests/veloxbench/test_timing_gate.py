"""The timing gate on synthetic series: its error rates against what the theory promises, and its edges."""

import math

import numpy as np
import pytest
from scipy import stats

from veloxbench.compare.timing_test import (
    Block,
    Start,
    TimingSpec,
    findings,
    mirrored_order,
    run_gate,
    slowdown_bounds,
)
from veloxbench.errors import ExitCode, UsageError
from veloxbench.gate.verdicts import Verdict, exit_code

SPEC = TimingSpec()


def block(log_ratio, canary=(1.0, 1.0), metric="decode_s"):
    return Block({metric: ((1.0, 1.0), (math.exp(log_ratio),) * 2)}, canary, seconds=1.0)


def start(*blocks):
    return Start(blocks, launch_seconds=4.0)


def gate(log_ratios, spec=SPEC):
    return run_gate((start(block(value)) for value in log_ratios), spec)


def verdicts(slowdown, noise, rng, gates=300, spec=SPEC):
    drawn = math.log1p(slowdown) + noise(rng, (gates, spec.looks[-1]))
    return [gate(row.tolist(), spec).metrics[0].verdict for row in drawn]


def normal(rng, shape):
    return rng.normal(0, 0.03, shape)


def hiccups(rng, shape):
    """Student t with 2 degrees of freedom (infinite variance), and bursts that last for several starts."""
    bursts = np.repeat(rng.random((shape[0], -(-shape[1] // 8))) < 0.1, 8, axis=1)[:, : shape[1]]
    return stats.t(2).rvs(shape, random_state=rng) * np.where(bursts, 0.1, 0.01)


def test_a_mirrored_order_is_its_own_reverse_and_is_drawn():
    """ABBA and BAAB both occur: linear drift cancels within a block, and the sign of what is left is a coin's."""
    orders = {tuple(mirrored_order(["A", "B"], np.random.default_rng(seed))) for seed in range(20)}
    assert orders == {("A", "B", "B", "A"), ("B", "A", "A", "B")}


def test_linear_drift_of_any_size_cancels_in_a_block():
    """Samples at places 0..3 of a drift exp(k t): base at 0 and 3, head at 1 and 2 have the same mean logarithm."""
    drift = np.exp(0.7 * np.arange(4))
    assert Block({"m": (drift[[0, 3]], drift[[1, 2]])}, (1, 1), 1).log_ratio("m") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("noise", [normal, hiccups])
@pytest.mark.parametrize("slowdown", [0.0, 0.03])
def test_false_alarms_stay_below_alpha(noise, slowdown):
    """At most 1% regress where the slowdown is within the margin, also at its edge and with infinite variance.

    150 gates at 1%: more than 6 false alarms have a probability of 0.1%.
    """
    rng = np.random.default_rng(1)
    found = verdicts(slowdown, noise, rng, gates=150)
    assert found.count(Verdict.REGRESS) <= stats.binom.ppf(0.996, 150, SPEC.alpha)


@pytest.mark.parametrize("noise", [normal, hiccups])
def test_a_slowdown_of_detect_passes_at_most_beta_of_the_time(noise):
    """A 5% slowdown passes in at most 2% of the gates (100 of them: more than 7 have a probability of 0.1%)."""
    found = verdicts(SPEC.detect, noise, np.random.default_rng(2), gates=100)
    assert found.count(Verdict.PASS) <= stats.binom.ppf(0.996, 100, SPEC.beta)


def test_power_is_close_to_that_of_the_fixed_test():
    """At 3% noise per start the fixed z-test of 3% against 5% has a power above 99%; the sequential one keeps 90%."""
    shift = math.log(1.05 / 1.03)
    fixed = stats.norm.sf(stats.norm.isf(SPEC.alpha) - shift / 0.03 * math.sqrt(SPEC.looks[-1]))
    assert fixed > 0.99
    found = verdicts(SPEC.detect, normal, np.random.default_rng(3), gates=100)
    assert found.count(Verdict.REGRESS) >= 0.9 * fixed * len(found)


def test_no_change_passes_early_on_a_calm_machine():
    """At 1% noise nearly every A/A gate ends at the first look."""
    drawn = np.random.default_rng(4).normal(0, 0.01, (100, SPEC.looks[-1]))
    results = [gate(row.tolist()) for row in drawn]
    assert all(result.metrics[0].verdict is Verdict.PASS for result in results)
    assert np.median([result.starts for result in results]) == SPEC.looks[0]


def test_noise_beyond_the_budget_is_inconclusive_and_exits_2():
    """Undecided is not a pass."""
    result = gate([0.04 + sign * (0.5 + 0.1 * size) for size in range(SPEC.looks[-1] // 2) for sign in (1, -1)])
    assert not result.decided
    assert result.starts == SPEC.looks[-1]
    assert exit_code(findings(result, SPEC, "s")) == ExitCode.INCONCLUSIVE


def test_too_few_starts_are_inconclusive():
    """A stream that ends before the first look decides nothing, however clear it looks."""
    result = gate([1.0] * (SPEC.looks[0] - 1))
    assert [finding.verdict for finding in findings(result, SPEC, "s")] == [Verdict.INCONCLUSIVE]


def test_p_values_are_the_smallest_ratio_of_scipys_p_to_the_look_s_share():
    """An undecided gate's, recomputed by hand from scipy.stats.wilcoxon at each look; one is an earlier look's."""
    values = np.random.default_rng(11).normal(0.04, 0.03, 30)
    looks = [look for look in SPEC.looks if look <= 30]
    shares = np.diff([0, *looks]) / SPEC.looks[-1]
    regress, passing = (
        [
            stats.wilcoxon(values[:n] - null, alternative=side).pvalue / share
            for n, share in zip(looks, shares, strict=True)
        ]
        for null, side in ((math.log(1.03), "greater"), (math.log(1.05), "less"))
    )
    assert min(regress) < regress[-1]
    (metric,) = gate(values.tolist()).metrics
    assert metric.verdict is None
    assert (metric.regress_p, metric.pass_p) == pytest.approx((min(1.0, *regress), min(1.0, *passing)))


def test_shares_of_all_looks_add_up_to_one():
    """Hence the union bound: alpha in all, not per look."""
    assert TimingSpec(looks=(10, 20, 40), spending=2.0).shares == pytest.approx([1 / 16, 3 / 16, 12 / 16])


def test_bounds_are_the_order_statistics_of_the_walsh_averages():
    """For n = 10 the tabled one-sided 2.5% signed-rank value is 8: the bounds are the 9th averages from each end."""
    values = np.random.default_rng(7).normal(0.02, 0.05, 10)
    walsh = np.sort([(a + b) / 2 for i, a in enumerate(values) for b in values[i:]])
    estimate, low, high = slowdown_bounds(values.tolist(), 0.025, 0.025)
    assert (estimate, low, high) == pytest.approx(tuple(np.expm1([np.median(walsh), walsh[8], walsh[-9]])))


def test_bounds_are_infinite_where_so_few_starts_cannot_give_any():
    """Three starts cannot reach p = 1%: their smallest p is 1/8."""
    assert slowdown_bounds([0.1, 0.2, 0.3], 0.01, 0.01)[1:] == (-1.0, math.inf)


def test_void_blocks_do_not_count_and_a_start_of_mostly_void_blocks_is_void():
    """A canary that moved by 3% voids the block whatever it measured: here x100."""
    calm, restless = block(0.01), block(5.0, canary=(1.0, 1.03))
    assert start(calm, restless, calm).log_ratios(0.02) == {"decode_s": pytest.approx(0.01)}
    assert start(calm, restless, restless).log_ratios(0.02) is None
    assert start(calm, restless).log_ratios(0.02) == {"decode_s": pytest.approx(0.01)}


def test_a_start_gives_the_mean_of_its_blocks():
    """Blocks of one start are no independent witnesses: eight of them are one number."""
    result = run_gate([start(block(0.0), block(0.2))] * (SPEC.looks[0] + 1), SPEC)
    assert result.metrics[0].log_ratios == (pytest.approx(0.1),) * SPEC.looks[0]
    assert result.metrics[0].verdict is Verdict.REGRESS


def test_void_starts_cost_time_and_have_a_cap():
    """After max_voids the machine is too restless to decide."""
    spec = TimingSpec(max_voids=5, canary_drift=0.02)
    calm, restless = start(block(0.0)), start(block(5.0, canary=(1.0, 1.03)))
    result = run_gate([restless, calm] * 5 + [calm] * 20, spec)
    n = SPEC.looks[0]
    assert (result.metrics[0].verdict, result.starts, result.voids) == (Verdict.PASS, n, 5)
    assert result.seconds == 5 * (n + 5)
    stopped = run_gate([restless] * 100, spec)
    assert stopped.voids == 6
    assert stopped.stopped is not None
    assert "restless" in stopped.stopped


def test_a_gate_without_any_usable_start_is_an_inconclusive_finding():
    """No metric was measured: that is not an empty list of findings, which would hide it."""
    found = findings(run_gate([start(block(0.0, canary=(1.0, 2.0)))] * 100, SPEC), SPEC, "s")
    assert exit_code(found) == ExitCode.INCONCLUSIVE


def test_time_is_a_budget_too():
    """At five seconds a start, 150 seconds end an undecided gate."""
    noisy = np.random.default_rng(8).normal(0.04, 0.1, 96).tolist()
    result = gate(noisy, TimingSpec(max_seconds=150))
    assert (result.starts, result.decided) == (31, False)


@pytest.mark.parametrize("time", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_none_is_an_error_not_a_verdict(time):
    """NaN, infinite, zero and negative times."""
    with pytest.raises(ValueError, match="decode_s"):
        run_gate([start(Block({"decode_s": ((1.0, 1.0), (1.0, time))}, (1, 1), 1.0))] * 12, SPEC)


def test_one_metric_that_regresses_among_two_fails_the_gate():
    """The other one's pass does not hide it."""
    starts = (
        start(Block({"a": ((1.0, 1.0), (math.exp(x),) * 2), "b": ((1.0, 1.0), (math.exp(0.2 + x),) * 2)}, (1, 1), 1.0))
        for x in np.random.default_rng(9).normal(0, 0.01, 96)
    )
    found = {finding.metric: finding.verdict for finding in findings(run_gate(starts, SPEC), SPEC, "s")}
    assert found == {"a": Verdict.PASS, "b": Verdict.REGRESS}


def test_a_regression_prints_a_lower_bound_above_the_margin():
    """Also where Holm's step to another metric made an earlier look's p-value enough (both end at one look)."""
    slowdowns = np.random.default_rng(11).normal((0.044, 0.06), (0.03, 0.04), (64, 2))
    starts = (
        start(Block({m: ((1.0, 1.0), (math.exp(x),) * 2) for m, x in zip("ab", row, strict=True)}, (1, 1), 1.0))
        for row in slowdowns
    )
    result = run_gate(starts, SPEC)
    assert [(metric.verdict, len(metric.log_ratios)) for metric in result.metrics] == [(Verdict.REGRESS, 32)] * 2
    last = SPEC.alpha * SPEC.shares[SPEC.looks.index(32)]
    assert slowdown_bounds(result.metrics[0].log_ratios, last, last)[1] < SPEC.margin
    assert all(metric.bounds(SPEC)[1] > SPEC.margin for metric in result.metrics)


def test_nothing_is_measured_after_the_decision():
    """Starts are pulled one at a time."""
    pulled = []

    def live():
        for value in np.random.default_rng(10).normal(0, 0.005, 96):
            pulled.append(value)
            yield start(block(float(value)))

    assert run_gate(live(), SPEC).decided
    assert len(pulled) == SPEC.looks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": 0.06}, "margin"),
        ({"alpha": 0.0}, "alpha"),
        ({"looks": (10, 10)}, "looks"),
        ({"blocks_per_start": 0}, "blocks_per_start"),
        ({"canary_drift": 0.0}, "canary_drift"),
    ],
)
def test_a_specification_without_sense_is_refused(change, message):
    """By name."""
    with pytest.raises(UsageError, match=message):
        TimingSpec(**change)
