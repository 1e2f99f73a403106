"""Carries a plan out: one record per measurement, resumable by key, with an estimate, progress and an ETA."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.utils import load_tokenizer
from numpy.typing import NDArray

from veloxbench import environment
from veloxbench.corpora import load_text
from veloxbench.errors import ExitCode, VeloxError
from veloxbench.measure import exact, kernels, memory, quality, throughput
from veloxbench.measure.divergence import ReferenceRows, worker_pool
from veloxbench.measure.exact import NO_MODEL
from veloxbench.measure.reference import ReferenceCache, lockstep, vocabulary_of
from veloxbench.methods import Arm, BuildContext, build, get_method, probe
from veloxbench.models import ModelHandle, load_model, resolve_model
from veloxbench.plan import (
    REFERENCE,
    Grid,
    Measurement,
    MemorySpec,
    measurements,
    measurements_without_model,
    needs_model,
)
from veloxbench.progress import Reporter
from veloxbench.protocol import Chunked, Decode, feed
from veloxbench.records import Estimate, FailedMeasurement, LayerEngagement, Provenance, Record, content_hash
from veloxbench.sources import cache_dir
from veloxbench.store import Store


class Progress(Protocol):
    """Where a run stands. Amounts are in seconds of estimated work."""

    def plan(self, model: str, n_measurements: int, n_done: int, seconds: float, detail: str) -> None:
        """A model's work begins: what is there to do and how long it should take."""

    def begin(self, label: str) -> None:
        """A measurement begins."""

    def advance(self, seconds: float) -> None:
        """That much estimated work is done."""

    def recorded(self, record: Record) -> None:
        """A record is safe on disk."""

    def message(self, text: str) -> None:
        """One line for the user."""


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
    tokenizer = load_tokenizer(handle.directory)  # type: ignore[no-untyped-call]
    return measurements(grid, handle, text, tokenizer)


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


@dataclass(frozen=True)
class Rates:
    """This machine's speed on this model, from three short passes: for the estimate only.

    Attributes:
        token_seconds: of a token in a batch of short sequences.
        step_seconds: of a decode step.
        attention_seconds: what each pair of tokens of one long prompt adds (MLX's attention on a processor).
    """

    token_seconds: float
    step_seconds: float
    attention_seconds: float

    def prefix_seconds(self, tokens: int) -> float:
        """Estimated seconds of one prompt through fp16 caches."""
        return tokens * self.token_seconds + tokens**2 * self.attention_seconds

    def describe(self) -> str:
        """For the line printed before the run."""
        return f"probed: {1 / self.token_seconds:.0f} tok/s in batches, {1 / self.step_seconds:.0f} tok/s one by one"

    def seconds(self, item: Measurement) -> float:
        """Estimated seconds of a measurement; a quantized cache is assumed to cost half as much again."""
        slower = 1.0 if item.arm == REFERENCE else 1.5
        match item.task:
            case kernels.Traffic():
                return 8.0  # compiling two bodies, then a second
            case exact.FixedInputs():
                return 0.1
            case Chunked() as task:
                return slower * task.sequences * task.length * self.token_seconds
            case Decode() as task:
                batched = task.sequences * task.prefix * self.token_seconds
                return slower * (batched + task.steps * (self.step_seconds + task.sequences * self.token_seconds))
            case throughput.Timing() as task:
                prefills = task.prefill_pairs * (1 + slower) * self.prefix_seconds(task.depth)
                return prefills + task.pairs * (1 + 3 * slower) * (task.steps + 1) * self.step_seconds
            case MemorySpec() as task:
                return 6 + slower * (self.prefix_seconds(task.tokens) + 2 * task.decode_steps * self.step_seconds)

    @contextmanager
    def ticking(self, item: Measurement, progress: Progress) -> Iterator[Callable[[int], None]]:
        """A tick that turns tokens done into estimated seconds, and settles the rest at the end."""
        total, spent = self.seconds(item), 0.0
        units = {Chunked: "n_scored", Decode: "n_scored"}.get(type(item.task))
        n_units = item.task.sequences * getattr(item.task, units) if units else 0  # type: ignore[union-attr]

        def tick(n: int) -> None:
            nonlocal spent
            if n_units:
                share = min(total * n / n_units, total - spent)
                spent += share
                progress.advance(share)

        yield tick
        progress.advance(total - spent)


def _code_bits(arm: Arm) -> int:
    assert arm.target is not None  # the kernel suite's method has a width
    return int(arm.target)


