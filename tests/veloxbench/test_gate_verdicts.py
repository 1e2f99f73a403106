"""Verdicts of the exact and the quality tier: what passes, what does not, and how often each is wrong."""

import dataclasses
import itertools
import math
from datetime import date, timedelta

import numpy as np
import pytest
from gate_records import HARDWARE, MODEL, NOW, N, damage, quality_record, run_records
from scipy import stats

from veloxbench.errors import ExitCode
from veloxbench.gate.baselines import Baselines, from_records
from veloxbench.gate.gate import judge
from veloxbench.gate.paired_test import ALPHA, MIN_SEQUENCES, POWER, paired_test, paired_tests, smallest_detectable
from veloxbench.gate.verdicts import Verdict, exit_code, overall, sentence
from veloxbench.records.intervals import holm_levels
from veloxbench.records.suites import suite_row

SIMULATED = 2000


def verdict_of(findings, metric):
    return next(finding for finding in findings if finding.metric == metric)


def test_an_unchanged_program_passes_with_no_change_at_all():
    """The same samples: every difference is zero, every metric passes, exit code 0."""
    records = run_records()
    findings = judge(records, from_records(records, "base"))
    assert exit_code(findings) is ExitCode.PASS
    changes = [finding.change for finding in findings if finding.tier == "quality"]
    assert changes == [0.0] * 7  # the reference's nll, and two metrics of three arms


def test_the_difference_that_a_message_is_about_is_never_cut_off():
    """Two models whose names differ in their 300th character: a message shows that character of both."""
    base, head = (run_records(model=MODEL.model_copy(update={"name": "m" * 299 + x + "n" * 300})) for x in "12")
    (reason, *_) = (f.reason for f in judge(head, from_records(base, "base")) if f.verdict is Verdict.NO_BASELINE)
    assert "m1n" in reason
    assert "m2n" in reason
    assert len(reason) < 600


def test_rounding_passes():
    """Differences of the size of the noise floor (another order of sums) are no regression and not inconclusive."""
    rng = np.random.default_rng(0)
    base = quality_record()
    noise = 4e-7 * rng.standard_normal((2, N))
    head = quality_record(kld=damage(0.058) + noise[0], delta_nll=damage(0.064, 1) + noise[1])
    findings = judge([head], from_records([base], "base"))
    assert overall(findings) is Verdict.PASS


def test_noise_drawn_anew_passes_at_four_bits():
    """Another order of sums draws the quantization noise anew: per sequence 5% of KLD and 0.0285 nats of loss
    (measured on two code paths of one BLAS). The gate passes what did not become worse."""
    rng = np.random.default_rng(2)
    kld, loss = damage(0.12), damage(0.14, 1)
    head = quality_record(
        kld=kld * (1 + 0.05 * rng.standard_normal(N)), delta_nll=loss + 0.0285 * rng.standard_normal(N)
    )
    findings = judge([head], from_records([quality_record(kld=kld, delta_nll=loss)], "base"))
    assert overall(findings) is Verdict.PASS


def test_twice_the_smallest_detectable_change_regresses():
    """A change that scales with each sequence's damage and exceeds what the gate detects is called a regression."""
    base = quality_record()
    detectable = verdict_of(judge([base], from_records([base], "base")), "kld_mean").detectable
    assert detectable is not None
    head = quality_record(kld=damage(0.058) * (1 + 2 * detectable / 0.058))
    findings = judge([head], from_records([base], "base"))
    finding = verdict_of(findings, "kld_mean")
    assert finding.verdict is Verdict.REGRESS
    assert finding.low > finding.limit
    assert exit_code(findings) is ExitCode.REGRESSION


def test_an_improvement_is_looked_at_before_it_passes():
    """Half the damage is a better method or a broken scorer: exit 2 until it is approved."""
    base, head = quality_record(), quality_record(kld=damage(0.029), delta_nll=damage(0.032, 1))
    findings = judge([head], from_records([base], "base"))
    assert exit_code(findings) is ExitCode.INCONCLUSIVE
    assert "approve it" in verdict_of(findings, "kld_mean").reason
    assert exit_code(judge([head], from_records([head], "approved"))) is ExitCode.PASS


def test_a_loss_below_the_references_is_no_pass():
    """No divergence from fp16 at all, and two nats less than it: both figures are named, exit 2."""
    head = quality_record(kld=np.zeros(N), delta_nll=damage(0.064, 1) - 2)
    findings = judge([head], from_records([quality_record()], "base"))
    assert {f.metric for f in findings if f.verdict is Verdict.INCONCLUSIVE} == {"kld_mean", "delta_nll"}


