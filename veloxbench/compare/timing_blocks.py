"""Live starts and their blocks: two workers, told in turn to take a sample, with the canary before and after."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from veloxbench.compare.side import WORK_TIMEOUT_S, Worker
from veloxbench.compare.timed_decode import Canary, Clock, DecodeSpec, StepTimes
from veloxbench.compare.timing_test import Block, Start, mirrored_order
from veloxbench.errors import UsageError
from veloxbench.records.frozen import Frozen


@dataclass(frozen=True)
class Slot:
    """One thing to time in a block: which side does it, on which of its benchmarks, with how much extra work."""

    side: str
    benchmark: str
    extra_rows: int = 0


class TimedBlock(Frozen):
    """One block as it was measured.

    Attributes:
        started: seconds since the epoch.
        order: name of the slot of every sample, in the order in which they were taken.
        wall_us, cpu_us: the steps of every sample, in microseconds.
        canary_wall_us, canary_cpu_us: the canary's repeats before and after.
        load: the machine's load average over one minute, at the end.
    """

    kind: Literal["block"] = "block"
    started: float
    seconds: float
    order: tuple[str, ...]
    wall_us: tuple[tuple[int, ...], ...]
    cpu_us: tuple[tuple[int, ...], ...]
    canary_wall_us: tuple[tuple[int, ...], ...]
    canary_cpu_us: tuple[tuple[int, ...], ...]
    load: float

    def samples(self, slot: str, clock: Clock) -> list[float]:
        """Seconds of each sample of a slot, see :meth:`StepTimes.seconds`."""
        rows = zip(self.order, self.wall_us, self.cpu_us, strict=True)
        return [StepTimes(wall_us=wall, cpu_us=cpu).seconds(clock) for name, wall, cpu in rows if name == slot]

    def canary(self, clock: Clock) -> list[float]:
        """Seconds of each reading of the canary."""
        readings = zip(self.canary_wall_us, self.canary_cpu_us, strict=True)
        return [StepTimes(wall_us=wall, cpu_us=cpu).seconds(clock) for wall, cpu in readings]

    def compared(self, metrics: Mapping[str, tuple[str, str]], clock: Clock) -> Block:
        """The block as the gate sees it.

        Args:
            metrics: metric -> (base's slot, head's slot).
        """
        sides = {
            metric: (self.samples(base, clock), self.samples(head, clock)) for metric, (base, head) in metrics.items()
        }
        return Block(sides, self.canary(clock), self.seconds)


def take_block(
    workers: Mapping[str, Worker],
    groups: Sequence[Mapping[str, Slot]],
    canary: Canary,
    rng: np.random.Generator,
) -> TimedBlock:
    """Time every slot of every group twice, each group in a mirrored random order.

    Args:
        workers: by the name of their side; their benchmarks are open.
        groups: slots by name, compared with each other; names are unique across groups.
    """
    started, clock = time.time(), time.perf_counter()
    order, samples, canaries = [], [], [canary.read()]
    for group in groups:
        for name in mirrored_order(list(group), rng):
            slot = group[name]
            answer = workers[slot.side].ask("decode", name=slot.benchmark, extra_rows=slot.extra_rows)
            order.append(name)
            samples.append(StepTimes.model_validate(answer))
    canaries.append(canary.read())
    return TimedBlock(
        started=round(started, 2),
        seconds=round(time.perf_counter() - clock, 3),
        order=tuple(order),
        wall_us=tuple(sample.wall_us for sample in samples),
        cpu_us=tuple(sample.cpu_us for sample in samples),
        canary_wall_us=tuple(reading.wall_us for reading in canaries),
        canary_cpu_us=tuple(reading.cpu_us for reading in canaries),
        load=round(os.getloadavg()[0], 2),
    )


def open_decode(worker: Worker, name: str, decode: DecodeSpec) -> None:
    """Have a side load a decode benchmark under a name.

    Raises:
        WorkFailed: it raised there.
        WorkerError: the side died.
    """
    worker.ask("open_decode", timeout=WORK_TIMEOUT_S, name=name, spec=decode.model_dump(mode="json"))


Launch = Callable[[ExitStack, Sequence[str]], Mapping[str, Worker]]
"""Starts the sides in the given order, their benchmarks open; they end with the stack."""


def live_starts(
    launch: Launch,
    groups: Sequence[Mapping[str, Slot]],
    metrics: Mapping[str, tuple[str, str]],
    clock: Clock,
    blocks_per_start: int,
    seed: int,
) -> Iterator[Start]:
    """Starts as the gate wants them, made when it asks for the next one; an untimed block first warms both sides.

    Args:
        launch: called for each start, with the sides in a random order.
        metrics: metric -> (base's slot, head's slot).
    """
    canary, rng = Canary(), np.random.default_rng(seed)
    while True:
        began = time.perf_counter()
        with ExitStack() as stack:
            workers = launch(stack, side_order(rng))
            take_block(workers, groups, canary, rng)
            launch_seconds = time.perf_counter() - began
            timed = [take_block(workers, groups, canary, rng) for _ in range(blocks_per_start)]
        yield Start([block.compared(metrics, clock) for block in timed], launch_seconds)


def side_order(rng: np.random.Generator) -> list[str]:
    """The order in which the sides are started, drawn, because whichever is started first finds other memory."""
    return list(rng.permutation(["base", "head"]))


def extra_rows_for(
    worker: Worker,
    benchmark: str,
    slowdowns: Sequence[float],
    clock: Clock,
    rng: np.random.Generator,
    repeats: int = 40,
    passes: int = 3,
) -> dict[float, int]:
    """Rows of extra work that slow a step down by the given shares, from what whole passes cost here and now.

    Several passes, because a block scatters by 3 to 4% and one pass costs 10%: from 16 blocks of one pass, two
    calibrations of the same machine differed by a factor of two. What the rows really cost is measured by the series
    itself, far better than ``repeats`` mirrored blocks can.

    Raises:
        UsageError: extra work does not show.
    """
    extra: int = passes * worker.ask("extra_rows_at_once", name=benchmark)
    costs = []
    for _ in range(repeats):
        seconds: dict[int, list[float]] = {0: [], extra: []}
        for rows in mirrored_order([0, extra], rng):
            times = StepTimes.model_validate(worker.ask("decode", name=benchmark, extra_rows=rows))
            seconds[rows].append(times.seconds(clock))
        costs.append(sum(seconds[extra]) / sum(seconds[0]) - 1)
    cost = statistics.median(costs)
    if cost <= 0:
        raise UsageError(f"extra work of {extra} rows does not slow a step down ({cost:+.1%})")
    return {slowdown: round(slowdown / cost * extra) for slowdown in slowdowns}


def pin_to_core(core: int) -> None:
    """Keep this process, and those that it starts, on one core.

    Raises:
        UsageError: the system cannot, or there is no such core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("--core needs Linux: this system does not let a process choose its core")
    try:
        os.sched_setaffinity(0, {core})
    except OSError as error:
        raise UsageError(f"--core {core}: this machine has cores 0..{(os.cpu_count() or 1) - 1}") from error
