"""A grid carried out by the workers of a dask scheduler, on as many machines as have one.

The process that was asked for the run plans, places and keeps: workers measure and send records, and none of them
touches the store. A cell goes to a worker

- whose code is the run's (hashes of the measuring code and of the implementations; the worker compares the whole
  subject once more before it measures);
- of the one class of machines that measures this model in this run, for suites that the same things move
  (:func:`veloxbench.measure.machine.machine_class`): figures of one table stay comparable;
- that has no other cell; and where a suite is of the machine itself (:attr:`SuiteRow.alone`: timings, memory), on a
  machine where no other worker of the pool has one either.

One cell a worker is under way, and each suite of each model is planned cell by cell as workers become free, so that a
grid of a million cells begins at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pickle
import platform
import queue
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veloxbench.errors import ExitCode, UnfitEnvironmentError, UsageError
from veloxbench.inputs.models import resolve_model
from veloxbench.measure.suite import Measurement
from veloxbench.methods.registry import reference_of
from veloxbench.records.arm import REFERENCE
from veloxbench.records.provenance import project_state
from veloxbench.records.record import NO_MODEL, Record, content_hash
from veloxbench.records.store import read_chosen
from veloxbench.records.suites import SuiteRow
from veloxbench.run.plan import measurements_without_model
from veloxbench.run.pool_worker import Order, greet, need_dask, own_code, tag
from veloxbench.run.runner import Crash, Outcome, Run, keep_failure, plan_model

if TYPE_CHECKING:
    from distributed import Client

PATIENCE_S = 10.0
"""For how long a scheduler may be away before the run ends."""
GLANCE_S = 0.5
"""How often the pool is looked over while nothing comes back."""
DEATHS = 3
"""Workers that may die while they measure one cell; then it is the cell that failed (dask's own number)."""
LOOKED_UP = 512
"""Cells of a suite that are planned and looked up in the store at a time."""
LOOKED_BACK = 1000
"""Records at the end of the store that tell which machines measured before."""


@dataclass
class Stream:
    """The cells of one suite on one model, planned as they are needed.

    Attributes:
        name: the model's, as records have it.
        model: as the grid names it; None where none is read.
        cells: of any machine, in the order of the grid.
        pending: those that the store does not have, of the machines that measure them.
    """

    name: str
    model: str | None
    n_layers: int | None
    row: SuiteRow
    cells: Iterator[Measurement]
    pending: Iterator[Measurement] | None = None
    head: Measurement | None = None

    @property
    def group(self) -> tuple[str, str]:
        """What goes to one class of machines: a model's suites that the same things move."""
        return self.name, self.row.moved_by


@dataclass(frozen=True)
class Flight:
    """A cell on its way."""

    stream: Stream
    item: Measurement

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.stream.name} {self.item.label}"


@dataclass
class Station:
    """A worker that may be sent cells.

    Attributes:
        machine: what workers on one machine share.
        classes: of the machine, by what moves a suite's numbers.
        holds: keys that it measured for this run before, or is measuring still.
        under_way: the cell that it was sent, with dask's future.
    """

    address: str
    machine: str
    chip: str
    classes: dict[str, str]
    holds: set[str]
    under_way: tuple[Flight, Any] | None = None


@dataclass
class Pool:
    """The workers as they are known, and what waits for one."""

    stations: dict[str, Station] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    returned: list[Flight] = field(default_factory=list)
    deaths: Counter[str] = field(default_factory=Counter)
    bound: dict[tuple[str, str], str] = field(default_factory=dict)
    done: queue.Queue[Any] = field(default_factory=queue.Queue)
    waits: bool = False

    def fits(self, station: Station, flight: Flight) -> bool:
        """Whether a worker that is free may be sent a cell."""
        row, key = flight.stream.row, flight.item.subject.key
        if station.classes[row.moved_by] != self.bound[flight.stream.group]:
            return False
        if any(key in other.holds for other in self.stations.values()) and key not in station.holds:
            return False  # another has it, or is about to
        beside = [
            other.under_way[0]
            for other in self.stations.values()
            if other.machine == station.machine and other.under_way is not None
        ]
        return not any(row.alone or other.stream.row.alone for other in beside)