@pytest.mark.parametrize("shift", [-2.9, -0.002, 0.002])
def test_the_reference_may_move_neither_way(shift):
    """A mask that leaks the next token lowers fp16's own loss: exit 1, as for one that grew by 0.2% of perplexity."""
    base = quality_record("fp16", None, delta_nll=np.zeros(N))
    head = quality_record("fp16", None, delta_nll=np.full(N, shift) + 1e-6 * damage(1.0))
    findings = judge([head], from_records([base], "base"))
    assert exit_code(findings) is ExitCode.REGRESSION
    assert "the fp16 reference itself moved" in verdict_of(findings, "nll").reason


def test_the_reference_may_round_differently():
    """0.00008 nats per sequence is what another path of one BLAS moves it by: a pass."""
    base = quality_record("fp16", None, delta_nll=np.zeros(N))
    head = quality_record("fp16", None, delta_nll=8e-5 * np.random.default_rng(4).standard_normal(N))
    assert overall(judge([head], from_records([base], "base"))) is Verdict.PASS


def test_a_change_that_the_sequences_cannot_decide_is_inconclusive():
    """Differences as large as the damage itself around a mean near the margin: neither pass nor regress, exit 2."""
    base = quality_record()
    head = quality_record(kld=damage(0.058) + 0.02 * np.random.default_rng(3).standard_normal(N))
    findings = judge([head], from_records([base], "base"))
    assert verdict_of(findings, "kld_mean").verdict is Verdict.INCONCLUSIVE
    assert exit_code(findings) is ExitCode.INCONCLUSIVE


def test_fewer_than_sixteen_sequences_are_inconclusive():
    """Eight sequences prove nothing, even when they did not change."""
    record = quality_record(kld=damage(0.058, n=8), delta_nll=damage(0.064, 1, n=8))
    finding = verdict_of(judge([record], from_records([record], "base")), "kld_mean")
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert str(MIN_SEQUENCES) in finding.reason


def test_another_number_of_sequences_is_not_paired():
    """Samples that cannot be paired are no pass."""
    head = quality_record(kld=damage(0.058, n=17), delta_nll=damage(0.064, 1, n=17))
    assert exit_code(judge([head], from_records([quality_record()], "base"))) is ExitCode.REGRESSION


def test_paired_test_is_scipys_student_test_where_that_is_the_larger():
    """The t-test's own p-value, by its formula."""
    values = damage(0.01, 5)
    t = (values.mean() - 0.008) / stats.sem(values)
    assert paired_test(values, 0.008).p_pass == pytest.approx(stats.t.cdf(t, N - 1))


def test_sign_flips_guard_against_one_wild_sequence():
    """Fifteen equal small changes and a huge negative one: the sign-flip test has the last word on passing."""
    values = np.full(N, 0.5)
    values[0] = -0.4
    test = paired_test(values, 0.6)
    flips = np.array(list(itertools.product([1, -1], repeat=N))) @ (values - 0.6)
    assert test.p_pass >= np.mean(flips <= (values - 0.6).sum() + 1e-12) - 1e-12


def test_sign_flips_are_counted_one_by_one():
    """The p-value of sixteen differences is the share of all 65536 flips that reach the observed sum."""
    values = np.random.default_rng(4).normal(0.3, 1, N)
    flips = np.array(list(itertools.product([1, -1], repeat=N))) @ (values - 0.1)
    counted = np.mean(flips >= (values - 0.1).sum() - 1e-9)
    assert paired_test(values, 0.1).p_regress == max(
        counted, stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    )


@pytest.mark.parametrize("n", [2, 16, 17, 200])
def test_metrics_that_are_tested_together_get_the_figures_that_each_gets_alone(n):
    """To the last bit: numpy reduces each row as it reduces the row alone, and no verdict hangs on its neighbours."""
    differences = np.random.default_rng(5).normal(0.01, 0.02, (40, n))
    differences[7] = 0.25
    margins = np.linspace(-0.01, 0.03, 40).tolist()
    together = paired_tests(differences, margins)
    assert together == [paired_test(values, margin) for values, margin in zip(differences, margins, strict=True)]
    assert [test.mean for test in together] == [float(np.mean(values)) for values in differences]
    errors = [float(np.std(values, ddof=1) / math.sqrt(n)) for values in differences]
    assert [test.standard_error for test in together] == errors


def test_differences_that_are_all_equal_are_certain():
    """No spread, no test: the mean is compared with the margin itself."""
    assert paired_test(np.full(N, 0.5), 0.4).p_regress == 0.0
    assert paired_test(np.full(N, 0.5), 0.6).p_pass == 0.0


@pytest.mark.parametrize("values", [[np.nan] * N, [1.0] * 15 + [np.inf], [1.0]])
def test_a_test_of_what_is_not_finite_raises(values):
    """NaN never reaches a verdict."""
    with pytest.raises(ValueError, match="finite"):
        paired_test(values, 0.1)


