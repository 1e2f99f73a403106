"""Records a live A/A series: base and head are two processes of the same code, head also with extra work.

A round holds one block of every slowdown, in random order; each block is one as a live gate takes it. After as many
rounds as a gate takes blocks in a start, both sides are started anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veloxbench.compare.side import Worker, steady_environment
from veloxbench.compare.timed_decode import Canary, DecodeSpec, default_clock
from veloxbench.compare.timing_blocks import (
    Launch,
    Slot,
    TimedBlock,
    extra_rows_for,
    open_decode,
    pin_to_core,
    side_order,
    take_block,
)
from veloxbench.compare.timing_test import TimingSpec
from veloxbench.errors import UsageError
from veloxbench.measure import machine
from veloxbench.records import provenance
from veloxbench.trials.timing_series import BASE, Segment, SeriesHeader, append_line, appending, read_series, slot_name

BENCHMARK = "decode"
SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.10)
"""What head is slowed down by; 0 is A/A."""


@dataclass(frozen=True)
class Setup:
    """What is timed, with how many BLAS threads a side, on which core (None: wherever the system puts it)."""

    decode: DecodeSpec
    threads: int = 1
    core: int | None = None

    def asked(self) -> dict[str, Any]:
        """The setup as the fields of a header."""
        return {"decode": self.decode.model_dump(mode="json"), "threads": self.threads, "core": self.core}


@dataclass(frozen=True)
class RecordSpec:
    """What to record."""

    setup: Setup
    hours: float
    rounds_per_start: int = TimingSpec().blocks_per_start

    def __post_init__(self) -> None:
        if not self.hours > 0:
            raise UsageError(f"--hours {self.hours} must be above zero")


def record(spec: RecordSpec, path: Path, message: Callable[[str], None]) -> None:
    """Record until the file holds ``spec.hours`` of blocks; stop at any time, the same call goes on.

    Raises:
        UsageError: the file holds a series of something else.
        WorkerError: a side died.
    """
    if spec.setup.core is not None:
        pin_to_core(spec.setup.core)
    with appending(path):
        begun = read_series(path) if path.exists() and path.stat().st_size else None
        header = None if begun is None else begun.header
        if header is not None:
            check_same(header, spec.setup.asked(), path)  # before anything is loaded
        progress = _Progress(spec.hours * 3600, 0.0 if begun is None else begun.seconds, message)
        launch = launcher(spec.setup, path.with_suffix(".log"))
        while not progress.finished:
            header = _record_start(path, header, spec, launch, progress, message)
    message(f"{path}: {progress.recorded / 3600:.2f} hours are recorded")


def launcher(setup: Setup, log: Path) -> Launch:
    """Starts two processes of this code, each with the benchmark open."""

    def launch(stack: ExitStack, order: Sequence[str]) -> dict[str, Worker]:
        workers = {}
        for side in order:
            worker = workers[side] = stack.enter_context(
                Worker(side, log=log, environment=steady_environment(setup.threads))
            )
            open_decode(worker, BENCHMARK, setup.decode)
        return workers

    return launch


def slots(header: SeriesHeader, slowdown: float) -> dict[str, Slot]:
    """The base, and the head slowed down: one block's slots."""
    rows = header.extra_rows[slowdown]
    return {BASE: Slot("base", BENCHMARK), slot_name(slowdown): Slot("head", BENCHMARK, rows)}


def _circumstances(workers: Mapping[str, Worker], setup: Setup) -> dict[str, Any]:
    """The fields of a header that must stay as they are while a series grows.

    Raises:
        UsageError: the two sides run different code.
    """
    code = {worker.ask("hello")["implementation"] for worker in workers.values()}
    if len(code) != 1:
        raise UsageError("the code changed between the start of the two sides; start again")
    return setup.asked() | {
        "implementation": code.pop(),
        "harness": provenance.timing_hash(),
        "versions": provenance.versions(),
        "hardware": machine.hardware(),
    }


