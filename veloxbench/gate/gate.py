"""The stored-baseline gate: the exact and the quality tier judge a run's records.

*exact*: bytes, codes, allocations are equal or they changed. *quality*: paired differences per sequence against
the baseline's own sequences, against a margin that is stated. An arm may not lose more than it; a gain beyond it is
no pass until somebody approves it, and the fp16 reference may move neither way. The gate fails closed: whatever a
baseline holds must have been produced by the run, and whatever the run produced must have a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from veloxbench.gate.baselines import (
    MACHINE_FIELDS,
    REDRAWN,
    BaselineFile,
    Baselines,
    Entry,
    Group,
    Snapshot,
    grouped,
    machine_fields,
    travel_id,
)
from veloxbench.gate.paired_test import ALPHA, FALSE_PASS, MIN_SEQUENCES, Paired, detectable_change, paired_tests
from veloxbench.gate.verdicts import Finding, Verdict
from veloxbench.records.intervals import holm_levels
from veloxbench.records.record import Record
from veloxbench.records.selection import canonical
from veloxbench.records.suites import REDRAW_POSITIONS, suite_row

SHOWN = 60
"""Characters of a value that a message shows."""

ROUNDING = 2.0**-13
"""Sums of floats agree to this share of their root mean square.

Another order of fp32 sums (2^-24 per term) now and then takes an fp16 norm to its neighbour: one of 400 moves such a
sum by 2^-10 / sqrt(400) of its size. A wrong table, or every norm one step off, moves it ten times as far.
"""


DRIFT_FACTOR = 2.0
"""All approvals since the last release together may cost this many margins."""


@dataclass(frozen=True)
class _Pending:
    """A quality metric whose verdict waits for the p-values of its whole tier: samples now, then and at the release."""

    finding: Finding
    head: NDArray[np.float64]
    base: NDArray[np.float64]
    released: NDArray[np.float64]
    margin: float
    total: float
    """What all approvals since the release may cost together."""
    redraw: float
    redrawn: bool
    """The baseline is of another rounding: every change holds a draw of noise."""
    two_sided: bool
    """Whether the metric is the fp16 reference's own, which may move neither way."""


@dataclass(frozen=True)
class _Tests:
    """The paired tests of a metric, and the baseline's spread."""

    test: Paired
    fall: Paired
    """The same test of the opposite question: has it fallen by more than the margin?"""
    drift: Paired
    deviation: float


def judge(
    records: Iterable[Record], baselines: Baselines, *, profile: str | None = None, today: date | None = None
) -> list[Finding]:
    """Every finding of the exact and the quality tier.

    Args:
        records: of one run.
        baselines: of a folder (:func:`veloxbench.gate.baselines.read_baselines`) or of another run
            (:func:`veloxbench.gate.baselines.from_records`).
        profile: baselines of this profile must be produced whole; None: all that hold on the run's machine.
        today: for expiry dates; absent: the current day in UTC.

    Returns:
        One finding per quality metric, one per exact subject (or per exact metric that changed), one per
        thing that is missing on either side. No records give no findings, which is not a pass.
    """
    measured = list(records)
    if not measured:
        return []
    groups = [group for group in grouped(measured) if group.tier in baselines.tiers]
    fields = (machine_fields(record.provenance.hardware, record.provenance.versions) for record in measured)
    machines = list({canonical(machine): machine for machine in fields}.values())
    day = datetime.now(UTC).date() if today is None else today
    findings: list[Finding] = []
    pending: list[_Pending] = []
    for group in groups:
        file = baselines.find(group)
        if file is None:
            findings.append(_without_baseline(group, baselines))
        else:
            for item in _compare(group, file, day):
                (pending if isinstance(item, _Pending) else findings).append(item)  # type: ignore[arg-type]
    findings += _not_run(groups, machines, baselines, profile)
    return [*findings, *_decided(pending)]


def unknown_machine(records: Iterable[Record], baselines: Baselines, profile: str | None = None) -> str | None:
    """What makes the run's machine one for which nobody approved a quality baseline; None where that is not all.

    Every quality baseline of the profile must be of another machine, and nothing but the machine may differ: an
    expired baseline, or one of other weights, another text or another MLX (which somebody chose), is no unknown
    machine.
    """
    groups = [group for group in grouped(records) if group.tier == "quality"]
    files = [file for file in baselines.of_profile(profile) if file.tier == "quality"]
    if not groups or not files:
        return None
    machine = {name: groups[0].fingerprint[name] for name in MACHINE_FIELDS if name != "mlx"}
    here = {travel_id({**file.fingerprint, **machine}) for file in files}
    known = any(travel_id(file.fingerprint) in here for file in files)
    if known or any(travel_id(group.fingerprint) not in here for group in groups):
        return None
    return _listed(machine)


