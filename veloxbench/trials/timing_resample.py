"""Thousands of gates drawn from a recorded series: the error rates and the power of the timing gate, with intervals.

A gate's starts are drawn as a moving-block bootstrap (Künsch 1989): stretches of :data:`STRETCH` starts that followed
each other, each from a random place of the series, one after the other until the gate ends; of each start the blocks
of one slowdown. What the machine did over minutes is in them. Beside them stand the gates that are in the series as
they are, one after the other from its beginning: fewer, and theirs are the intervals that an independent experiment of
this length deserves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import JsonValue
from scipy import stats

from veloxbench.compare.timed_decode import Clock
from veloxbench.compare.timing_test import GateResult, Start, TimingSpec, run_gate, slowdown_bounds
from veloxbench.errors import UsageError
from veloxbench.gate.verdicts import Verdict
from veloxbench.records.frozen import Frozen
from veloxbench.records.journal import parsed, read_content
from veloxbench.trials.timing_live import LiveGate, LiveJournal
from veloxbench.trials.timing_record import BENCHMARK
from veloxbench.trials.timing_series import BASE, Series, SeriesHeader, read_series, series_bytes, slot_name

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
STRETCH = 8
"""Starts that a resampled gate takes as they followed each other: minutes of the machine's time."""


class Rate(Frozen):
    """``count`` of ``gates``, with its Clopper-Pearson interval (95%)."""

    count: int
    gates: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.gates

    @classmethod
    def of(cls, count: int, gates: int) -> Rate:
        """A rate with its interval."""
        interval = stats.binomtest(count, gates).proportion_ci(CONFIDENCE, method="exact")
        return cls(count=count, gates=gates, low=float(interval.low), high=float(interval.high))


class Cost(Frozen):
    """What gates took to end: median and 95% quantile."""

    starts: tuple[float, float]
    seconds: tuple[float, float]


class Outcomes(Frozen):
    """How often gates ended in each verdict, and what they took."""

    regress: Rate
    passed: Rate
    inconclusive: Rate
    cost: Cost


class LiveOutcomes(Frozen):
    """Gates run live with one slowdown: how they ended, and the slowdown over all their starts with its 95% bounds.

    The extra work is calibrated anew for every journal, on its own machine, so that it measures its own slowdown.
    """

    measured: tuple[float, float, float]
    outcomes: Outcomes


class Effect(Frozen):
    """One slowdown: what was asked for, what the series measured, and how gates ended.

    Attributes:
        measured: slowdown over all starts, with its 95% bounds.
        block_sd: standard deviation of a usable block's log ratio within its start.
        start_sd: standard deviation of the starts' log ratios, that of the blocks within them taken off.
        resampled: gates of stretches from random places.
        disjoint: gates one after the other; None where the series is too short.
        live: gates run live with this slowdown, if any.
    """

    slowdown: float
    measured: tuple[float, float, float]
    block_sd: float
    start_sd: float
    resampled: Outcomes
    disjoint: Outcomes | None
    live: LiveOutcomes | None = None


class SeriesSummary(Frozen):
    """The recorded series, by hash of its uncompressed lines."""

    sha256: str
    header: SeriesHeader
    hours: float
    blocks: int
    starts: int
    runs: int
    void_share: float
    load: tuple[float, float]
    """Median and 95% quantile of the machine's load while it was recorded."""
    block_seconds: float
    """Mean time of a block."""
    launch_seconds: float
    """Mean time of starting both sides."""


class LiveSummary(Frozen):
    """What a journal of live gates ran on: its header, how many gates, how restless the machine was."""

    header: SeriesHeader
    gates: int
    load: float
    """The machine's load, median over the gates."""
    void_share: float
    """Share of all starts of which most blocks were void."""


class ErrorRates(Frozen):
    """The measured error rates of the timing gate; every documented figure comes from here."""

    schema_version: Literal[3] = 3
    series: SeriesSummary
    gate: dict[str, JsonValue]
    clock: Clock
    seed: int
    effects: tuple[Effect, ...]
    live: tuple[LiveSummary, ...] = ()