def measure_exact(item: Measurement) -> Record:
    """Make one record of the exact suite, which reads no model."""
    assert isinstance(item.arm, exact.Case)
    started, clock, state = datetime.now(UTC), time.perf_counter(), environment.machine_state()
    metrics, samples = exact.measure(item.arm)
    return Record.create(
        subject=item.subject,
        status="measured",
        metrics=metrics,
        samples=samples,
        engagement=[],
        provenance=_provenance(started, time.perf_counter() - clock, state),
    )


def _provenance(
    started: datetime,
    seconds: float,
    state: dict[str, Any],
    *,
    model_licence: str | None = None,
    text_licence: str | None = None,
) -> Provenance:
    commit, dirty = environment.git_state()
    project_commit, project_dirty = environment.project_state(Path.cwd())
    return Provenance(
        started=started,
        seconds=seconds,
        commit=commit,
        dirty=dirty,
        project_commit=project_commit,
        project_dirty=project_dirty,
        versions=environment.versions(),
        hardware=environment.hardware(),
        state=state,
        model_licence=model_licence,
        text_licence=text_licence,
    )


@dataclass
class Session:
    """One loaded model and what its measurements share."""

    handle: ModelHandle
    n_layers: int | None
    model: Module
    context: BuildContext
    references: ReferenceCache
    pool: ThreadPoolExecutor
    progress: Progress
    refusals: dict[str, str | None] = field(default_factory=dict)
    prefix: tuple[bytes, throughput.Prefilled] | None = None
    """The reference's last prefix that several arms share, by its tokens."""

    @classmethod
    def open(cls, handle: ModelHandle, n_layers: int | None, progress: Progress) -> Session:
        """Load the model."""
        model, tokenizer = load_model(handle, n_layers=n_layers)
        context = BuildContext(model, tokenizer, handle.weights_sha256, n_layers, cache_dir() / "calibration")
        return cls(handle, n_layers, model, context, ReferenceCache(cache_dir() / "reference"), worker_pool(), progress)

    def close(self) -> None:
        """Free the weights before the next model is loaded."""
        self.pool.shutdown()
        del self.model, self.context, self.prefix
        gc.collect()
        mx.clear_cache()

    def rates(self) -> Rates:
        """Time one batched pass, a few single steps on the reference cache, and one longer prompt."""
        arm = self.arm(REFERENCE)
        warm = mx.zeros((4, 64), dtype=mx.int32)
        mx.eval(self.model(warm))
        start = time.perf_counter()
        mx.eval(self.model(warm))
        token = (time.perf_counter() - start) / warm.size
        single = mx.zeros((1, 1), dtype=mx.int32)
        mx.eval(self.model(single, cache=arm.caches))
        start = time.perf_counter()
        for _ in range(3):
            mx.eval(self.model(single, cache=arm.caches))
        step = (time.perf_counter() - start) / 3
        prompt = np.zeros(512, np.int32)
        took = throughput.prefill(self.model, self.arm(REFERENCE).caches, prompt).first_token_seconds
        return Rates(token, step, max(took - prompt.size * token, 0.0) / prompt.size**2)

    def arm(self, arm: Arm) -> quality.ArmCaches:
        """Fresh caches of an arm."""
        caches, claimed = build(self.context, arm)
        return quality.ArmCaches(caches, claimed, get_method(arm.method).cache_classes)

    def measure(self, item: Measurement, tick: quality.Tick) -> Record:
        """Make one record.

        Raises:
            EngagementError: the method did not hold a layer that it claims, or its bytes differ from its formula.
        """
        if isinstance(item.arm, exact.Case):
            return measure_exact(item)
        started, clock = datetime.now(UTC), time.perf_counter()
        state = environment.machine_state()
        refusal = self._refusal(item)
        metrics: dict[str, Estimate] = {}
        samples: dict[str, list[float]] = {}
        layers: list[LayerEngagement] = []
        if refusal is None:
            match item.task:
                case Chunked() | Decode():
                    (metrics, samples), layers = self._quality(item, tick)
                case throughput.Timing():
                    (metrics, samples), layers = self._throughput(item, tick)
                case MemorySpec():
                    (metrics, samples), layers = self._memory(item, item.task)
                case kernels.Traffic() as task:
                    metrics, samples = self._kernels(item, task)
        return Record.create(
            subject=item.subject,
            status="measured" if refusal is None else "unsupported",
            reason=refusal,
            metrics=metrics,
            samples=samples,
            engagement=layers,
            provenance=_provenance(
                started,
                time.perf_counter() - clock,
                state,
                model_licence=self.handle.licence,
                text_licence=item.block.licence,
            ),
        )

    def _kernels(self, item: Measurement, task: kernels.Traffic) -> quality.Measured:
        shape = kernels.head_shape(self.handle.directory)
        assert shape is not None  # else it was refused
        return kernels.measure(task, shape, _code_bits(item.arm))

    def _refusal(self, item: Measurement) -> str | None:
        arm = item.arm
        if isinstance(item.task, kernels.Traffic):
            return kernels.refusal(kernels.head_shape(self.handle.directory), _code_bits(arm))
        if arm.label not in self.refusals:
            self.refusals[arm.label] = probe(self.context, arm)
        return self.refusals[arm.label]

    def _reference_key(self, item: Measurement) -> str:
        subject = item.subject.model_copy(update={"method": REFERENCE.ref()})
        return content_hash([subject.key, "log-probabilities"])

    def _reference(self, item: Measurement) -> Iterator[ReferenceRows]:
        """The reference's rows: from disk where they are kept, else computed now."""
        task, tokens = item.task, item.block.tokens
        assert isinstance(task, (Chunked, Decode))
        key = self._reference_key(item)
        if self.references.has(key):
            return self.references.read(key, quality.rows_per_step(task, len(tokens)))
        return self._compute_reference(item, self.arm(REFERENCE))

    def _compute_reference(self, item: Measurement, arm: quality.ArmCaches) -> Iterator[ReferenceRows]:
        """The reference's rows from a pass of ``arm``: kept on disk, or in lockstep where they would not fit."""
        task, tokens, references = item.task, item.block.tokens, self.references
        assert isinstance(task, (Chunked, Decode))
        key = self._reference_key(item)
        n_rows, vocabulary = sum(quality.rows_per_step(task, len(tokens))), vocabulary_of(self.model, tokens)
        steps = feed(self.model, arm.caches, tokens, task)
        if references.has(key) or not references.fits(n_rows, vocabulary):
            return lockstep(steps, self.pool)
        self.progress.message(
            f"keeping the fp16 reference's log-probabilities: {references.size(n_rows, vocabulary) / 1e6:.0f} MB "
            f"in {references.folder} (least recently used out above {references.cap_bytes / 2**30:g} GiB)"
        )
        return references.write(key, steps, n_rows, vocabulary, self.pool)

    def _quality(self, item: Measurement, tick: quality.Tick) -> tuple[quality.Measured, list[LayerEngagement]]:
        task, tokens = item.task, item.block.tokens
        assert isinstance(task, (Chunked, Decode))
        arm = self.arm(item.arm)
        if item.arm == REFERENCE:
            nll = quality.run_reference(self._compute_reference(item, arm), len(tokens), tick)
            again = self.arm(REFERENCE)
            floor = quality.noise_floor(self.model, again, tokens, task, self._reference(item), self.pool)
            layers = arm.engagement()
            return quality.reference_metrics(nll, floor, layers), layers
        stats, nll = quality.run_arm(self.model, arm, tokens, task, self._reference(item), self.pool, tick)
        layers = arm.engagement()
        return quality.arm_metrics(stats, nll, layers), layers

    def _throughput(self, item: Measurement, tick: quality.Tick) -> tuple[quality.Measured, list[LayerEngagement]]:
        assert isinstance(item.task, throughput.Timing)
        timing = item.task
        last: list[quality.ArmCaches] = []

        def fill_arm(prompt: NDArray[np.int32]) -> throughput.Prefilled:
            last[:] = [self.arm(item.arm)]
            return throughput.prefill(self.model, last[0].caches, prompt)

        def fill_reference(prompt: NDArray[np.int32]) -> throughput.Prefilled:
            if timing.prefill_pairs > 1:
                return throughput.prefill(self.model, self.arm(REFERENCE).caches, prompt)
            # one pair gives no interval: a long prefix is then filled once for all arms, not as the other half of each
            key = prompt.tobytes()
            if self.prefix is None or self.prefix[0] != key:
                self.prefix = key, throughput.prefill(self.model, self.arm(REFERENCE).caches, prompt)
            return self.prefix[1]

        seed = int(item.subject.key[:8], 16)  # another order for every arm and depth
        fill = {"arm": fill_arm, "fp16": fill_reference}
        measured = throughput.measure(self.model, fill, item.block.tokens[0], timing, seed, tick)
        return measured, last[0].engagement()

    def _memory(self, item: Measurement, sizes: MemorySpec) -> tuple[quality.Measured, list[LayerEngagement]]:
        request = memory.Request(
            model=str(self.handle.directory),
            n_layers=self.n_layers,
            method=item.arm.method,
            target=item.arm.target,
            parameters=dict(item.arm.parameters),
            cache_folder=self.context.cache_folder,
            tokens=memory.request_tokens(item.block.tokens, sizes.tokens, sizes.decode_steps),
            prefill_tokens=sizes.tokens,
        )
        reply = memory.measure(request)
        return memory.metrics(reply, item.arm.label, sizes.budget_gib), reply.final
