"""Carries a grid out: one record per measurement, resumable by key; the one loop behind the command line and pytest."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from veloxbench.errors import ExitCode, VeloxError
from veloxbench.inputs.corpora import load_text
from veloxbench.inputs.models import ModelHandle, load_tokenizer, resolve_model
from veloxbench.inputs.transfer_progress import Reporter
from veloxbench.measure.suite import Bench, Measurement, Rates
from veloxbench.records.record import NO_MODEL, FailedMeasurement, Record
from veloxbench.records.store import Store
from veloxbench.run import estimate
from veloxbench.run.grid import Grid
from veloxbench.run.plan import WHOLE, Shard, measurements, measurements_without_model, other_checkout
from veloxbench.run.progress import Progress
from veloxbench.run.session import OnBench, measure


@dataclass(frozen=True)
class Failure:
    """A measurement that crashed: no record was written for it."""

    label: str
    reason: str
    exit_code: ExitCode


@dataclass(frozen=True)
class Outcome:
    """What a run did; an arm that is not supported has a record with the reason, and no figure."""

    keys: tuple[str, ...]
    measured: int
    unsupported: int
    resumed: int
    failures: tuple[Failure, ...]

    @property
    def exit_code(self) -> ExitCode:
        """PASS only when every planned measurement has its record."""
        return max((failure.exit_code for failure in self.failures), default=ExitCode.PASS)


@dataclass(frozen=True)
class Plan:
    """One model's measurements; ``handle`` is None where none reads a model."""

    handle: ModelHandle | None
    items: Sequence[Measurement]

    @property
    def name(self) -> str:
        """The model's name."""
        return NO_MODEL.name if self.handle is None else self.handle.name