class PoolRun(Run):
    """A grid carried out by a pool; what crashes there is reported, and the others go on.

    Args:
        scheduler: dask's address of it, ``tcp://host:port``.
    """

    def __init__(self, *arguments: Any, scheduler: str, **options: Any) -> None:
        need_dask()
        super().__init__(*arguments, **options)
        if "://" not in scheduler:
            raise UsageError(f"--scheduler {scheduler!r} must be the address of a dask scheduler: tcp://host:port")
        self.scheduler = scheduler
        self.pool = Pool()
        self._keys: dict[str, None] = {}
        self._new: Counter[str] = Counter()
        place = [platform.node(), str(self.store.path.resolve())]
        self._name = uuid.uuid4().hex if self._fresh else content_hash(place)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the cells that were planned so far."""
        return tuple(self._keys)

    def all(self) -> Outcome:
        """Have everything measured that the store does not have yet.

        Raises:
            UnfitEnvironmentError: there is no scheduler, or it went away and did not come back.
        """
        self.store.begin()  # until every cell was planned, nothing in the folder is judged
        streams = self.streams()
        with self._connected() as client:
            self.progress.plan(self.scheduler, self.size(), 0, None, "planned as workers take them")
            self._carry_out(client, streams)
        self.store.begin(self.keys)
        resumed = len(self._keys) - self._new.total() - len(self.failures)
        return Outcome(self.keys, self._new["measured"], self._new["unsupported"], resumed, tuple(self.failures))

    def size(self) -> int:
        """Cells of all models, also those that the grid names twice and those of other shards."""
        cells = (
            cell
            for grid, arms in ((grid, [REFERENCE, *grid.arm_list()]) for grid in self.grids)
            for suite in grid.chosen_suites()
            for cell in suite.cells(grid.tasks(suite), arms)
        )
        return len(self.models) * sum(1 for _ in cells)

    def streams(self) -> list[Stream]:
        """The cells of every suite on every model; every model and text is there, and every window fits."""
        made = []
        for model in self.models:
            handle = None
            if self.grid.needs_model:
                handle = resolve_model(model, reporter=self.reporter, accept_licence=self.accept_licence)
            for grid in self.grids:
                if handle is not None:
                    for _ in plan_model(grid.model_copy(update={"arms": ()}), handle, self.reporter):
                        pass  # every task, with the reference alone
                for suite in grid.chosen_suites():
                    alone = grid.model_copy(update={"suites": (suite.name,)})
                    if handle is None:
                        made.append(
                            Stream(NO_MODEL.name, None, None, suite.row, measurements_without_model(alone, self.shard))
                        )
                    else:
                        cells = plan_model(alone, handle, self.reporter, self.shard)
                        made.append(Stream(handle.name, model, grid.n_layers, suite.row, cells))
        return made

    def head(self, stream: Stream) -> Flight | None:
        """The next cell of a stream; None where there is no more, or no machine to measure it yet."""
        if stream.head is None:
            if stream.pending is None and self._bind(stream):
                stream.pending = self._pending(stream, self.pool.bound[stream.group])
            stream.head = next(stream.pending or iter(()), None)
        return None if stream.head is None else Flight(stream, stream.head)

    def _pending(self, stream: Stream, of_class: str) -> Iterator[Measurement]:
        """Cells that the store does not have, as the machines of a class measure them."""
        while planned := list(itertools.islice(stream.cells, LOOKED_UP)):
            moved = [_on_machine(item, of_class) for item in planned]
            self.store.look_up([item.subject.key for item in moved])
            for item in moved:
                if item.subject.key in self._keys:  # the other grid has it too
                    continue
                self._keys[item.subject.key] = None
                if self.recorded(item) is None:
                    yield item
                else:
                    self.progress.advance(1.0)

    def _bind(self, stream: Stream) -> bool:
        """Choose the machines that measure a model: those of its records, or else those that most workers have."""
        bound, stations = self.pool.bound, self.pool.stations.values()
        if stream.group not in bound:
            there = Counter(station.classes[stream.row.moved_by] for station in stations)
            if not there:
                return False
            before = self._before(stream) if len(there) > 1 else Counter()
            chosen = max(there, key=lambda each: (before[each], there[each]))
            bound[stream.group] = chosen
            if len(there) > 1:
                chip = next(s.chip for s in stations if s.classes[stream.row.moved_by] == chosen)
                self.progress.message(
                    f"{stream.name} {stream.row.name} goes to {there[chosen]} of {there.total()} workers, those on "
                    f"{chip}: figures of several kinds of machine are not comparable"
                )
        return True

    def _before(self, stream: Stream) -> Counter[str]:
        """Records of a model's suites by class of machine, among the last of the store."""
        if not self.store.path.exists():
            return Counter()
        last = itertools.islice(read_chosen(self.store.path, lambda *_: True), LOOKED_BACK)
        return Counter(
            record.subject.machine_class
            for record in last
            if record.subject.model.name == stream.name and record.subject.suite == stream.row.name
        )

    @contextmanager
    def _connected(self) -> Iterator[Client]:
        from distributed import Client

        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what is wrong is said here, in one sentence
        try:
            client = Client(self.scheduler, timeout=PATIENCE_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UnfitEnvironmentError(
                f"there is no scheduler at {self.scheduler} ({error}); `dask scheduler` starts one"
            ) from error
        try:
            yield client
        finally:
            client.close(timeout=1)

    def _carry_out(self, client: Client, streams: list[Stream]) -> None:
        """Send, take and look after the pool until every cell has its record or its failure."""
        pool = self.pool
        while True:
            if client.status != "running":
                self._wait_for_scheduler(client)
            try:
                self._meet(client)
            except (OSError, TimeoutError, CancelledError):  # the scheduler went while it was asked
                time.sleep(GLANCE_S)
                continue
            for station in list(pool.stations.values()):
                if station.under_way is None and (flight := self._next(station, streams)) is not None:
                    self._send(client, station, flight)
            planned = not pool.returned and pool.bound.keys() >= {stream.group for stream in streams}
            if planned and not self._under_way() and all(self.head(stream) is None for stream in streams):
                return
            self._wait_for_workers()
            self._take()

    def _under_way(self) -> list[Station]:
        return [station for station in self.pool.stations.values() if station.under_way is not None]

    def _wait_for_scheduler(self, client: Client) -> None:
        """A scheduler that comes back in time is given the same cells again; its futures died with it."""
        self.pool.returned += [s.under_way[0] for s in self.pool.stations.values() if s.under_way is not None]
        self.pool.stations.clear()
        self.pool.refused.clear()
        self.progress.message(f"the scheduler at {self.scheduler} is gone; waiting for it")
        while client.status == "connecting":
            time.sleep(GLANCE_S)
        if client.status != "running":
            raise UnfitEnvironmentError(
                f"the scheduler at {self.scheduler} is gone; {self._new.total()} records of this run are kept in "
                f"{self.store.path.parent}. Start a scheduler there and type the same command again to go on"
            )

    def _wait_for_workers(self) -> None:
        """Say once that nothing is under way, and why."""
        waits = not self._under_way()
        if waits and not self.pool.waits:
            left = len(self.pool.stations)
            self.progress.message(
                f"waiting for a worker: `veloxbench worker {self.scheduler}` starts one ({len(self.pool.refused)} "
                f"refused, {left} of other machines than the cells that are left)"
            )
        self.pool.waits = waits

    def _meet(self, client: Client) -> None:
        """Greet new workers, and take back what those had that are gone.

        Their list is asked of the scheduler: ``scheduler_info`` is a cache that at times holds none.
        """
        pool, there = self.pool, client.nthreads()
        for address in pool.stations.keys() - there.keys():
            station = pool.stations.pop(address)
            if station.under_way is not None:
                self._lost(station.under_way[0], address)
        pool.refused &= there.keys()
        for address in there.keys() - pool.stations.keys() - pool.refused:
            answers = client.run(greet, self._asked(), workers=[address], on_error="return")
            said = answers.get(address)
            if not isinstance(said, dict) or said["refusal"] is not None:
                pool.refused.add(address)
                why = (
                    said["refusal"] if isinstance(said, dict) else f"it is no `veloxbench worker` of this code: {said}"
                )
                self.progress.message(f"the worker at {address} is refused: {why}")
                continue
            station = Station(address, said["machine"], said["chip"], said["classes"], set(said["holds"]))
            pool.stations[address] = station
            self.progress.message(f"the worker at {address} takes part: {station.chip}")

    def _asked(self) -> dict[str, Any]:
        """What a worker's code must be."""
        grids = [grid for grid in self.grids if grid.needs_model]
        arms = {arm.name: arm for grid in grids for arm in grid.arm_list()}
        return {
            "pool": own_code(),
            "suites": {suite.name: suite.harness() for grid in self.grids for suite in grid.chosen_suites()},
            "arms": [(arm.model_dump(), reference_of(arm).implementation) for arm in arms.values()],
            "project": str(project_state(Path.cwd())),
            "run": self._name,
        }

    def _next(self, station: Station, streams: list[Stream]) -> Flight | None:
        """The first cell that a free worker may be sent, those that came back before the others."""
        for flight in self.pool.returned:
            if self.pool.fits(station, flight):
                self.pool.returned.remove(flight)
                return flight
        for stream in streams:
            head = self.head(stream)
            if head is not None and self.pool.fits(station, head):
                stream.head = None
                return head
        return None

    def _send(self, client: Client, station: Station, flight: Flight) -> None:
        kind, key = flight.stream.row.moved_by, flight.item.subject.key
        order = Order(flight.item, flight.stream.model, flight.stream.n_layers, self.accept_licence, self._name)
        try:
            future = client.submit(
                _by_value(),
                pickle.dumps(order),
                key=f"{flight.item.label} {key[:12]} {uuid.uuid4().hex[:8]}",
                workers=[station.address],
                resources={tag(kind, station.classes[kind]): 1},
                pure=False,
            )
        except Exception:
            if client.status == "running":
                raise
            self.pool.returned.append(flight)  # the scheduler went
            return
        station.under_way = flight, future
        future.add_done_callback(self.pool.done.put)

    def _take(self) -> None:
        """What came back: a record, a failure, or a cell that must be sent again."""
        try:
            future = self.pool.done.get(timeout=GLANCE_S)
        except queue.Empty:
            return
        station = next((s for s in self._under_way() if s.under_way is not None and s.under_way[1] is future), None)
        if station is None or station.under_way is None:
            return  # its worker is gone: another has the cell
        flight, station.under_way = station.under_way[0], None
        try:
            answer = future.result(timeout=PATIENCE_S)
        except (OSError, TimeoutError, CancelledError):  # worker or scheduler went while it was on its way
            self.pool.returned.append(flight)
            return
        except Exception as error:
            answer = Crash.of(error)
        self._keep(flight, answer)

    def _keep(self, flight: Flight, answer: str | Crash) -> None:
        """Write a record or a failure the moment it is here."""
        self.progress.begin(flight.label)  # of many that are under way the one of which there is news
        self.progress.advance(1.0)
        if isinstance(answer, Crash):
            self.failures.append(keep_failure(flight.item, answer, self.store))
            self.progress.message(f"FAILED {flight.label}: {self.failures[-1].reason}")
            return
        record = Record.from_line(answer)
        if record.subject != flight.item.subject:
            raise ValueError(f"a record of {record.subject} came for {flight.item.subject}")
        self.store.append(record)
        self._made.add(record.key)
        self._new[record.status] += 1
        self.progress.recorded(record)

    def _lost(self, flight: Flight, address: str) -> None:
        """A worker is gone with a cell: another gets it, unless it is the cell that ends them."""
        key = flight.item.subject.key
        self.pool.deaths[key] += 1
        if self.pool.deaths[key] >= DEATHS:
            reason = f"{DEATHS} workers were gone before they had measured it, the last at {address}"
            self._keep(flight, Crash(reason, True, reason, ExitCode.REGRESSION))
            return
        self.progress.message(f"the worker at {address} is gone; {flight.label} goes to another")
        self.pool.returned.append(flight)


def _by_value() -> Callable[[bytes], str | Crash]:
    """What a worker is asked to run; it travels as code, so that the scheduler needs nothing of this project."""

    def carried(order: bytes) -> Any:
        import pickle

        from veloxbench.run.pool_worker import carry_out

        return carry_out(pickle.loads(order))

    return carried


def _on_machine(item: Measurement, of_class: str) -> Measurement:
    """A measurement as a machine of a class makes it."""
    return dataclasses.replace(item, subject=item.subject.model_copy(update={"machine_class": of_class}))
