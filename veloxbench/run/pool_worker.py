"""A worker of a pool: a process that measures the cells that it is sent, one at a time, and says what it is made of.

It is a dask worker with one thread. What a run may ask of it are :func:`greet` and :func:`carry_out`; the process
outlives the scheduler, waits for the next one, and gives it what it measured meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
import platform
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from veloxbench.errors import UnfitEnvironmentError, UsageError
from veloxbench.inputs.models import resolve_model
from veloxbench.inputs.transfer_progress import default_reporter
from veloxbench.measure.machine import hardware, machine_class
from veloxbench.measure.suite import Measurement, get_suite, known_suites
from veloxbench.methods.registry import reference_of
from veloxbench.records.arm import Arm
from veloxbench.records.provenance import project_state
from veloxbench.records.record import NO_MODEL
from veloxbench.records.suites import MovedBy
from veloxbench.run.plan import measurement, model_ref
from veloxbench.run.progress import LineProgress
from veloxbench.run.runner import Crash
from veloxbench.run.session import OnBench, measure

KEPT = 32
"""Finished records that a worker remembers: a scheduler that dies may not have delivered the last ones."""


@dataclass(frozen=True)
class Order:
    """A cell to measure, with the tokens that it reads.

    Attributes:
        model: as the grid names it; None where none is read.
        run: whose cell it is; what is remembered is given to the same run alone.
    """

    item: Measurement
    model: str | None
    n_layers: int | None
    accept_licence: bool
    run: str


def need_dask() -> None:
    """Look for dask, which is an extra of this package.

    Raises:
        UnfitEnvironmentError: it is not installed.
    """
    if importlib.util.find_spec("distributed") is None:
        raise UnfitEnvironmentError(
            "a pool needs the package distributed, which is not installed: `pip install 'veloxbench[pool]'`"
        )


def own_code() -> str:
    """Hash of this file: both ends of an order must be of one state."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def greet(asked: dict[str, Any]) -> dict[str, Any]:
    """What this worker is, or why it cannot take part.

    Args:
        asked: the run's ``pool`` (:func:`own_code`), ``suites`` (each one's hash), ``arms`` (pairs of an arm and its
            implementation), ``project`` (state of the checkout) and ``run``.
    """
    refusal = _other_code(asked)
    if refusal is not None:
        _SAID.message(f"refused by the run: {refusal}")
    return {
        "refusal": refusal,
        "machine": f"{platform.node()} {uuid.getnode():x}",
        "chip": str(hardware()["chip"]),
        "classes": {kind: machine_class(kind) for kind in get_args(MovedBy)},
        "holds": [key for run, key in list(_TAKEN) if run == asked["run"]],
    }


def _other_code(asked: dict[str, Any]) -> str | None:
    """How the code here differs from the run's, or None."""
    pairs = [("the code of pools", own_code(), asked["pool"])]
    try:
        for name, there in asked["suites"].items():
            pairs.append((f"the code that measures {name}", get_suite(name).harness(), there))
        for arm, there in asked["arms"]:
            pairs.append((f"{arm['name']}", reference_of(Arm(**arm)).implementation, there))
    except UsageError as error:
        return f"it cannot take every cell: {error}"
    pairs.append(("the project's checkout", str(project_state(Path.cwd())), asked["project"]))
    for what, here, there in pairs:
        if here != there:
            return f"{what} is {here[:40]} there and {there[:40]} in this run"
    return None


_LOCK = threading.Lock()
_MEASURING = ThreadPoolExecutor(1, thread_name_prefix="measuring")
_TAKEN: dict[tuple[str, str], Future[str | Crash]] = {}
_SAID = LineProgress()
_ON_BENCH = OnBench(_SAID)


def carry_out(order: Order) -> str | Crash:
    """The record of a cell as a line, or why there is none: from memory where the same run asked for it before."""
    place = order.run, order.item.subject.key
    with _LOCK:
        if place not in _TAKEN:
            _TAKEN[place] = _MEASURING.submit(_measured, order)
        taken = _TAKEN[place]
        while len(_TAKEN) > KEPT:
            del _TAKEN[next(iter(_TAKEN))]
    answer = taken.result()
    if isinstance(answer, Crash):
        _TAKEN.pop(place, None)
    return answer


def _measured(order: Order) -> str | Crash:
    item = order.item
    try:
        bench = None
        if order.model is not None:
            handle = resolve_model(order.model, reporter=default_reporter(), accept_licence=order.accept_licence)
            bench = _ON_BENCH.of(handle, order.n_layers)
        model = NO_MODEL if bench is None else model_ref(bench.handle, order.n_layers)
        here = measurement(item.cell, model, item.block).subject
        if here != item.subject:
            names = [name for name in type(here).model_fields if getattr(here, name) != getattr(item.subject, name)]
            raise UsageError(f"{platform.node()} would measure something else: another {' and '.join(names)}")
        _SAID.message(f"measuring {item.subject.model.name} {item.label}")
        return measure(item, bench, lambda _: None).to_line()
    except Exception as error:
        return Crash.of(error)


def tag(kind: MovedBy, of_class: str) -> str:
    """The resource of dask's by which a cell is kept to a class of machines."""
    return f"{kind} {of_class[:12]}"


def serve(scheduler: str, say: Callable[[str], None]) -> None:
    """Work for a scheduler, and for the next one at its address, until the process is ended."""
    import distributed  # sets its loggers up

    logging.getLogger(distributed.__name__).setLevel(logging.CRITICAL)  # what is worth saying is said here
    tags = {tag(kind, machine_class(kind)): 1.0 for kind in get_args(MovedBy)}
    for suite in known_suites().values():
        suite.harness()  # is cached then: a greeting must not stop the loop that answers the scheduler
    say(f"{hardware()['chip']} ({', '.join(tags)}) waits for the scheduler at {scheduler}")
    asyncio.run(_serve(scheduler, tags, say))


async def _serve(scheduler: str, tags: dict[str, float], say: Callable[[str], None]) -> None:
    from distributed import Worker

    while True:
        name = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        # no limit of memory: dask would pause a worker whose model is large
        async with Worker(scheduler, name=name, nthreads=1, memory_limit=0, resources=tags) as worker:
            say(f"measuring for {scheduler} as {worker.address}; Ctrl-C ends it")
            await worker.finished()
        say(f"the scheduler at {scheduler} is gone; waiting for the next one there")
        await asyncio.sleep(1.0)
