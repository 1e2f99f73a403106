"""Live gates on the gate itself: the same code on both sides, and head slowed down by real extra work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from veloxbench.aa.record import BENCHMARK, check_same, circumstances, launcher, slots
from veloxbench.aa.series import BASE, append_line, read_series, slot_name, sole_writer
from veloxbench.decode_timing import Clock
from veloxbench.durable import whole_lines
from veloxbench.errors import IntegrityError, UsageError
from veloxbench.store import validation_reason
from veloxbench.timing_gate import GateResult, MetricResult, TimingSpec, run_gate
from veloxbench.timing_pairs import live_starts, pin_to_core
from veloxbench.verdicts import Verdict


class LiveGate(BaseModel):
    """One gate that was run live, with the log ratio of each of its usable starts.

    Attributes:
        gate: its specification, :meth:`described`.
        implementation: hash of the code that both sides ran.
        core: both sides were kept on it; None where they were not.
        load: the machine's load average over one minute, at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gate"] = "gate"
    started: float
    slowdown: float
    clock: Clock
    gate: dict[str, JsonValue]
    implementation: str
    core: int | None
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
        """As the gate gave it (the p-values are not kept: the log ratios give them)."""
        verdict = None if self.verdict is Verdict.INCONCLUSIVE else self.verdict
        metric = MetricResult(BENCHMARK, verdict, self.log_ratios, 1.0, 1.0)
        return GateResult((metric,), len(self.log_ratios), self.voids, self.seconds, self.stopped)


def read_live(path: Path) -> list[LiveGate]:
    """The gates of a journal.

    Raises:
        IntegrityError: a line that is not one, naming file and line.
    """
    gates = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(whole_lines(content), start=1):
        try:
            gates.append(LiveGate.model_validate_json(line))
        except ValidationError as error:
            raise IntegrityError(f"{path}:{number} is not a live gate: {validation_reason(error)}") from error
    return gates


def run_live(
    series: Path,
    out: Path,
    slowdowns: Sequence[float],
    gates: int,
    spec: TimingSpec,
    clock: Clock,
    message: Callable[[str], None],
    core: int | None = None,
) -> list[LiveGate]:
    """Run gates until ``out`` holds so many of each slowdown, taking turns.

    Args:
        series: whose benchmark, threads and calibrated extra work are used.
        core: keep both sides on this core; None: on the series' own.
    Raises:
        UsageError: the series has no such slowdown, or was timed by other code or on another machine.
        WorkerError: a side died.
    """
    header = read_series(series).header
    missing = [slowdown for slowdown in slowdowns if slowdown not in header.extra_rows]
    if missing:
        known = ", ".join(f"{100 * slowdown:g}" for slowdown in header.slowdowns)
        raise UsageError(f"{series} has no slowdown of {100 * missing[0]:g}%; it has {known}")
    core = header.core if core is None else core
    if core is not None:
        pin_to_core(core)
    launch = launcher(header.decode, header.threads, out.with_suffix(".log"))
    with sole_writer(out):
        with ExitStack() as stack:
            now = circumstances(launch(stack, ["base", "head"]), header.decode, header.threads, header.core)
            implementation = now.pop("implementation")  # may have moved on: what is gated is kept with each gate
            check_same(header, now, series)
        done = read_live(out)
        while True:
            counts = {slowdown: sum(gate.slowdown == slowdown for gate in done) for slowdown in slowdowns}
            slowdown = min(counts, key=counts.__getitem__)
            if counts[slowdown] >= gates:
                return done
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
                implementation=implementation,
                core=core,
                load=round(os.getloadavg()[0], 2),
                verdict=metric.verdict or Verdict.INCONCLUSIVE,
                log_ratios=metric.log_ratios,
                voids=result.voids,
                seconds=round(result.seconds, 2),
                stopped=result.stopped,
            )
            append_line(out, gate)
            done.append(gate)
            estimate, low, high = metric.bounds(spec)
            span = f"{estimate:+.1%} ({low:+.1%} to {high:+.1%})"
            message(
                f"[{len(done)} of {gates * len(slowdowns)}] {slot_name(slowdown)}: {gate.verdict} after "
                f"{result.starts} starts, {result.voids} void, {result.seconds:.0f} s; {span}"
            )
