"""The timing gate: base against head in freshly started processes and randomised ABBA blocks, until it is decided.

Protocol. Both sides are started anew again and again. The same code, started again, is faster or slower by a few
percent for as long as it lives (docs/timing.md), so that the start, not the sample, is what must be repeated (Kalibera
& Jones 2013). In each start some blocks time base and head in a mirrored random order (base head head base, or head
base base head), so that a machine that drifts moves both alike. A canary, the same fixed work each time, is timed
before and after; a block whose canary moved by more than ``canary_drift`` is void: whether a block counts never
depends on the times of base and head. Each start gives one number, the mean of ``ln(head / base)`` over its blocks.

Test. At every look (a planned number of starts) two signed-rank tests (Wilcoxon 1945; `scipy.stats.wilcoxon`) ask
whether the slowdown lies above ``margin`` and whether it lies below ``detect``. Signs of log ratios under no change
are fair coins because orders are drawn, of the samples and of who is started first, whatever the machine does and
however its noise is correlated; ranks keep one hiccup from weighing more than its place. The error rates are spent
over the looks: look k may use the share ``shares[k]`` of ``alpha`` and of ``beta``, and the shares add up to one, so
that by the union bound no more than ``alpha`` of the gates with a slowdown of at most ``margin`` report a regression,
and no more than ``beta`` of the gates with a slowdown of at least ``detect`` pass, without any assumption on how the
looks depend on each other.

Hence the smallest p / share over the looks is itself a valid p-value, and Holm (1979) across a tier's metrics acts
on those. Passing needs every metric below ``detect``, each at the full ``beta`` (intersection-union).
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from veloxbench.errors import UsageError
from veloxbench.gate.verdicts import Finding, Verdict
from veloxbench.records.intervals import holm_levels

Alternative = Literal["greater", "less"]

Name = TypeVar("Name")

Sides = tuple[Sequence[float], Sequence[float]]
"""Seconds of one metric in one block: base's samples and head's, as many of each."""


@dataclass(frozen=True)
class TimingSpec:
    """What is tested, at which error rates, within which budget.

    Attributes:
        margin: slowdown up to which reporting a regression is a false alarm.
        detect: slowdown from which passing is a miss.
        alpha: rate of false alarms, all looks and all metrics together.
        beta: rate of misses, all looks of a metric together; 2% leaves room for inconclusive gates within the 5% of
            slowdowns that may go uncaught.
        looks: starts at which the tests are made; the last is the budget.
        blocks_per_start: blocks in each start. A start costs some ten times what a block does and starts scatter
            nearly as much as blocks: 4 to 10 blocks make the most of the time (Kalibera & Jones 2013, eq. 7).
        spending: look k has used ``(looks[k] / looks[-1]) ** spending`` of alpha and beta (Kim & DeMets 1987).
        canary_drift: relative change of the canary within a block that voids it. The order's randomisation keeps the
            error rates whatever this is; it ends a gate on a machine that is not itself (throttled, taken by another
            job). On an idle shared virtual machine the canary moved by 3% in the median, 6% in the 90% quantile; on a
            machine of one's own, 2% is the figure to choose.
        max_voids: void starts, those of which most blocks are void, that are borne in any case; a gate in which more of
            them than of the others have ended is on a machine that is too restless to decide.
        max_seconds: budget of time; the start in which it ends is the last.
    """

    margin: float = 0.03
    detect: float = 0.05
    alpha: float = 0.01
    beta: float = 0.02
    looks: tuple[int, ...] = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96)
    blocks_per_start: int = 8
    spending: float = 1.0
    canary_drift: float = 0.10
    max_voids: int = 8
    max_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < self.detect:
            raise UsageError(f"timing gate: margin {self.margin} must be at least 0 and below detect {self.detect}")
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) < 0.5:
                raise UsageError(f"timing gate: {name} {getattr(self, name)} must lie between 0 and 0.5")
        if not self.looks or self.looks[0] < 1 or any(a >= b for a, b in zip(self.looks, self.looks[1:], strict=False)):
            raise UsageError(f"timing gate: looks {self.looks} must be increasing numbers of starts")
        if self.blocks_per_start < 1:
            raise UsageError(f"timing gate: blocks_per_start {self.blocks_per_start} must be at least 1")
        for name in ("spending", "canary_drift", "max_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"timing gate: {name} {getattr(self, name)} must be a finite number above zero")

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each look's share of alpha and beta; they add up to one."""
        spent = (np.array(self.looks) / self.looks[-1]) ** self.spending
        return np.diff(spent, prepend=0.0)

    def looks_made(self, starts: int) -> int:
        """How many looks that many starts allow."""
        return sum(look <= starts for look in self.looks)


