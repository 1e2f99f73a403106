"""Records a live A/A series: base and head are two processes of the same code, head also with extra work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from veloxbench import environment
from veloxbench.aa.series import BASE, Journal, Segment, Series, SeriesHeader, changed, open_journal, slot_name
from veloxbench.decode_timing import Canary, DecodeSpec, default_clock
from veloxbench.errors import UsageError
from veloxbench.timing_pairs import Slot, TimedBlock, extra_rows_for, pin_to_core, take_block
from veloxbench.worker import WORK_TIMEOUT_S, Worker, blas_threads

BENCHMARK = "decode"
SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.10)


@dataclass(frozen=True)
class RecordSpec:
    """What to record. ``relaunch_s``: both processes are started anew this often, so that the series samples what a
    start decides (where memory lies)."""

    decode: DecodeSpec
    hours: float
    slowdowns: Sequence[float] = SLOWDOWNS
    threads: int = 1
    core: int | None = None
    relaunch_s: float = 1800.0

    def __post_init__(self) -> None:
        if not self.hours > 0:
            raise UsageError(f"--hours {self.hours} must be above zero")
        if 0.0 not in self.slowdowns or min(self.slowdowns) < 0:
            raise UsageError(f"slowdowns {list(self.slowdowns)} must hold 0 (A/A) and nothing below")


def record(spec: RecordSpec, path: Path, message: Callable[[str], None]) -> None:
    """Record until the file holds ``spec.hours`` of blocks; stop at any time, the same call goes on.

    Raises:
        UsageError: the file holds a series of something else.
        WorkerError: a side died.
    """
    if spec.core is not None:
        pin_to_core(spec.core)
    with open_journal(path) as journal:
        recorded = journal.series.seconds if journal.series else 0.0
        progress = _Progress(spec.hours * 3600, recorded, message)
        while not progress.finished:
            with ExitStack() as stack:
                workers = start_pair(stack, spec.decode, spec.threads, path.with_suffix(".log"))
                header = _header(journal, spec, workers, message)
                _record_segment(journal, header, workers, progress, spec.relaunch_s)
    message(f"{path}: {progress.recorded / 3600:.2f} hours are recorded")


def start_pair(stack: ExitStack, decode: DecodeSpec, threads: int, log: Path) -> dict[str, Worker]:
    """Two processes of this code, each with the benchmark open."""
    environment = blas_threads(threads)
    workers = {side: stack.enter_context(Worker(side, log=log, environment=environment)) for side in ("base", "head")}
    for worker in workers.values():
        worker.ask("open_decode", timeout=WORK_TIMEOUT_S, name=BENCHMARK, spec=decode.model_dump(mode="json"))
    return workers


def slots(extra_rows: dict[float, int]) -> dict[str, Slot]:
    """The base, and the head at every slowdown."""
    head = {slot_name(slowdown): Slot("head", BENCHMARK, rows) for slowdown, rows in extra_rows.items()}
    return {BASE: Slot("base", BENCHMARK), **head}


def _header(
    journal: Journal, spec: RecordSpec, workers: dict[str, Worker], message: Callable[[str], None]
) -> SeriesHeader:
    hellos = [worker.ask("hello") for worker in workers.values()]
    now = {
        "decode": spec.decode.model_dump(mode="json"),
        "threads": spec.threads,
        "core": spec.core,
        "implementation": hellos[0]["implementation"],
        "versions": environment.versions(),
        "hardware": environment.hardware(),
    }
    if hellos[1]["implementation"] != now["implementation"]:
        raise UsageError("the code changed between the start of the two sides; start again")
    if journal.series is None:
        message("calibrating the extra work")
        rows = extra_rows_for(workers["head"], BENCHMARK, spec.slowdowns, default_clock(), np.random.default_rng(0))
        commit, dirty = environment.git_state()
        header = SeriesHeader.model_validate({**now, "extra_rows": rows, "commit": commit, "dirty": dirty})
        journal.append(header)
        journal.series = Series(header, ())
        return header
    header = journal.series.header
    differs = changed(header, now) + ([] if header.slowdowns == sorted(spec.slowdowns) else ["slowdowns"])
    if differs:
        raise UsageError(f"{journal.path} was begun with another {', '.join(differs)}; record into a new file")
    return header


def _record_segment(
    journal: Journal, header: SeriesHeader, workers: dict[str, Worker], progress: _Progress, limit_s: float
) -> None:
    seed = time.time_ns()
    rng, canary, started = np.random.default_rng(seed), Canary(), time.monotonic()
    group = slots(header.extra_rows)
    take_block(workers, [group], canary, rng)  # warms both sides
    journal.append(Segment(started=round(time.time(), 2), seed=seed, state=environment.machine_state()))
    while not progress.finished and time.monotonic() - started < limit_s:
        block = take_block(workers, [group], canary, rng)
        journal.append(block)
        progress.add(block)


class _Progress:
    """A line a minute: share done, time left, and how restless the machine is."""

    def __init__(self, target_s: float, recorded_s: float, message: Callable[[str], None]) -> None:
        self.target, self.recorded, self._message = target_s, recorded_s, message
        self._recent: list[TimedBlock] = []
        self._told = time.monotonic()

    @property
    def finished(self) -> bool:
        return self.recorded >= self.target

    def add(self, block: TimedBlock) -> None:
        self.recorded += block.seconds
        self._recent.append(block)
        if time.monotonic() - self._told >= 60 or self.finished:
            self._tell()

    def _tell(self) -> None:
        clock = default_clock()
        compared = [block.compared({BENCHMARK: (BASE, slot_name(0.0))}, clock) for block in self._recent]
        spread = np.std([block.log_ratio(BENCHMARK) for block in compared])
        drift = np.median([block.canary_drift for block in compared])
        base = np.median([block.samples(BASE, clock) for block in self._recent])
        left = max(self.target - self.recorded, 0) / 60
        self._message(
            f"[{min(self.recorded / self.target, 1):4.0%}, {left:.0f} min left] {len(self._recent)} blocks more; "
            f"step {1e3 * base:.1f} ms ({clock}), A/A {spread:.2%} per block, canary {drift:.2%}, "
            f"load {self._recent[-1].load:g}"
        )
        self._recent, self._told = [], time.monotonic()


def to_stderr(text: str) -> None:
    """One line for the user."""
    print(text, file=sys.stderr, flush=True)