def _not_run(
    groups: Sequence[Group], machines: Sequence[dict[str, JsonValue]], baselines: Baselines, profile: str | None
) -> list[Finding]:
    """Findings for baselines of which the run has no record: benchmarks that were removed or crashed."""
    answered = {travel_id(group.fingerprint) for group in groups}
    # the same subject under another fingerprint has its own finding, which names the difference
    elsewhere = {(group.tier, group.suite, name) for group in groups for name in group.snapshots}
    findings: list[Finding] = []
    here: set[tuple[str, str]] = set()
    other: dict[tuple[str, str], BaselineFile] = {}
    files = baselines.of_profile(profile)
    if not files:
        named = ", ".join(sorted({name for file in baselines.files for name in file.profiles}))
        reason = f"{baselines.origin} has no baseline of the profile {profile!r}; it has {named or 'none at all'}"
        return [Finding(baselines.tiers[0], f"profile {profile}", "all", Verdict.NO_BASELINE, reason)]
    for file in files:
        if not any(file.holds_on(machine) for machine in machines):
            other.setdefault((file.tier, file.suite), file)
            continue
        here.add((file.tier, file.suite))
        if travel_id(file.fingerprint) in answered:
            continue
        findings += [
            _missing(file, entry) for entry in file.entries if (file.tier, file.suite, entry.subject) not in elsewhere
        ]
    ran = {(group.tier, group.suite) for group in groups}
    findings += [
        Finding(
            file.tier,
            f"{file.suite} of {file.fingerprint['model']}",
            "all",
            Verdict.NO_BASELINE,
            f"the run has no records of the suite {file.suite}, and its baselines are of other machines "
            f"({_listed(file.machine)})",
        )
        for key, file in other.items()
        if key not in here and key not in ran
    ]
    return findings