def mirrored_order(names: Sequence[Name], rng: np.random.Generator) -> list[Name]:
    """A random order followed by its mirror image: every name's mean place is the same, so linear drift cancels."""
    first = [names[index] for index in rng.permutation(len(names))]
    return first + first[::-1]


@dataclass(frozen=True)
class Block:
    """One mirrored block: the samples of every metric, the canary's readings and how long it all took.

    Attributes:
        sides: metric -> (base's seconds, head's seconds).
        canary: the canary's seconds before and after (and between) the samples.
        seconds: wall time of the whole block.
    """

    sides: Mapping[str, Sides]
    canary: Sequence[float]
    seconds: float

    def log_ratio(self, metric: str) -> float:
        """``ln(head / base)`` of the metric.

        Raises:
            ValueError: a time that is not positive and finite.
        """
        base, head = (np.asarray(side, dtype=np.float64) for side in self.sides[metric])
        if len(base) != len(head) or not (np.isfinite([*base, *head]).all() and min([*base, *head], default=0) > 0):
            raise ValueError(
                f"{metric}: base {base.tolist()} and head {head.tolist()} must be as many times above zero"
            )
        return float(np.log(head).mean() - np.log(base).mean())

    @property
    def canary_drift(self) -> float:
        """Largest relative change between two readings of the canary."""
        return max(self.canary) / min(self.canary) - 1


@dataclass(frozen=True)
class Start:
    """Both sides freshly started, and the blocks that they were timed in.

    Attributes:
        launch_seconds: wall time until the first block.
    """

    blocks: Sequence[Block]
    launch_seconds: float

    @property
    def seconds(self) -> float:
        """Wall time in all."""
        return self.launch_seconds + sum(block.seconds for block in self.blocks)

    def usable(self, canary_drift: float) -> list[Block]:
        """The blocks that are not void."""
        return [block for block in self.blocks if block.canary_drift <= canary_drift]

    def log_ratios(self, canary_drift: float) -> dict[str, float] | None:
        """Mean ``ln(head / base)`` of each metric over the blocks that are not void; None where most of them are.

        Raises:
            ValueError: a time that is not positive and finite.
        """
        if canary_drift not in self._known:
            usable = self.usable(canary_drift)
            self._known[canary_drift] = (
                {metric: float(np.mean([b.log_ratio(metric) for b in usable])) for metric in usable[0].sides}
                if usable and 2 * len(usable) >= len(self.blocks)
                else None
            )
        return self._known[canary_drift]

    @functools.cached_property
    def _known(self) -> dict[float, dict[str, float] | None]:
        return {}


@dataclass(frozen=True)
class MetricResult:
    """Where a metric stands when its gate ends; ``verdict`` is None if it is undecided.

    Attributes:
        log_ratios: of the starts up to the decision, ``ln(head / base)``.
        regress_p, pass_p: sequential p-values of "slower by more than margin" and "by less than detect": the smallest
            p / share over the looks made, at most 1. Rejecting where one is at most alpha (beta) keeps the error rate
            over any stopping rule.
    """

    metric: str
    verdict: Verdict | None
    log_ratios: tuple[float, ...]
    regress_p: float
    pass_p: float

    def bounds(self, spec: TimingSpec) -> tuple[float, float, float]:
        """Slowdown with the tightest bounds of all looks, each at its share of alpha and beta: what a verdict rests on.

        ``regress_p`` is at most alpha where the lower bound is above the margin, ``pass_p`` at most beta where the
        upper one is below detect. They are this metric's alone: among several, Holm asks more of a regression.
        """
        starts = len(self.log_ratios)
        looks = spec.looks[: spec.looks_made(starts)] or (starts,)
        bounds = [
            slowdown_bounds(self.log_ratios[:look], spec.alpha * float(share), spec.beta * float(share))
            for look, share in zip(looks, spec.shares, strict=False)
        ]
        estimate, _, _ = slowdown_bounds(self.log_ratios, spec.alpha, spec.beta)
        return estimate, max(low for _, low, _ in bounds), min(high for _, _, high in bounds)


