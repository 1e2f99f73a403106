"""What the timing gate times: a few decode steps of a real model from a saved prefix, and the canary beside them.

A slowdown can be built in, as real extra work inside every step: the step also multiplies a vector with some rows
of the model's largest weight matrix, which streams weights just as the step itself does, so that the slowdown keeps
its share when the machine's speed changes.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from pydantic import BaseModel, ConfigDict, model_validator

from veloxbench.errors import UsageError
from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.inputs.models import load_model, resolve_model
from veloxbench.inputs.sources import cache_dir
from veloxbench.measure.throughput import prefill
from veloxbench.methods.cache_under_test import arrays_of
from veloxbench.methods.registry import BuildContext, build, checked
from veloxbench.records.arm import Arm
from veloxbench.records.frozen import Frozen

CANARY_REPEATS = 15
CANARY_WARM = 4

Clock = Literal["wall", "cpu"]
"""``wall`` is what users wait for, and the only clock for work that a GPU does. ``cpu`` is the processor time of all
threads of the side's process: the same where nothing waits, and blind to the turns of other processes on its core."""


def default_clock() -> Clock:
    """``wall`` on a GPU, ``cpu`` on a processor, where the wall clock counts whatever else runs on the same core."""
    return "wall" if mx.default_device() == mx.gpu else "cpu"


class DecodeSpec(Frozen):
    """One timed sample: ``steps`` decode steps after ``warm`` untimed ones, from a prefix of ``depth`` tokens.

    The untimed steps pay for copying the prefix's buffers and for caches that another process has emptied.
    """

    model: str = "smollm2-135m"
    n_layers: int | None = None
    arm: Arm = Arm(name="turboquant_mse", target=4.0)
    corpus: str = "bundled"
    depth: int = 128
    warm: int = 1
    steps: int = 3

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_journals(cls, fields: Any) -> Any:
        """Journals from before the arm was one thing hold its method, target and parameters side by side."""
        if isinstance(fields, dict) and "method" in fields:
            arm = {name: fields[name] for name in ("method", "target", "parameters") if name in fields}
            return {name: value for name, value in fields.items() if name not in arm} | {"arm": arm}
        return fields

    def model_post_init(self, _: Any) -> None:
        """Check sizes."""
        for name, least in (("depth", 2), ("warm", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"decode timing: {name} is {getattr(self, name)}; it must be at least {least}")


class StepTimes(BaseModel):
    """Each timed step, in microseconds of wall time and of this process's CPU time (all its threads)."""

    model_config = ConfigDict(frozen=True)

    wall_us: tuple[int, ...]
    cpu_us: tuple[int, ...]

    def seconds(self, clock: Clock) -> float:
        """The median step, so that one hiccup among the steps does not count."""
        return statistics.median(self.wall_us if clock == "wall" else self.cpu_us) / 1e6


@dataclass(frozen=True)
class _Clocks:
    wall_us: list[int]
    cpu_us: list[int]

    def time(self, work: Callable[[], None]) -> None:
        mx.synchronize()
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        work()
        mx.synchronize()
        self.wall_us.append((time.perf_counter_ns() - wall) // 1000)
        self.cpu_us.append((time.process_time_ns() - cpu) // 1000)

    def times(self) -> StepTimes:
        return StepTimes(wall_us=tuple(self.wall_us), cpu_us=tuple(self.cpu_us))


class DecodeBenchmark:
    """A loaded model with a prefix in its caches, ready to be sampled.

    Raises:
        UsageError: an unknown name, or a text too short.
    """

    def __init__(self, spec: DecodeSpec) -> None:
        self.spec = spec
        handle = resolve_model(spec.model)
        self.model, tokenizer = load_model(handle, n_layers=spec.n_layers)
        context = BuildContext(
            self.model, tokenizer, handle.weights_sha256, spec.n_layers, Path(cache_dir()) / "calibration"
        )
        caches, _ = build(context, checked(spec.arm))
        length = spec.depth + spec.warm + spec.steps
        tokens = token_block(load_text(spec.corpus, "evaluation"), tokenizer, n_sequences=1, length=length).tokens[0]
        self._saved = prefill(self.model, caches, tokens[: spec.depth]).caches
        self._fed = [mx.array([[int(token)]]) for token in tokens[spec.depth :]]
        self._weights = _largest_matrix(self.model)
        self._vector = mx.ones((1, self._weights.shape[1]), dtype=self._weights.dtype)
        mx.eval(self._fed, self._vector)
        # what is loaded by now stays: without this every collection between samples walks through all of it (0.2 s)
        gc.collect()
        gc.freeze()

    @property
    def extra_rows_at_once(self) -> int:
        """Rows of the matrix that the extra work streams; more rows take further passes."""
        return int(self._weights.shape[0])

    def _extra(self, rows: int) -> list[mx.array]:
        passes, rest = divmod(rows, self.extra_rows_at_once)
        matrices = [self._weights] * passes + ([self._weights[:rest]] if rest else [])
        return [self._vector @ matrix.T for matrix in matrices]

    def sample(self, extra_rows: int = 0) -> StepTimes:
        """Time the steps once, each with ``extra_rows`` rows of extra work; the saved prefix stays as it was."""
        caches: Sequence[Any] = copy.deepcopy(self._saved)
        clocks = _Clocks([], [])

        def step(token: mx.array) -> None:
            following = mx.argmax(self.model(token, cache=caches)[:, -1], axis=-1)
            mx.eval(following, self._extra(extra_rows), [arrays_of(cache) for cache in caches])

        gc.collect()
        gc.disable()
        try:
            for index, token in enumerate(self._fed):
                if index < self.spec.warm:
                    step(token)
                else:
                    clocks.time(lambda token=token: step(token))  # type: ignore[misc]
        finally:
            gc.enable()
        return clocks.times()


def _largest_matrix(model: Any) -> mx.array:
    leaves: Any = tree_flatten(model.parameters())
    arrays: list[mx.array] = [array for _, array in leaves]
    return max((a for a in arrays if a.ndim == 2 and mx.issubdtype(a.dtype, mx.floating)), key=lambda a: int(a.size))


class Canary:
    """Fixed work, the same in every block, that has nothing to do with what is compared.

    It is made as a decode step is, of products between small operations. Its 4 MiB of weights fit into a core's share
    of the cache and are brought back there by the untimed repeats: of 32 MiB it depends on the other cores' work how
    much is still cached, and the readings jump by 40% on a machine that is as fast as before.
    """

    def __init__(self, width: int = 512, layers: int = 4) -> None:
        rng = np.random.default_rng(0)
        self._weights = [
            mx.array(rng.standard_normal((width, width), dtype=np.float32) / width**0.5) for _ in range(layers)
        ]
        self._vector = mx.ones((1, width))
        mx.eval(self._weights, self._vector)

    def _work(self) -> None:
        x = self._vector
        for weight in self._weights:
            x = x @ weight
            x = mx.tanh(x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True)))
        mx.eval(x)

    def read(self) -> StepTimes:
        """Time it :data:`CANARY_REPEATS` times after :data:`CANARY_WARM` untimed ones."""
        clocks = _Clocks([], [])
        for _ in range(CANARY_WARM):
            self._work()
        for _ in range(CANARY_REPEATS):
            clocks.time(self._work)
        return clocks.times()
