"""Live gates on the gate itself: the same code on both sides, and head slowed down by real extra work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from veloxbench.compare.timed_decode import Clock
from veloxbench.compare.timing_blocks import Launch, live_starts, pin_to_core
from veloxbench.compare.timing_test import GateResult, MetricResult, TimingSpec, run_gate
from veloxbench.errors import IntegrityError, UsageError
from veloxbench.gate.verdicts import Verdict
from veloxbench.records.frozen import Frozen
from veloxbench.records.journal import parsed_lines, read_content
from veloxbench.trials.timing_record import BENCHMARK, Setup, check_same, launcher, settled_header, slots
from veloxbench.trials.timing_series import BASE, SeriesHeader, append_line, appending, slot_name


class LiveGate(Frozen):
    """One gate that was run live, with the log ratio of each of its usable starts.

    Attributes:
        gate: its specification, :meth:`described`.
        load: the machine's load average over one minute, at the end.
    """

    kind: Literal["gate"] = "gate"
    started: float
    slowdown: float
    clock: Clock
    gate: dict[str, JsonValue]
    load: float
    verdict: Verdict
    log_ratios: tuple[float, ...]
    voids: int
    seconds: float
    stopped: str | None

    @staticmethod
    def described(spec: TimingSpec) -> dict[str, JsonValue]:
        """A specification as its fields, in JSON's types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(spec).items()}

    def result(self) -> GateResult:
        """The result that the gate gave (the p-values are not kept: the log ratios give them)."""
        verdict = None if self.verdict is Verdict.INCONCLUSIVE else self.verdict
        metric = MetricResult(BENCHMARK, verdict, self.log_ratios, 1.0, 1.0)
        return GateResult((metric,), len(self.log_ratios), self.voids, self.seconds, self.stopped)


@dataclass(frozen=True)
class LiveJournal:
    """Gates that were run live on one machine with one state of the code, which the header tells."""

    header: SeriesHeader
    gates: tuple[LiveGate, ...]


_LINE: TypeAdapter[SeriesHeader | LiveGate] = TypeAdapter(
    Annotated[SeriesHeader | LiveGate, Field(discriminator="kind")]
)


def read_live(path: Path) -> LiveJournal:
    """A header and the gates after it.

    Raises:
        UsageError: there is no such file.
        IntegrityError: a line that is neither, or out of place, naming file and line.
    """
    if not path.is_file():
        raise UsageError(f"there are no live gates at {path}; `veloxbench trial timing live --out {path}` runs them")
    header, gates = None, []
    for number, line in parsed_lines(path, read_content(path), _LINE.validate_json, "of live gates"):
        if isinstance(line, SeriesHeader) != (number == 1):
            raise IntegrityError(f"{path}:{number}: one header comes first, then the gates")
        if isinstance(line, SeriesHeader):
            header = line
        else:
            gates.append(line)
    if header is None:
        raise IntegrityError(f"{path} does not begin with a header")
    return LiveJournal(header, tuple(gates))


def run_live(
    setup: Setup,
    out: Path,
    slowdowns: Sequence[float],
    gates: int,
    spec: TimingSpec,
    clock: Clock,
    message: Callable[[str], None],
) -> LiveJournal:
    """Run gates until ``out`` holds so many of each slowdown, taking turns; the extra work is calibrated first.

    Raises:
        UsageError: ``out`` holds gates of something else, or no work for one of the slowdowns.
        WorkerError: a side died.
    """
    if setup.core is not None:
        pin_to_core(setup.core)
    launch = launcher(setup, out.with_suffix(".log"))
    with appending(out):
        begun = read_live(out) if out.exists() and out.stat().st_size else None
        recorded = begun.header if begun else None
        if recorded is not None:
            check_same(recorded, setup.asked(), out)  # before anything is loaded
        with ExitStack() as stack:
            workers = launch(stack, ["base", "head"])
            header = settled_header(recorded, workers, setup, sorted({0.0, *slowdowns}), out, message)
        if missing := [slowdown for slowdown in slowdowns if slowdown not in header.extra_rows]:
            known = ", ".join(f"{100 * slowdown:g}" for slowdown in header.slowdowns)
            raise UsageError(f"{out} has no slowdown of {100 * missing[0]:g}%, but {known}; run into a new file")
        if recorded is None:
            append_line(out, header)
        done = list(begun.gates) if begun else []
        while True:
            counts = {slowdown: sum(gate.slowdown == slowdown for gate in done) for slowdown in slowdowns}
            slowdown = min(counts, key=counts.__getitem__)
            if counts[slowdown] >= gates:
                return LiveJournal(header, tuple(done))
            gate, told = _run_one(launch, header, slowdown, spec, clock)
            append_line(out, gate)
            done.append(gate)
            message(f"[{len(done)} of {gates * len(slowdowns)}] {told}")


def _run_one(
    launch: Launch, header: SeriesHeader, slowdown: float, spec: TimingSpec, clock: Clock
) -> tuple[LiveGate, str]:
    """One gate, and a sentence on it."""
    metrics = {BENCHMARK: (BASE, slot_name(slowdown))}
    started, seed = time.time(), time.time_ns()
    starts = live_starts(launch, [slots(header, slowdown)], metrics, clock, spec.blocks_per_start, seed)
    result = run_gate(starts, spec)
    metric = result.metrics[0]
    gate = LiveGate(
        started=round(started, 2),
        slowdown=slowdown,
        clock=clock,
        gate=LiveGate.described(spec),
        load=round(os.getloadavg()[0], 2),
        verdict=metric.verdict or Verdict.INCONCLUSIVE,
        log_ratios=metric.log_ratios,
        voids=result.voids,
        seconds=round(result.seconds, 2),
        stopped=result.stopped,
    )
    estimate, low, high = metric.bounds(spec)
    return gate, (
        f"{slot_name(slowdown)}: {gate.verdict} after {result.starts} starts, {result.voids} void, "
        f"{result.seconds:.0f} s; {estimate:+.1%} ({low:+.1%} to {high:+.1%})"
    )