def check_same(header: SeriesHeader, now: dict[str, Any], path: Path) -> None:
    """Nothing that moves a time has changed since the series began.

    Raises:
        UsageError: something has; names it.
    """
    recorded = header.model_dump(mode="json")
    if header.harness is None:
        recorded["harness"] = now.get("harness")
    differs = [name for name, value in now.items() if recorded[name] != value]
    if differs:
        raise UsageError(f"{path} was recorded with another {', '.join(differs)}; record into a new file")


def settled_header(
    recorded: SeriesHeader | None,
    workers: Mapping[str, Worker],
    setup: Setup,
    slowdowns: Sequence[float],
    path: Path,
    message: Callable[[str], None],
) -> SeriesHeader:
    """The header of what is recorded into ``path``: its own, if nothing has changed since, or a calibrated new one.

    Raises:
        UsageError: something that moves a time has changed; names it.
    """
    now = _circumstances(workers, setup)
    if recorded is not None:
        check_same(recorded, now, path)
        return recorded
    message("calibrating the extra work")
    rows = extra_rows_for(workers["head"], BENCHMARK, slowdowns, default_clock(), np.random.default_rng(0))
    commit, dirty = provenance.git_state()
    return SeriesHeader.model_validate({**now, "extra_rows": rows, "commit": commit, "dirty": dirty})


def _record_start(
    path: Path,
    recorded: SeriesHeader | None,
    spec: RecordSpec,
    launch: Launch,
    progress: _Progress,
    message: Callable[[str], None],
) -> SeriesHeader:
    """Start both sides and record their blocks behind what is there; returns the header of the file."""
    seed = time.time_ns()
    rng, canary, began = np.random.default_rng(seed), Canary(), time.perf_counter()
    with ExitStack() as stack:
        order = side_order(rng)
        workers = launch(stack, order)
        header = settled_header(recorded, workers, spec.setup, SLOWDOWNS, path, message)
        if recorded is None:
            append_line(path, header)
        groups = [slots(header, slowdown) for slowdown in header.slowdowns]
        take_block(workers, groups, canary, rng)  # warms both sides
        started = round(time.time(), 2)
        append_line(path, Segment(started=started, seed=seed, first=order[0], state=provenance.machine_state()))
        progress.launched(time.perf_counter() - began)
        for _ in range(spec.rounds_per_start):
            for index in rng.permutation(len(groups)):
                block = take_block(workers, [groups[index]], canary, rng)
                append_line(path, block)
                progress.add(block)
    return header


class _Progress:
    """A line a minute: share done, time left, and how restless the machine is."""

    def __init__(self, target_s: float, recorded_s: float, message: Callable[[str], None]) -> None:
        self.target, self.recorded, self._message = target_s, recorded_s, message
        self._recent: list[TimedBlock] = []
        self._told = time.monotonic()

    @property
    def finished(self) -> bool:
        return self.recorded >= self.target

    def launched(self, seconds: float) -> None:
        """Count the time of a start, as a gate does."""
        self.recorded += seconds

    def add(self, block: TimedBlock) -> None:
        """Count a block, and tell the user from time to time."""
        self.recorded += block.seconds
        self._recent.append(block)
        if time.monotonic() - self._told >= 60 or self.finished:
            self._tell()

    def _tell(self) -> None:
        clock, plain = default_clock(), slot_name(0.0)
        compared = [block.compared({BENCHMARK: (BASE, plain)}, clock) for block in self._recent if plain in block.order]
        if not compared:
            return
        ratios = [block.log_ratio(BENCHMARK) for block in compared]
        drift = np.median([block.canary_drift for block in compared])
        base = np.median([block.samples(BASE, clock) for block in self._recent])
        left = max(self.target - self.recorded, 0) / 60
        self._message(
            f"[{min(self.recorded / self.target, 1):4.0%}, {left:.0f} min left] {len(self._recent)} blocks more; "
            f"step {1e3 * base:.1f} ms ({clock}), A/A {np.mean(ratios):+.2%} sd {np.std(ratios):.2%}, "
            f"canary {drift:.2%}, load {self._recent[-1].load:g}"
        )
        self._recent, self._told = [], time.monotonic()