def starts_of(series: Series, slowdown: float, clock: Clock, blocks_per_start: int) -> list[list[Start]]:
    """The starts as a gate sees them, in the series' runs: of each the first blocks of one slowdown.

    A start with fewer of them (the recorder was stopped) ends its run.
    """
    slot = slot_name(slowdown)
    metrics = {BENCHMARK: (BASE, slot)}
    runs: list[list[Start]] = []
    for run in series.runs:
        runs.append([])
        for started in run:
            of_slot = [block for block in started.blocks if slot in block.order][:blocks_per_start]
            if len(of_slot) == blocks_per_start:
                runs[-1].append(Start([b.compared(metrics, clock) for b in of_slot], started.launch_seconds))
            else:
                runs.append([])
    return [run for run in runs if run]


def outcomes(results: Sequence[GateResult]) -> Outcomes:
    """Rates and costs of some gates.

    Raises:
        UsageError: there are none.
    """
    if not results:
        raise UsageError("no gate was run: there is nothing to count")
    verdicts = [result.metrics[0].verdict for result in results]

    def quantiles(values: Sequence[float]) -> tuple[float, float]:
        return float(np.median(values)), float(np.quantile(values, 0.95))

    return Outcomes(
        regress=Rate.of(verdicts.count(Verdict.REGRESS), len(results)),
        passed=Rate.of(verdicts.count(Verdict.PASS), len(results)),
        inconclusive=Rate.of(verdicts.count(None), len(results)),
        cost=Cost(
            starts=quantiles([result.starts + result.voids for result in results]),
            seconds=quantiles([result.seconds for result in results]),
        ),
    )


def resampled_gates(
    runs: Sequence[Sequence[Start]], spec: TimingSpec, gates: int, rng: np.random.Generator
) -> list[GateResult]:
    """Gates of stretches from random places of the series; none crosses a gap.

    Raises:
        UsageError: no run of the series is as long as a stretch.
    """
    places = [(run, first) for run in runs for first in range(len(run) - STRETCH + 1)]
    if not places:
        longest = max((len(run) for run in runs), default=0)
        raise UsageError(
            f"the series' longest run without a gap has {longest} starts; gates are drawn in stretches of {STRETCH}: "
            "record longer"
        )

    def stretches() -> Iterator[Start]:
        while True:
            run, first = places[int(rng.integers(len(places)))]
            yield from run[first : first + STRETCH]

    return [run_gate(stretches(), spec) for _ in range(gates)]


def disjoint_gates(runs: Sequence[Sequence[Start]], spec: TimingSpec) -> list[GateResult]:
    """Gates one after the other, each from where the last one ended; one that its run's end cut off is left out."""
    gates = []
    for run in runs:
        first = 0
        while first < len(run):
            gate = run_gate(iter(run[first:]), spec)
            first += gate.starts + gate.voids
            if gate.decided or first < len(run):
                gates.append(gate)
    return gates


def error_rates(
    path: Path,
    spec: TimingSpec,
    clock: Clock,
    gates: int = 1000,
    seed: int = 0,
    live: Sequence[LiveJournal] = (),
    message: Callable[[str], None] = lambda _: None,
) -> ErrorRates:
    """Measure the gate on a series.

    Raises:
        UsageError: the series is too short for a gate, or a live gate had another ``spec`` or ``clock``, or timed
            something else than the series.
        IntegrityError: the series is damaged.
    """
    asked = LiveGate.described(spec)
    series, digest = read_series(path), hashlib.sha256(series_bytes(path)).hexdigest()
    live_gates = [gate for journal in live for gate in journal.gates]
    _check_live(live, series.header, asked, clock)
    rng = np.random.default_rng(seed)
    effects = []
    for slowdown in series.header.slowdowns:
        runs = starts_of(series, slowdown, clock, spec.blocks_per_start)
        ratios = [usable[BENCHMARK] for run in runs for start in run if (usable := start.log_ratios(spec.canary_drift))]
        block_sd, start_sd = _scatter([start for run in runs for start in run], spec)
        disjoint = disjoint_gates(runs, spec)
        effects.append(
            Effect(
                slowdown=slowdown,
                measured=slowdown_bounds(ratios, TAIL, TAIL),
                block_sd=block_sd,
                start_sd=start_sd,
                resampled=outcomes(resampled_gates(runs, spec, gates, rng)),
                disjoint=outcomes(disjoint) if disjoint else None,
                live=_live_outcomes([gate for gate in live_gates if gate.slowdown == slowdown]),
            )
        )
        message(f"{slot_name(slowdown)}: {effects[-1].resampled.regress.count} of {gates} regress")
    return ErrorRates(
        series=_summary(series, digest, clock, spec),
        gate=asked,
        clock=clock,
        seed=seed,
        effects=tuple(effects),
        live=tuple(_live_summary(journal) for journal in live if journal.gates),
    )


