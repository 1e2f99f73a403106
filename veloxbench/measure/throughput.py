"""The throughput suite: prefill, time to first token and decode, in interleaved pairs against fp16.

Every figure of an arm is taken beside the reference's in the same process, in an order drawn per pair: a
machine that drifts moves both. Ratios carry the intervals; absolute rates are this machine's of that moment.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxbench.errors import UsageError
from veloxbench.measure.suite import ArmCaches, Bench, Cell, Measured, Measurement, Rates, Suite, Tick, measures
from veloxbench.methods.cache_under_test import arrays_of
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.intervals import median_interval, ratio_interval
from veloxbench.records.record import Estimate

PREFILL_CHUNK = 2048  # mlx-lm's own prefill step


@dataclass(frozen=True)
class Timing:
    """How often and how far to decode and prefill at one depth."""

    depth: int
    pairs: int
    steps: int
    prefill_pairs: int

    def __post_init__(self) -> None:
        for name in ("depth", "pairs", "steps", "prefill_pairs"):
            least = 2 if name in ("depth", "pairs") else 1
            if getattr(self, name) < least:
                raise UsageError(f"throughput: {name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def n_tokens(self) -> int:
        """Tokens of text needed: the prefix, one untimed step, the timed steps."""
        return self.depth + self.steps + 1


@dataclass(frozen=True)
class Prefilled:
    """Caches that hold a prefix, and what filling them took."""

    caches: Sequence[Any]
    prefill_seconds: float
    first_token_seconds: float


def prefill(model: Module, caches: Sequence[Any], prompt: NDArray[np.int32]) -> Prefilled:
    """As mlx-lm generates: all tokens but the last in chunks, then one step gives the first new token.

    Args:
        prompt: ``[T]`` token ids.
    """
    mx.synchronize()
    start = time.perf_counter()
    for first in range(0, len(prompt) - 1, PREFILL_CHUNK):
        model(mx.array(prompt[None, first : min(first + PREFILL_CHUNK, len(prompt) - 1)]), cache=caches)
        mx.eval([arrays_of(cache) for cache in caches])
    mx.synchronize()
    filled = time.perf_counter()
    token = mx.argmax(model(mx.array(prompt[None, -1:]), cache=caches)[:, -1], axis=-1)
    mx.eval(token, [arrays_of(cache) for cache in caches])
    mx.synchronize()
    return Prefilled(caches, filled - start, time.perf_counter() - start)


def decode(model: Module, saved: Sequence[Any], tokens: NDArray[np.int32]) -> float:
    """Seconds for ``len(tokens) - 1`` single-token steps from a saved prefix, which stays as it was.

    The first step is not timed: it pays for copying the prefix's buffers.
    """
    caches = copy.deepcopy(saved)
    start = 0.0
    for index, token in enumerate(tokens):
        if index == 1:
            gc.collect()
            mx.synchronize()
            start = time.perf_counter()
        following = mx.argmax(model(mx.array([[int(token)]]), cache=caches)[:, -1], axis=-1)
        mx.eval(following, [arrays_of(cache) for cache in caches])
    mx.synchronize()
    return time.perf_counter() - start


def measure_pairs(
    model: Module,
    fill: Mapping[str, Callable[[NDArray[np.int32]], Prefilled]],
    tokens: NDArray[np.int32],
    timing: Timing,
    seed: int,
    tick: Tick,
) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Time an arm against the reference at one depth.

    Args:
        fill: prefills the caches of ``arm`` and of ``fp16`` with a prompt, see :func:`prefill`.
        tokens: ``[timing.n_tokens]``; both arms read the same.
        seed: draws the order within each pair.
    Returns:
        Metrics and raw samples (seconds, one per pair).
    """
    rng = np.random.default_rng(seed)
    prompt, steps = tokens[: timing.depth], tokens[timing.depth : timing.depth + timing.steps + 1]
    seconds: dict[str, list[float]] = {
        f"{name}_{arm}": [] for name in ("prefill", "ttft", "decode") for arm in ("arm", "fp16")
    }
    saved: dict[str, Sequence[Any]] = {}
    for _ in range(timing.prefill_pairs):
        for arm in rng.permutation(["arm", "fp16"]).tolist():
            saved.pop(arm, None)
            done = fill[arm](prompt)
            saved[arm] = done.caches
            seconds[f"prefill_{arm}"].append(done.prefill_seconds)
            seconds[f"ttft_{arm}"].append(done.first_token_seconds)
            tick(timing.depth)
    for _ in range(timing.pairs):
        for arm in rng.permutation(["arm", "fp16"]).tolist():
            seconds[f"decode_{arm}"].append(decode(model, saved[arm], steps))
            tick(len(steps))
    return _metrics(seconds, timing), seconds