def test_false_regressions_are_rarer_than_alpha():
    """Twelve metrics whose true change is exactly the margin: a gate calls any a regression at most 1% of the time.

    2000 simulated gates; the binomial bound at 1% is 31 of them (99.9%).
    """
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(SIMULATED):
        t = (1 + 0.5 * rng.standard_normal((12, N)) - 1).T
        p_values = stats.ttest_1samp(t, 0.0, alternative="greater").pvalue
        wrong += any(p <= level for p, level in zip(p_values, holm_levels(list(p_values), ALPHA), strict=True))
    assert wrong <= stats.binom.isf(0.001, SIMULATED, ALPHA)


def test_the_smallest_detectable_change_is_detected_as_often_as_stated():
    """Changes of just that size, scaling with each sequence's damage, are called a regression 95% of the time.

    2000 simulated baselines of 16 sequences whose damage varies by a fifth; within 4 standard errors of .95.
    """
    rng = np.random.default_rng(1)
    margin, level = 0.02, ALPHA / 8
    base = np.full(N, 1.0)
    base[::2], base[1::2] = 1.2, 0.8
    detectable = smallest_detectable(base, margin, 8)
    variation = base.std(ddof=1)
    differences = detectable * (1 + variation * rng.standard_normal((SIMULATED, N)))
    caught = (stats.ttest_1samp(differences, margin, axis=1, alternative="greater").pvalue <= level).mean()
    assert caught == pytest.approx(POWER, abs=4 * np.sqrt(0.05 * 0.95 / SIMULATED))


def test_damage_that_varies_too_much_has_no_detectable_change():
    """A metric whose sequences differ by more than their mean cannot promise to find anything."""
    assert smallest_detectable(damage(1e-9) + np.linspace(-1, 1, N), 1e-3, 8) is None


def test_margins_are_the_larger_of_absolute_and_relative():
    """A KLD of 5e-5 is judged by the absolute budget, one of 0.1 by a tenth of itself."""
    budget = suite_row("perplexity").per_sequence["kld_mean"]
    assert budget.margin(5e-5) == 1e-5
    assert budget.margin(0.1) == pytest.approx(0.01)


def test_drift_since_the_release_is_judged_by_its_own_budget():
    """Approvals of 9% each pass one by one, and together exceed twice the margin."""
    release = quality_record()
    (file,) = [f for f in from_records([release], "base").files if f.tier == "quality"]
    entry = file.entries[0]
    head = quality_record(kld=damage(0.058) * 1.09**4)
    approved = quality_record(kld=damage(0.058) * 1.09**3)
    moved = dataclasses.replace(from_records([approved], "base"))
    (quality,) = [f for f in moved.files if f.tier == "quality"]
    drifted = quality.entries[0].model_copy(update={"released": entry.approved})
    fields = {name: getattr(quality, name) for name in type(quality).model_fields if name != "content_sha256"}
    rebuilt = type(quality).create(**{**fields, "entries": (drifted,)})
    others = tuple(f for f in moved.files if f.tier != "quality")
    findings = judge([head], dataclasses.replace(moved, files=(rebuilt, *others)))
    finding = verdict_of(findings, "kld_mean")
    assert finding.change < finding.limit
    assert finding.verdict is Verdict.REGRESS
    assert "last release" in finding.reason


def test_another_size_in_bytes_is_a_regression_of_the_exact_tier():
    """Bits per value are equal or they changed, in either direction."""
    findings = judge([quality_record(bits=4.0)], from_records([quality_record()], "base"))
    exact = [finding for finding in findings if finding.tier == "exact"]
    assert [finding.metric for finding in exact] == ["bits_per_value", "allocated_bits_per_value"]
    assert {finding.verdict for finding in exact} == {Verdict.REGRESS}


def test_a_benchmark_that_was_removed_fails():
    """One arm fewer than the baseline: exit 1, and the sentence names it."""
    records = run_records()
    findings = judge(records[:-1], from_records(records, "base"))
    assert exit_code(findings) is ExitCode.REGRESSION
    assert "turboquant_mse@2" in sentence(findings)
    assert "did not produce it" in sentence(findings)


def test_a_benchmark_that_produced_nothing_fails():
    """A record without the gated metrics is no pass."""
    base = quality_record()
    head = quality_record(drop=("kld_mean", "delta_nll"))
    findings = judge([head], from_records([base], "base"))
    missing = {finding.metric for finding in findings if finding.verdict is Verdict.REGRESS}
    assert missing == {"kld_mean", "delta_nll"}