def _listed(fields: dict[str, JsonValue]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _missing(file: BaselineFile, entry: Entry) -> Finding:
    return Finding(
        file.tier,
        entry.subject,
        "all",
        Verdict.REGRESS,
        f"the run did not produce it (removed, crashed or not selected), {file.place} has it",
    )


def _without_baseline(group: Group, baselines: Baselines) -> Finding:
    """The finding that a group has no baseline; it names what differs from the nearest: machine, model or text."""
    alike = [file for file in baselines.files if (file.tier, file.suite) == (group.tier, group.suite)]
    where = f"{len(group.snapshots)} records have no baseline in {baselines.origin}"

    def differences(file: BaselineFile) -> list[str]:
        names = [*file.fingerprint, *(name for name in group.fingerprint if name not in file.fingerprint)]
        return [n for n in names if n != REDRAWN and file.fingerprint.get(n) != group.fingerprint.get(n)]

    if not alike:
        reason = f"{where}: it has none of the suite {group.suite}"
    else:
        nearest = min(alike, key=lambda file: len(differences(file)))
        changed = "; ".join(
            f"{name} is {_around(group.fingerprint.get(name), nearest.fingerprint.get(name))} here and "
            f"{_around(nearest.fingerprint.get(name), group.fingerprint.get(name))} there"
            for name in differences(nearest)
        )
        reason = f"{where}: the nearest, {nearest.place}, is of something else ({changed})"
    return Finding(group.tier, group.described, "all", Verdict.NO_BASELINE, reason)


def _around(value: object, other: object) -> str:
    """A value, a long one cut to where it first differs from the other."""
    text, rival = str(value), str(other)
    if len(text) <= SHOWN:
        return text
    first = next((i for i, (a, b) in enumerate(zip(text, rival, strict=False)) if a != b), min(len(text), len(rival)))
    start = max(0, min(first - SHOWN // 4, len(text) - SHOWN))
    cut = text[start : start + SHOWN]
    return f"{'…' if start else ''}{cut}{'…' if start + SHOWN < len(text) else ''}"


def _compare(group: Group, file: BaselineFile, day: date) -> list[Finding | _Pending]:
    results: list[Finding | _Pending] = []
    expired = file.expired(day)
    for name, entry in file.by_subject.items():
        head = group.snapshots.get(name)
        if head is None:
            results.append(_missing(file, entry))
        elif name in expired:
            reason = f"its baseline in {file.place} expired on {expired[name]}; measure and approve it again"
            results.append(Finding(group.tier, name, "all", Verdict.NO_BASELINE, reason))
        elif head.status != entry.approved.status:
            reason = f"the baseline was {entry.approved.status}, this run's record is {head.status}"
            results.append(Finding(group.tier, name, "all", Verdict.REGRESS, reason))
        elif head.status == "unsupported":
            results.append(Finding(group.tier, name, "all", Verdict.PASS, "not supported, as in the baseline"))
        elif group.tier == "exact":
            results += _exact(name, head, entry.approved)
        else:
            redrawn = file.fingerprint.get(REDRAWN) != group.fingerprint.get(REDRAWN)
            results += _quality(name, head, entry, file, redrawn)
    for name in group.snapshots:
        if name not in file.by_subject:
            reason = f"it is not in {file.place}; `veloxbench baseline approve` adds what is new"
            results.append(Finding(group.tier, name, "all", Verdict.NO_BASELINE, reason))
    return results


def _exact(name: str, head: Snapshot, base: Snapshot) -> list[Finding]:
    """Equality of every metric, and of decoded samples up to rounding."""
    changed = []
    for metric, expected in base.metrics.items():
        value = head.metrics.get(metric)
        if value is None:
            changed.append(Finding("exact", name, metric, Verdict.REGRESS, "the run did not produce it"))
        elif value != expected:
            reason = f"{value:.17g} is not {expected:.17g}"
            changed.append(
                Finding("exact", name, metric, Verdict.REGRESS, reason, value, expected, value - expected, limit=0.0)
            )
    for sample, expected_values in base.samples.items():
        difference = _difference(head.samples.get(sample), expected_values)
        if difference is not None:
            changed.append(Finding("exact", name, sample, Verdict.REGRESS, difference))
    new = [*(m for m in head.metrics if m not in base.metrics), *(s for s in head.samples if s not in base.samples)]
    changed += [Finding("exact", name, item, Verdict.NO_BASELINE, "the baseline does not have it") for item in new]
    if changed:
        return changed
    count = len(base.metrics) + len(base.samples)
    if count == 0:
        return [Finding("exact", name, "all", Verdict.REGRESS, "the record has no exact metric: nothing was compared")]
    return [Finding("exact", name, f"{count} metrics", Verdict.PASS, "all equal")]


def _difference(values: Sequence[float] | None, expected: Sequence[float]) -> str | None:
    if values is None:
        return "the run did not produce it"
    if len(values) != len(expected):
        return f"{len(values)} values, the baseline has {len(expected)}"
    base = np.asarray(expected)
    scale = float(np.sqrt(np.mean(base**2)))
    worst = float(np.max(np.abs(np.asarray(values) - base), initial=0.0))
    if worst <= ROUNDING * scale:
        return None
    return f"differs by {worst:.3g} of values of size {scale:.3g}; rounding explains {ROUNDING:.2g}"


def _scored_positions(file: BaselineFile) -> int:
    match file.fingerprint["settings"]:
        case {"steps": int(steps)}:
            return steps
        case {"length": int(length), "score_from": int(first)}:
            return length - first
    return REDRAW_POSITIONS


def _quality(name: str, head: Snapshot, entry: Entry, file: BaselineFile, redrawn: bool) -> list[Finding | _Pending]:
    row, positions = suite_row(file.suite), _scored_positions(file)
    results: list[Finding | _Pending] = []
    for metric, base in entry.approved.samples.items():
        values = head.samples.get(metric)
        if values is None:
            results.append(Finding("quality", name, metric, Verdict.REGRESS, "the run did not produce it"))
            continue
        now, then = np.asarray(values), np.asarray(base)
        mean = _mean(then)
        two_sided = metric in row.per_sequence_of_reference
        budget = (row.per_sequence_of_reference if two_sided else row.per_sequence)[metric]
        margin = budget.margin(mean)
        blank = Finding("quality", name, metric, Verdict.REGRESS, "", _mean(now), mean, limit=margin)
        if len(values) != len(base):
            reason = f"{len(values)} sequences cannot be paired with the baseline's {len(base)}"
            results.append(replace(blank, reason=reason))
        elif len(values) < MIN_SEQUENCES:
            reason = f"{len(values)} sequences are too few to judge: a gate needs {MIN_SEQUENCES}"
            results.append(replace(blank, verdict=Verdict.INCONCLUSIVE, reason=reason))
        else:
            released = then if entry.released is None else np.asarray(entry.released.samples.get(metric, base))
            total = DRIFT_FACTOR * budget.margin(_mean(released))
            redraw = budget.redraw * abs(mean) * math.sqrt(REDRAW_POSITIONS / positions)
            results.append(_Pending(blank, now, then, released, margin, total, redraw, redrawn, two_sided))
    missing = [metric for metric in head.samples if metric not in entry.approved.samples]
    results += [
        Finding("quality", name, metric, Verdict.NO_BASELINE, "the baseline does not have it") for metric in missing
    ]
    if not entry.approved.samples:
        results.append(Finding("quality", name, "all", Verdict.REGRESS, "the baseline has no samples to compare with"))
    return results


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.add.reduce(values) / len(values))


def _tested(pending: Sequence[_Pending]) -> list[_Tests]:
    """The tests of all metrics, those with equally many sequences at once."""
    tests: dict[int, _Tests] = {}
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, item in enumerate(pending):
        by_size.setdefault((len(item.head), len(item.released)), []).append(i)
    for places in by_size.values():
        some = [pending[i] for i in places]
        head, base, released = (
            np.stack([getattr(item, name) for item in some]) for name in ("head", "base", "released")
        )
        margins = [item.margin for item in some]
        of_each = zip(
            paired_tests(head - base, margins),
            paired_tests(base - head, margins),
            paired_tests(head - released, [item.total for item in some]),
            base.std(axis=1, ddof=1).tolist(),
            strict=True,
        )
        tests |= {i: _Tests(*each) for i, each in zip(places, of_each, strict=True)}
    return [tests[i] for i in range(len(pending))]


def _decided(pending: Sequence[_Pending]) -> list[Finding]:
    """Verdicts of the quality tier: Holm over all its tests of regression and of drift together.

    The reference's fall is a regression and one of these tests; gains of arms are a family of their own.
    """
    tested = _tested(pending)
    falls = {i for i, item in enumerate(pending) if item.two_sided}
    tests = [test for each in tested for test in (each.test, each.drift)]
    levels = holm_levels([test.p_regress for test in [*tests, *(tested[i].fall for i in sorted(falls))]], ALPHA)
    fall_levels = dict(zip(sorted(falls), levels[len(tests) :], strict=True))
    gains = [i for i in range(len(pending)) if i not in falls]
    fall_levels |= zip(gains, holm_levels([tested[i].fall.p_regress for i in gains], ALPHA), strict=True)
    return [
        _decide(item, each, levels[2 * i], levels[2 * i + 1], fall_levels[i], len(levels))
        for i, (item, each) in enumerate(zip(pending, tested, strict=True))
    ]


def _decide(
    item: _Pending, tests: _Tests, level: float, drift_level: float, fall_level: float, n_tests: int
) -> Finding:
    test = tests.test
    low = test.bound(level or ALPHA / n_tests, -1)
    high = test.bound(FALSE_PASS, +1)
    spread = max(test.standard_error * math.sqrt(test.n), item.redraw)
    verdict, reason = _verdict(item.two_sided, tests, low, high, (level, drift_level, fall_level))
    if item.redrawn:
        reason += " (the baseline is of another rounding: the noise was drawn anew)"
    mean = _mean(item.base)
    return replace(
        item.finding,
        verdict=verdict,
        reason=reason,
        change=test.mean,
        low=low,
        high=high,
        detectable=detectable_change(test.n, mean, tests.deviation, test.margin, n_tests, spread),
    )


def _verdict(
    two_sided: bool, tests: _Tests, low: float, high: float, levels: tuple[float, float, float]
) -> tuple[Verdict, str]:
    """What the tests say at their levels (of growth, drift and fall), and why."""
    test, fall, drift = tests.test, tests.fall, tests.drift
    level, drift_level, fall_level = levels
    regressed = test.p_regress <= level and low > test.margin
    fell = fall.p_regress <= fall_level and fall.mean > fall.margin
    drifted = drift.p_regress <= drift_level and drift.mean > drift.margin
    passes = test.p_pass <= FALSE_PASS and high <= test.margin
    if two_sided:
        passes = passes and fall.p_pass <= FALSE_PASS and fall.bound(FALSE_PASS, +1) <= fall.margin
    within = drift.p_pass <= FALSE_PASS and drift.bound(FALSE_PASS, +1) <= drift.margin
    if two_sided and (regressed or fell):
        reason = (
            f"the fp16 reference itself moved by {test.mean:+.3g}, more than {test.margin:.3g} either way: mask, "
            "scorer, model or text, and every figure is measured against it"
        )
        return Verdict.REGRESS, reason
    if regressed:
        reason = f"grew by {test.mean:.3g} [{low:.3g}, {high:.3g}], more than {test.margin:.3g}"
        return Verdict.REGRESS, reason
    if drifted:
        reason = f"{drift.mean:.3g} above the last release, whose total budget is {drift.margin:.3g}"
        return Verdict.REGRESS, reason
    if fell:
        reason = (
            f"better by {fall.mean:.3g}, more than {test.margin:.3g}: a gain of that size is a better method or a "
            "broken measurement; find out which, then approve it"
        )
        return Verdict.INCONCLUSIVE, reason
    if passes and within:
        same = "no sequence changed" if test.mean == 0 and test.standard_error == 0 else f"changed by {test.mean:.3g}"
        return Verdict.PASS, f"{same}, limit {test.margin:.3g}"
    what = (
        f"changed by {test.mean:.3g} [{low:.3g}, {high:.3g}]: {test.n} sequences cannot tell whether that is within "
        f"{test.margin:.3g}"
        if not passes
        else f"{drift.mean:.3g} above the last release: {test.n} sequences cannot tell whether that is within the "
        f"total budget of {drift.margin:.3g}"
    )
    return Verdict.INCONCLUSIVE, what