def _metrics(seconds: dict[str, list[float]], timing: Timing) -> dict[str, Estimate]:
    metrics: dict[str, Estimate] = {}
    for name, tokens in (("prefill", timing.depth - 1), ("decode", timing.steps)):
        for arm in ("arm", "fp16"):
            rates = tokens / np.array(seconds[f"{name}_{arm}"])
            metrics[f"{name}_tok_s" if arm == "arm" else f"{name}_tok_s_fp16"] = median_interval(rates, "tok/s")
        # a ratio of speeds: above 1 the arm is faster than fp16
        metrics[f"{name}_speed_ratio"] = ratio_interval(seconds[f"{name}_fp16"], seconds[f"{name}_arm"])
    metrics["ttft_s"] = median_interval(seconds["ttft_arm"], "s")
    metrics["ttft_ratio"] = ratio_interval(seconds["ttft_arm"], seconds["ttft_fp16"])
    return metrics


@measures
class Throughput(Suite):
    """Every arm at every depth of the grid, in pairs with the reference."""

    name = "throughput"
    section = "throughput"
    tasks = tuple[Timing, ...]

    def cells(self, tasks: Sequence[Timing], arms: Sequence[Arm]) -> Iterator[Cell]:
        """One per depth and arm."""
        for task in tasks:
            for arm in arms:
                yield Cell(self.name, f"depth {task.depth}", task, arm, 1, task.n_tokens, task.n_tokens)

    def seconds(self, cell: Cell, rates: Rates) -> float:
        """Both sides' prefills, then both sides' decode steps of every pair."""
        task: Timing = cell.task
        prefills = task.prefill_pairs * (1 + cell.slower) * rates.prefix_seconds(task.depth)
        return prefills + task.pairs * (1 + 3 * cell.slower) * (task.steps + 1) * rates.step_seconds

    def measure(self, item: Measurement, bench: Bench, tick: Tick) -> Measured:
        """Time the arm; what held its layers is read from the caches that were filled last."""
        timing, caches_of, model, kept = item.cell.task, bench.caches, bench.model, bench.kept
        last: list[ArmCaches] = []

        def fill_arm(prompt: NDArray[np.int32]) -> Prefilled:
            last[:] = [caches_of(item.cell.arm)]
            return prefill(model, last[0].caches, prompt)

        def fill_reference(prompt: NDArray[np.int32]) -> Prefilled:
            if timing.prefill_pairs > 1:
                return prefill(model, caches_of(REFERENCE).caches, prompt)
            # one pair gives no interval: a long prefix is then filled once for all arms, not as the other half of each
            tokens = prompt.tobytes()
            if kept.get("prefix tokens") != tokens:
                kept["prefix"] = prefill(model, caches_of(REFERENCE).caches, prompt)
                kept["prefix tokens"] = tokens
            shared: Prefilled = kept["prefix"]
            return shared

        seed = int(item.subject.key[:8], 16)  # another order for every arm and depth
        fill = {"arm": fill_arm, "fp16": fill_reference}
        metrics, samples = measure_pairs(model, fill, item.block.tokens[0], timing, seed, tick)
        return Measured(metrics, samples, last[0].engagement())