def _check_live(live: Sequence[LiveJournal], series: SeriesHeader, asked: Mapping[str, object], clock: Clock) -> None:
    gates = [gate for journal in live for gate in journal.gates]
    if strangers := [gate for gate in gates if (gate.clock, gate.gate) != (clock, asked)]:
        raise UsageError(
            f"{len(strangers)} of {len(gates)} live gates were run with another clock or specification than {clock} "
            f"time and {asked}: run them anew"
        )
    for journal in live:
        if (journal.header.decode, journal.header.threads) != (series.decode, series.threads):
            raise UsageError("the live gates timed another benchmark, or with other threads, than the series")
    if unknown := {gate.slowdown for gate in gates} - set(series.slowdowns):
        raise UsageError(f"there are live gates of a slowdown of {100 * min(unknown):g}%, which the series has not")


def _live_outcomes(gates: Sequence[LiveGate]) -> LiveOutcomes | None:
    if not gates:
        return None
    ratios = [ratio for gate in gates for ratio in gate.log_ratios]
    return LiveOutcomes(
        measured=slowdown_bounds(ratios, TAIL, TAIL), outcomes=outcomes([gate.result() for gate in gates])
    )


def _live_summary(journal: LiveJournal) -> LiveSummary:
    voids = sum(gate.voids for gate in journal.gates)
    starts = voids + sum(len(gate.log_ratios) for gate in journal.gates)
    return LiveSummary(
        header=journal.header,
        gates=len(journal.gates),
        load=float(np.median([gate.load for gate in journal.gates])),
        void_share=voids / starts,
    )


def _scatter(starts: Sequence[Start], spec: TimingSpec) -> tuple[float, float]:
    """Standard deviations of a block within its start, and of what a start adds (one-way analysis of variance)."""
    groups = [
        [block.log_ratio(BENCHMARK) for block in start.usable(spec.canary_drift)]
        for start in starts
        if start.log_ratios(spec.canary_drift) is not None
    ]
    freedom = sum(len(group) - 1 for group in groups)
    if len(groups) < 2 or not freedom:
        return 0.0, 0.0
    within = sum(float(np.var(group)) * len(group) for group in groups) / freedom
    noise_of_means = within * float(np.mean([1 / len(group) for group in groups]))
    between = float(np.var([np.mean(group) for group in groups], ddof=1)) - noise_of_means
    return float(np.sqrt(within)), float(np.sqrt(max(between, 0.0)))


def _summary(series: Series, digest: str, clock: Clock, spec: TimingSpec) -> SeriesSummary:
    blocks = [block for start in series.starts for block in start.blocks]
    void = [block.compared({}, clock).canary_drift > spec.canary_drift for block in blocks]
    loads = [block.load for block in blocks]
    return SeriesSummary(
        sha256=digest,
        header=series.header,
        hours=series.seconds / 3600,
        blocks=len(blocks),
        starts=len(series.starts),
        runs=len(series.runs),
        void_share=float(np.mean(void)),
        load=(float(np.median(loads)), float(np.quantile(loads, 0.95))),
        block_seconds=float(np.mean([block.seconds for block in blocks])),
        launch_seconds=float(np.mean([start.launch_seconds for start in series.starts])),
    )


def read_error_rates(path: Path) -> ErrorRates:
    """A record that ``veloxbench trial timing resample`` wrote.

    Raises:
        UsageError: there is none.
        IntegrityError: it is not valid.
    """
    if not path.is_file():
        raise UsageError(f"there are no error rates at {path}; `veloxbench trial timing resample` makes them")
    return parsed(read_content(path), ErrorRates.model_validate_json, str(path), "a record of error rates")