@dataclass(frozen=True)
class GateResult:
    """The end of a gate: every metric's result and what it took."""

    metrics: tuple[MetricResult, ...]
    starts: int
    voids: int
    seconds: float
    stopped: str | None = None
    """Why it ended undecided, if it did."""

    @property
    def decided(self) -> bool:
        """Whether every metric has passed or regressed."""
        return self.stopped is None


def _signed_rank_p(log_ratios: NDArray[np.float64], null: float, alternative: Alternative) -> float:
    from scipy import stats  # a second, which a child that only measures does without

    p = float(stats.wilcoxon(log_ratios - null, alternative=alternative).pvalue) if np.any(log_ratios != null) else 1.0
    return p if math.isfinite(p) else 1.0


def look_p_values(log_ratios: Sequence[float], share: float, spec: TimingSpec) -> tuple[float, float]:
    """p / share of one look at the given starts: for "slower by more than margin" and "by less than detect"."""
    values = np.asarray(log_ratios, dtype=np.float64)
    return (
        _signed_rank_p(values, math.log1p(spec.margin), "greater") / share,
        _signed_rank_p(values, math.log1p(spec.detect), "less") / share,
    )


def slowdown_bounds(log_ratios: Sequence[float], low_level: float, high_level: float) -> tuple[float, float, float]:
    """Hodges-Lehmann estimate of the slowdown with one-sided bounds, by inverting the signed-rank test.

    Args:
        low_level: the lower bound is above the truth at most this often.
        high_level: the upper bound is below the truth at most this often.
    Returns:
        ``(estimate, low, high)``; a bound that no number of starts like this can give is infinite (-1 below).
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if not len(values):
        return math.nan, -1.0, math.inf
    rows, columns = np.triu_indices(len(values))
    walsh = np.sort((values[rows] + values[columns]) / 2)
    # between two Walsh averages the test's p is constant; outside all of them it is smallest
    cuts = np.concatenate([[walsh[0] - 1], (walsh[1:] + walsh[:-1]) / 2, [walsh[-1] + 1]])

    def rejected(index: int, alternative: Alternative, level: float) -> bool:
        return _signed_rank_p(values, float(cuts[index]), alternative) <= level

    # each test rejects up to (from) one cut and no further: the outermost cut on the other side is always kept
    n = len(walsh)
    below = bisect.bisect_left(range(n), True, key=lambda index: not rejected(index, "greater", low_level))
    above = bisect.bisect_left(range(1, n + 1), True, key=lambda index: rejected(index, "less", high_level))
    low = float(walsh[below - 1]) if below else -math.inf
    high = float(walsh[above]) if above < n else math.inf
    return tuple(float(np.expm1(value)) for value in (float(np.median(walsh)), low, high))  # type: ignore[return-value]


class _Tally:
    """Log ratios per metric and the decisions taken at the looks so far."""

    def __init__(self, spec: TimingSpec) -> None:
        self.spec = spec
        self.log_ratios: dict[str, list[float]] = {}
        self.decided: dict[str, tuple[Verdict, int]] = {}
        self.p: dict[str, tuple[float, float]] = {}

    def expect(self, metrics: Iterable[str]) -> None:
        for metric in metrics:
            self.log_ratios.setdefault(metric, [])
            self.p.setdefault(metric, (1.0, 1.0))

    def add(self, log_ratios: Mapping[str, float]) -> None:
        for metric, value in log_ratios.items():
            self.log_ratios[metric].append(value)

    def look(self) -> bool:
        """Judge if the number of starts is a look; whether every metric is decided."""
        counts = {len(values) for values in self.log_ratios.values()}
        if len(counts) != 1:
            raise ValueError(f"the starts do not all time the same metrics: {sorted(self.log_ratios)}")
        (starts,) = counts
        if starts not in self.spec.looks:
            return False
        share = float(self.spec.shares[self.spec.looks.index(starts)])
        open_metrics = self.log_ratios.keys() - self.decided.keys()
        for metric in open_metrics:
            now = look_p_values(self.log_ratios[metric], share, self.spec)
            before = self.p[metric]
            self.p[metric] = min(before[0], now[0]), min(before[1], now[1])
        levels = dict(zip(self.p, holm_levels([p for p, _ in self.p.values()], self.spec.alpha), strict=True))
        for metric in open_metrics:
            if self.p[metric][0] <= levels[metric]:
                self.decided[metric] = Verdict.REGRESS, starts
            elif self.p[metric][1] <= self.spec.beta:
                self.decided[metric] = Verdict.PASS, starts
        return len(self.decided) == len(self.log_ratios)

    def results(self) -> tuple[MetricResult, ...]:
        results = []
        for metric, values in self.log_ratios.items():
            verdict, starts = self.decided.get(metric, (None, len(values)))
            results.append(MetricResult(metric, verdict, tuple(values[:starts]), *self.p[metric]))
        return tuple(results)


def run_gate(starts: Iterable[Start], spec: TimingSpec) -> GateResult:
    """Take starts, live or recorded, until every metric is decided or the budget has ended.

    Args:
        starts: pulled one at a time; none is made after the decision.
    Raises:
        ValueError: a time that is not positive and finite; nothing is decided on it.
    """
    tally = _Tally(spec)
    used = voids = 0
    seconds = 0.0
    stopped = "nothing was timed"
    for start in starts:
        seconds += start.seconds
        tally.expect(metric for block in start.blocks for metric in block.sides)
        log_ratios = start.log_ratios(spec.canary_drift)
        if log_ratios is None:
            voids += 1
        else:
            used += 1
            tally.add(log_ratios)
            if tally.look():
                return GateResult(tally.results(), used, voids, seconds)
        stopped = f"undecided when the starts ended after {used}"
        if used >= spec.looks[-1]:
            stopped = f"undecided after the budget of {used} starts"
            break
        if voids > max(spec.max_voids, used):
            stopped = (
                f"the machine is too restless: in {voids} starts most blocks were void, their canary moved by "
                + (f"more than {spec.canary_drift:.0%}")
            )
            break
        if seconds > spec.max_seconds:
            stopped = f"undecided when the budget of {spec.max_seconds:g} s ended"
            break
    return GateResult(tally.results(), used, voids, seconds, stopped)


def findings(result: GateResult, spec: TimingSpec, subject: str) -> list[Finding]:
    """What a gate's result says, one finding per metric (a ratio head / base); undecided metrics are inconclusive.

    Raises:
        ValueError: nothing was timed at all, so that not even the metrics are known.
    """
    if not result.metrics:
        raise ValueError(f"{subject}: {result.stopped}")
    judged = []
    for metric in result.metrics:
        verdict = metric.verdict or Verdict.INCONCLUSIVE
        why = {
            Verdict.PASS: f"slower by less than {spec.detect:.0%}",
            Verdict.REGRESS: f"slower by more than {spec.margin:.0%}",
            Verdict.INCONCLUSIVE: str(result.stopped),
        }[verdict]
        limit = 1 + spec.margin
        if not metric.log_ratios:
            judged.append(Finding("timing", subject, metric.metric, verdict, why, limit=limit))
            continue
        ratios = tuple(1 + slowdown for slowdown in metric.bounds(spec))
        span = f"x{ratios[0]:.3f} ({ratios[1]:.3f} to {ratios[2]:.3f}, {len(metric.log_ratios)} starts)"
        change, low, high = (ratio if math.isfinite(ratio) else None for ratio in ratios)
        judged.append(
            Finding("timing", subject, metric.metric, verdict, f"{span}: {why}", None, None, change, low, high, limit)
        )
    return judged
