"""One loaded model and what its measurements share; it makes records."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxbench.inputs.models import ModelHandle, load_model
from veloxbench.inputs.sources import cache_dir
from veloxbench.measure import exact, kernels, machine, memory, quality, throughput
from veloxbench.measure.divergence import ReferenceRows, worker_pool
from veloxbench.measure.protocol import Chunked, Decode, feed
from veloxbench.measure.reference import ReferenceCache, lockstep, vocabulary_of
from veloxbench.methods.registry import Arm, BuildContext, build, get_method, probe
from veloxbench.records import provenance
from veloxbench.records.record import Estimate, LayerEngagement, Provenance, Record, content_hash
from veloxbench.run.estimate import Rates
from veloxbench.run.grid import MemorySpec
from veloxbench.run.plan import REFERENCE, Measurement
from veloxbench.run.progress import Progress


def _code_bits(arm: Arm) -> int:
    assert arm.target is not None  # the kernel suite's method has a width
    return int(arm.target)


def measure_exact(item: Measurement) -> Record:
    """Make one record of the exact suite, which reads no model."""
    assert isinstance(item.arm, exact.Case)
    started, clock, state = datetime.now(UTC), time.perf_counter(), provenance.machine_state()
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
    commit, dirty = provenance.git_state()
    project_commit, project_dirty = provenance.project_state(Path.cwd())
    return Provenance(
        started=started,
        seconds=seconds,
        commit=commit,
        dirty=dirty,
        project_commit=project_commit,
        project_dirty=project_dirty,
        versions=provenance.versions(),
        hardware=machine.hardware(),
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
        state = provenance.machine_state()
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
            rows = quality.rows_per_step(task, len(tokens))
            return self.references.read(key, rows, lambda: self._recompute_reference(item))
        return self._compute_reference(item, self.arm(REFERENCE))

    def _recompute_reference(self, item: Measurement) -> Iterator[ReferenceRows]:
        self.progress.message("the fp16 reference that was kept is damaged or gone: it is computed again")
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
