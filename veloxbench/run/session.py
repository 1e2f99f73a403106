"""One loaded model, and the making of a record on it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import mlx.core as mx

from veloxbench.inputs.models import ModelHandle, load_model
from veloxbench.inputs.sources import cache_dir
from veloxbench.measure import machine
from veloxbench.measure.divergence import worker_pool
from veloxbench.measure.reference import ReferenceCache
from veloxbench.measure.suite import Bench, Measured, Measurement, Tick, get_suite
from veloxbench.methods.registry import BuildContext, is_foreign
from veloxbench.records import provenance
from veloxbench.records.record import Provenance, Record
from veloxbench.run.apart import end_worker, measure_apart
from veloxbench.run.progress import Progress


class OnBench:
    """The model that was measured last, on the bench until another one is asked for; ended by :meth:`close`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._model: tuple[ModelHandle, int | None] | None = None
        self._bench: Bench | None = None
        self._exits = ExitStack()

    def of(self, handle: ModelHandle, n_layers: int | None) -> Bench:
        """A model on the bench, cut to ``n_layers`` where they are given, in place of the one that was there."""
        if self._bench is None or self._model != (handle, n_layers):
            self.close()
            self._bench = self._exits.enter_context(opened(handle, n_layers, self.progress))
            self._model = handle, n_layers
        return self._bench

    def close(self) -> None:
        """Free the model that is loaded."""
        self._bench = None
        self._exits.close()


@contextmanager
def opened(handle: ModelHandle, n_layers: int | None, progress: Progress) -> Iterator[Bench]:
    """A model on the bench; its weights are freed before the next one is loaded."""
    model, tokenizer = load_model(handle, n_layers=n_layers)
    context = BuildContext(model, tokenizer, handle.weights_sha256, n_layers, cache_dir() / "calibration")
    references = ReferenceCache(cache_dir() / "reference")
    bench = Bench(handle, n_layers, model, context, references, worker_pool(), progress.message)
    try:
        yield bench
    finally:
        end_worker(bench)
        bench.pool.shutdown()
        bench.kept.clear()
        del bench.model, bench.context, model, context
        gc.collect()
        mx.clear_cache()


def measure(item: Measurement, bench: Bench | None, tick: Tick) -> Record:
    """Make one record.

    Args:
        bench: None for a suite that needs no model.

    Raises:
        EngagementError: the method did not hold a layer that it claims, or its bytes differ from its formula.
    """
    suite = get_suite(item.cell.suite)
    bench = bench if suite.row.needs_model else None  # a run of several suites has one on the bench all the same
    started, clock, state = datetime.now(UTC), time.perf_counter(), provenance.machine_state()
    versions = dict(provenance.versions())
    if bench is not None and is_foreign(item.cell.arm.name):
        answer = measure_apart(item, bench, tick)
        versions |= {name: version for name, version in answer.versions.items() if version != "absent"}
        refusal, measured = answer.reason, Measured(answer.metrics, answer.samples, answer.layers)
    else:
        refusal = None if bench is None else suite.refusal(item.cell, bench)
        measured = Measured({}) if refusal else suite.measure(item, bench, tick)
    commit, dirty = provenance.git_state()
    project_commit, project_dirty = provenance.project_state(Path.cwd())
    return Record.create(
        subject=item.subject,
        status="unsupported" if refusal else "measured",
        reason=refusal,
        metrics=measured.metrics,
        samples=measured.samples,
        engagement=measured.layers,
        provenance=Provenance(
            started=started,
            seconds=time.perf_counter() - clock,
            commit=commit,
            dirty=dirty,
            project_commit=project_commit,
            project_dirty=project_dirty,
            versions=versions,
            hardware=machine.hardware(),
            state=state,
            model_licence=None if bench is None else bench.handle.licence,
            text_licence=item.block.licence,
        ),
    )