def test_what_was_refused_then_and_now_passes_and_a_new_refusal_does_not():
    """An arm that mlx-lm does not support is as it was approved; one that it supported before is a regression."""
    refused = quality_record(refused="not supported by mlx-lm")
    assert exit_code(judge([refused], from_records([refused], "base"))) is ExitCode.PASS
    assert exit_code(judge([refused], from_records([quality_record()], "base"))) is ExitCode.REGRESSION


def test_a_metric_that_the_baseline_lacks_is_not_a_pass():
    """Exit 3 until somebody approves it."""
    base = quality_record(drop=("delta_nll",))
    assert exit_code(judge([quality_record()], from_records([base], "base"))) is ExitCode.BASELINE


def test_a_new_benchmark_has_no_baseline():
    """Exit 3, and the sentence says how to add it."""
    records = run_records()
    findings = judge(records, from_records(records[:-1], "base"))
    assert exit_code(findings) is ExitCode.BASELINE
    assert "approve" in sentence(findings)


def test_another_machine_has_no_baseline():
    """An Apple chip's quality is not compared with an x86's; bytes are. Exit 3 names the field that differs."""
    apple = {**HARDWARE, "chip": "Apple M4", "machine": "arm64", "device": "gpu"}
    findings = judge(run_records(hardware=apple), from_records(run_records(), "base"))
    assert exit_code(findings) is ExitCode.BASELINE
    assert "chip_family is apple-silicon here and x86-64 there" in sentence(findings)
    assert {finding.verdict for finding in findings if finding.tier == "exact"} == {Verdict.PASS}


def test_another_order_of_sums_is_judged_by_a_baseline_that_travelled():
    """The same chip with another BLAS draws the noise anew; the pair of runs is compared, and the reason says so."""
    head, base = run_records(hardware={**HARDWARE, "rounding": "s"}), from_records(run_records(), "base")
    findings = judge(head, base)
    assert exit_code(findings) is ExitCode.PASS
    assert all("another rounding" in finding.reason for finding in findings if finding.tier == "quality")
    worse = judge(run_records(kld=damage(0.5), hardware={**HARDWARE, "rounding": "s"}), base)
    assert exit_code(worse) is ExitCode.REGRESSION


def test_a_baseline_of_the_same_rounding_comes_first():
    """Where both are there, nothing is drawn anew."""
    near, far = from_records(run_records(), "r"), from_records(run_records(hardware={**HARDWARE, "rounding": "s"}), "s")
    both = Baselines((*far.files, *near.files), "both")
    assert not any("another rounding" in finding.reason for finding in judge(run_records(), both))


def test_other_weights_have_no_baseline():
    """The same name with another hash is another model: exit 3."""
    other = MODEL.model_copy(update={"weights_sha256": "v" * 64})
    findings = judge(run_records(model=other), from_records(run_records(), "base"))
    assert exit_code(findings) is ExitCode.BASELINE
    assert f"weights_sha256 is {'v' * 60}… here and {'w' * 60}… there" in sentence(findings)


def test_a_suite_that_never_ran_here_is_missed():
    """Only another machine's baselines, and no record of that suite: nobody looked, so nobody passes."""
    apple = {**HARDWARE, "chip": "Apple M4", "machine": "arm64", "device": "gpu"}
    base = from_records([*run_records(hardware=apple)], "base")
    exact_only = quality_record("other", 4.0, drop=("kld_mean", "delta_nll", "nll"))
    findings = judge([exact_only], dataclasses.replace(base, files=tuple(f for f in base.files if f.tier == "quality")))
    assert exit_code(findings) is not ExitCode.PASS


def test_no_records_are_no_pass():
    """Zero benchmarks selected: nothing was judged."""
    assert exit_code(judge([], from_records(run_records(), "base"))) is ExitCode.BASELINE


def test_records_compared_with_records_do_not_expire():
    """Two runs of long ago are judged by each other."""
    records = run_records()
    assert exit_code(judge(records, from_records(records, "base"), today=date(2100, 1, 1))) is ExitCode.PASS


def test_a_profile_without_baselines_is_no_pass():
    """The folder has baselines, but none of the profile that was run: exit 3."""
    records = run_records()
    findings = judge(records, from_records(records, "base", profile="gate"), profile="nightly")
    assert exit_code(findings) is ExitCode.BASELINE
    assert "'nightly'" in sentence(findings)


def test_an_older_commits_record_does_not_stand_in_for_a_crash():
    """The results folder keeps yesterday's record; today's code crashed there: it was not produced."""
    base = run_records()
    yesterday = quality_record(
        "turboquant_mse", 2.0, started=NOW - timedelta(days=1), implementation="veloxquant_mlx 0"
    )
    findings = judge([*base[:-1], yesterday], from_records(base, "base"))
    assert exit_code(findings) is ExitCode.REGRESSION
    assert "turboquant_mse@2" in sentence(findings)