class Run:
    """A grid being carried out into a store. Use it in a ``with`` block: it frees the model that is loaded.

    Args:
        grid: what to measure.
        store: open for appending; each record is durable when its measurement ends.
        reporter: of downloads and conversions.
        progress: of measurements.
        accept_licence: download models whose licence must be accepted first.
        fresh: measure everything anew, whatever the store has.
        shard: the part of the grid that this run carries out.
        beside: a second grid of the same models, measured in the same run.
    """

    def __init__(
        self,
        grid: Grid,
        store: Store,
        reporter: Reporter,
        progress: Progress,
        *,
        accept_licence: bool = False,
        fresh: bool = False,
        shard: Shard = WHOLE,
        beside: Grid | None = None,
    ) -> None:
        self.grids = (grid,) if beside is None else (grid, beside)
        self.grid, self.store, self.reporter, self.progress = grid, store, reporter, progress
        self.accept_licence = accept_licence
        self._fresh = fresh
        self.shard = shard
        self._made: set[str] = set()
        self.failures: list[Failure] = []
        self._plans: dict[str, Plan] = {}
        self._on_bench = OnBench(progress)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the grid names; a grid that reads none has one plan all the same, under no model's name."""
        return self.grid.models if self.grid.needs_model else (NO_MODEL.name,)

    def plan(self, model: str) -> Plan:
        """The measurements of a model of the grid, fetched and tokenized at its first mention.

        Raises:
            UsageError: an unknown name, a text too short, a window that does not fit.
        """
        if model not in self._plans:
            if self.grid.needs_model:
                handle = resolve_model(model, reporter=self.reporter, accept_licence=self.accept_licence)
                items = [item for grid in self.grids for item in plan_model(grid, handle, self.reporter, self.shard)]
                self._plans[model] = Plan(handle, list({item.subject.key: item for item in items}.values()))
            else:
                self._plans[model] = Plan(None, list(measurements_without_model(self.grid, self.shard)))
            self.store.begin(self.keys)
        return self._plans[model]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of everything that was planned so far."""
        return tuple(item.subject.key for plan in self._plans.values() for item in plan.items)

    def bench(self, plan: Plan) -> Bench | None:
        """The plan's model on the bench, in place of the one that was there."""
        if plan.handle is None:
            return None
        return self._on_bench.of(plan.handle, self.grid.n_layers)

    def record(self, plan: Plan, item: Measurement, rates: Rates = estimate.NOTHING) -> Record:
        """The record of a measurement: from the store, or measured now and kept.

        Raises:
            Exception: the measurement's own, after it was kept among the store's failures.
        """
        kept = self.recorded(item)
        if kept is not None:
            return kept
        self.progress.begin(f"{plan.name} {item.label}")
        try:
            with estimate.ticking(item, rates, self.progress) as tick:
                record = measure(item, self.bench(plan), tick)
        except Exception as error:
            self.failures.append(keep_failure(item, Crash.of(error), self.store))
            raise
        self.store.append(record)
        self._made.add(record.key)
        self.progress.recorded(record)
        return record

    def recorded(self, item: Measurement) -> Record | None:
        """The record that the store has of a measurement, where it is of this checkout and not to be made anew."""
        kept = self.store.get(item.subject.key)
        if kept is None or kept.key in self._made:
            return kept
        return None if self._fresh or other_checkout(kept.provenance) else kept

    def all(self) -> Outcome:
        """Measure everything that the store does not have yet; what crashes is reported, and the others go on."""
        made: Counter[str] = Counter()
        # every model and text is there, and every window fits, before the first minute is spent
        for plan in [self.plan(model) for model in self.models]:
            pending = [item for item in plan.items if self.recorded(item) is None]
            if not pending:
                self.progress.plan(plan.name, len(plan.items), len(plan.items), 0.0, "all of it is recorded already")
                continue
            bench = self.bench(plan)
            rates = estimate.NOTHING if bench is None else estimate.probed(bench)
            total = sum(estimate.seconds(item, rates) for item in pending)
            done = len(plan.items) - len(pending)
            self.progress.plan(plan.name, len(plan.items), done, total, estimate.described(rates))
            for item in pending:
                try:
                    made[self.record(plan, item, rates).status] += 1
                except Exception:
                    self.progress.message(f"FAILED {plan.name} {item.label}: {self.failures[-1].reason}")
        resumed = len(self.keys) - made.total() - len(self.failures)
        return Outcome(self.keys, made["measured"], made["unsupported"], resumed, tuple(self.failures))

    def close(self) -> None:
        """Free the model that is loaded."""
        self._on_bench.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_model(grid: Grid, handle: ModelHandle, reporter: Reporter, shard: Shard = WHOLE) -> Iterator[Measurement]:
    """The measurements of one model that a shard takes, its text fetched and tokenized."""
    text = load_text(grid.corpus, grid.part, reporter=reporter)
    return measurements(grid, handle, text, load_tokenizer(handle), shard)


@dataclass(frozen=True)
class Crash:
    """What an exception says, as data: it may have been raised on another machine.

    Attributes:
        reason: in one line.
        known: whether the reason explains itself; otherwise the traceback is needed.
    """

    reason: str
    known: bool
    trace: str
    exit_code: ExitCode

    @classmethod
    def of(cls, error: BaseException) -> Crash:
        """What an exception says."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, VeloxError):
            return cls(str(error), True, trace, error.exit_code)
        return cls(f"{type(error).__name__}: {error}", False, trace, ExitCode.REGRESSION)


def keep_failure(item: Measurement, crash: Crash, store: Store) -> Failure:
    """Keep what crashed: a line for the page in the store, the traceback in errors.log beside it."""
    folder = store.path.parent
    with (folder / "errors.log").open("a", encoding="utf-8") as log:
        log.write(f"{datetime.now(UTC).isoformat()} {item.label} key {item.subject.key}\n{crash.trace}\n")
    reason = crash.reason if crash.known else f"{crash.reason} (details in {folder / 'errors.log'})"
    store.append_failure(FailedMeasurement(subject=item.subject, when=datetime.now(UTC), reason=reason))
    return Failure(item.label, reason, crash.exit_code)
