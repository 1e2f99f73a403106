"""Carries a plan out: one record per measurement, resumable by key, with an estimate, progress and an ETA."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import UTC, datetime

from veloxbench.errors import ExitCode, VeloxError
from veloxbench.inputs.corpora import load_text
from veloxbench.inputs.models import ModelHandle, load_tokenizer, resolve_model
from veloxbench.inputs.transfer_progress import Reporter
from veloxbench.measure.exact import NO_MODEL
from veloxbench.records.record import FailedMeasurement
from veloxbench.records.store import Store
from veloxbench.run.estimate import Rates
from veloxbench.run.grid import Grid
from veloxbench.run.plan import Measurement, measurements, measurements_without_model, needs_model
from veloxbench.run.progress import Progress
from veloxbench.run.session import Session, measure_exact


@dataclass(frozen=True)
class Failure:
    """A measurement that crashed: no record was written for it."""

    label: str
    reason: str
    exit_code: ExitCode


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    keys: tuple[str, ...]
    measured: int
    resumed: int
    failures: tuple[Failure, ...]

    @property
    def exit_code(self) -> ExitCode:
        """PASS only when every planned measurement has its record."""
        return max((failure.exit_code for failure in self.failures), default=ExitCode.PASS)


def run(grid: Grid, store: Store, reporter: Reporter, progress: Progress, *, accept_licence: bool = False) -> Outcome:
    """Measure everything in the grid that the store does not have yet.

    A measurement that crashes is reported and the others go on; a usage error (unknown name, text too
    short) ends the run before anything is measured for that model.

    Args:
        grid: what to measure.
        store: open for appending; each record is durable when its measurement ends.
        accept_licence: download models whose licence must be accepted first.
    """
    measured = resumed = 0
    failures: list[Failure] = []
    # every model and text is there, and every window fits, before the first minute is spent
    plans: list[tuple[ModelHandle | None, list[Measurement]]] = [(None, measurements_without_model(grid))]
    if needs_model(grid):
        handles = [resolve_model(name, reporter=reporter, accept_licence=accept_licence) for name in grid.models]
        plans = [(handle, plan_model(grid, handle, reporter)) for handle in handles]
    keys = tuple(item.subject.key for _, plan in plans for item in plan)
    store.begin(keys)
    for handle, plan in plans:
        name = NO_MODEL.name if handle is None else handle.name
        pending = [item for item in plan if store.get(item.subject.key) is None]
        resumed += len(plan) - len(pending)
        if not pending:
            progress.plan(name, len(plan), len(plan), 0.0, "all of it is recorded already")
            continue
        session = None if handle is None else Session.open(handle, grid.n_layers, progress)
        rates = Rates(0.0, 0.0, 0.0) if session is None else session.rates()
        progress.plan(
            name,
            len(plan),
            len(plan) - len(pending),
            sum(rates.seconds(item) for item in pending),
            "nothing of it reads a model" if session is None else rates.describe(),
        )
        for item in pending:
            progress.begin(f"{name} {item.label}")
            try:
                with rates.ticking(item, progress) as tick:
                    record = measure_exact(item) if session is None else session.measure(item, tick)
            except KeyboardInterrupt:
                raise
            except Exception as error:
                failures.append(keep_failure(item, error, store))
                progress.message(f"FAILED {name} {item.label}: {failures[-1].reason}")
                continue
            store.append(record)
            measured += 1
            progress.recorded(record)
        if session is not None:
            session.close()
    return Outcome(keys, measured, resumed, tuple(failures))


def plan_model(grid: Grid, handle: ModelHandle, reporter: Reporter) -> list[Measurement]:
    """The measurements of one model, its text fetched and tokenized."""
    text = load_text(grid.corpus, grid.part, reporter=reporter)
    return measurements(grid, handle, text, load_tokenizer(handle))


def keep_failure(item: Measurement, error: Exception, store: Store) -> Failure:
    """Keep what crashed: a line for the page in the store, the traceback in errors.log beside it."""
    folder = store.path.parent
    with (folder / "errors.log").open("a", encoding="utf-8") as log:
        log.write(f"{datetime.now(UTC).isoformat()} {item.label} key {item.subject.key}\n")
        log.write("".join(traceback.format_exception(error)) + "\n")
    known = isinstance(error, VeloxError)
    reason = str(error) if known else f"{type(error).__name__}: {error} (details in {folder / 'errors.log'})"
    store.append_failure(FailedMeasurement(subject=item.subject, when=datetime.now(UTC), reason=reason))
    return Failure(item.label, reason, error.exit_code if isinstance(error, VeloxError) else ExitCode.REGRESSION)
