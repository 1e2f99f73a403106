"""The perplexity suite: what attention loses by reading the compressed cache.

NLL, perplexity and the divergence from the same model's fp16 cache on the same tokens, under a stated
protocol. The unit of every interval is the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxbench.measure.account import allocated_bits_per_value, bits_per_value, engagement
from veloxbench.measure.divergence import PositionStats, ReferenceRows, compare
from veloxbench.measure.protocol import Protocol, feed
from veloxbench.methods.cache_under_test import CacheUnderTest
from veloxbench.records.intervals import mean_interval, quantile_interval
from veloxbench.records.record import Estimate, LayerEngagement

Tick = Callable[[int], None]
"""Called with the number of tokens just processed."""

NOISE_FLOOR_SEQUENCES = 2


@dataclass(frozen=True)
class ArmCaches:
    """An arm's caches, the layers that it claims, and the classes that must hold them."""

    caches: Sequence[CacheUnderTest]
    claimed: Sequence[bool]
    expected: tuple[type, ...]

    def engagement(self) -> list[LayerEngagement]:
        """Read after the tokens went through."""
        return engagement(self.caches, self.claimed, self.expected)


def rows_per_step(protocol: Protocol, n_sequences: int) -> list[int]:
    """Scored positions of each forward pass that scores any, all sequences together."""
    lengths = (stop - max(start, protocol.score_from) for start, stop in protocol.windows())
    return [n_sequences * length for length in lengths if length > 0]


def run_reference(reference: Iterator[ReferenceRows], n_sequences: int, tick: Tick) -> NDArray[np.float64]:
    """Drain the reference; its NLL per sequence and position, ``[S, n_scored]``."""
    parts = []
    for rows in reference:
        parts.append(rows.nll.reshape(n_sequences, -1))
        tick(len(rows.nll))
    nll: NDArray[np.float64] = np.concatenate(parts, axis=1).astype(np.float64)
    return nll


def run_arm(
    model: Module,
    arm: ArmCaches,
    tokens: NDArray[np.int32],
    protocol: Protocol,
    reference: Iterator[ReferenceRows],
    pool: ThreadPoolExecutor,
    tick: Tick,
) -> tuple[PositionStats, NDArray[np.float64]]:
    """Feed an arm and compare every scored position with the reference.

    Returns:
        The arm's figures ``[S, n_scored]`` and the reference's NLL in the same shape. Only one step's
        logits are in memory at a time (two in lockstep).
    """
    n_sequences = tokens.shape[0]
    parts, reference_nll = [], []
    for step in feed(model, arm.caches, tokens, protocol):
        if step is None:
            continue
        rows = next(reference)
        logits = step.logits.reshape(-1, step.logits.shape[-1])
        stats = compare(rows, logits, step.targets.reshape(-1), pool)
        parts.append(stats.reshape(n_sequences, -1))
        reference_nll.append(rows.nll.reshape(n_sequences, -1))
        tick(len(rows.nll))
    if next(reference, None) is not None:  # also lets a reference that is being kept finish its files
        raise ValueError("the reference has more scored positions than the arm")
    return PositionStats.concatenate(parts), np.concatenate(reference_nll, axis=1).astype(np.float64)


def noise_floor(
    model: Module,
    arm: ArmCaches,
    tokens: NDArray[np.int32],
    protocol: Protocol,
    reference: Iterator[ReferenceRows],
    pool: ThreadPoolExecutor,
) -> NDArray[np.float64]:
    """KLD of a second fp16 run on the first two sequences alone, against the reference, ``[2, n_scored]``.

    Another batch size takes other kernels, and the reference was rounded to fp16: this is what zero looks like.
    """
    n_sequences = tokens.shape[0]
    n = min(NOISE_FLOOR_SEQUENCES, n_sequences)

    def first_sequences() -> Iterator[ReferenceRows]:
        for rows in reference:
            length = len(rows.nll) // n_sequences * n
            yield ReferenceRows(
                rows.log_probs[:length], rows.normaliser[:length], rows.nll[:length], rows.top1[:length]
            )

    stats, _ = run_arm(model, arm, tokens[:n], protocol, first_sequences(), pool, lambda _: None)
    return stats.kld_nats.astype(np.float64)


Measured = tuple[dict[str, Estimate], dict[str, list[float]]]


def reference_metrics(nll: NDArray[np.float64], floor: NDArray[np.float64], layers: list[LayerEngagement]) -> Measured:
    """Metrics and samples of the fp16 arm."""
    per_sequence = nll.mean(axis=1)
    mean = mean_interval(per_sequence, "nats/token")
    metrics = {
        "nll": mean,
        "ppl": _exponential(mean),
        "kld_floor_mean": mean_interval(floor.mean(axis=1), "nats/token"),
        "kld_floor_max": Estimate(value=float(floor.max()), unit="nats/token"),
        **_cost(layers),
    }
    return metrics, {"nll": per_sequence.tolist(), "kld_floor": floor.mean(axis=1).tolist()}


def arm_metrics(stats: PositionStats, reference_nll: NDArray[np.float64], layers: list[LayerEngagement]) -> Measured:
    """Metrics and samples of an arm against the reference, paired position by position."""
    nll = stats.nll.astype(np.float64)
    kld = stats.kld_nats.astype(np.float64)
    delta_p = stats.target_prob.astype(np.float64) - np.exp(-reference_nll)
    samples: dict[str, NDArray[np.float64]] = {
        "nll": nll.mean(axis=1),
        "delta_nll": (nll - reference_nll).mean(axis=1),
        "kld_mean": kld.mean(axis=1),
        "top1": stats.same_top1.mean(axis=1, dtype=np.float64),
        "delta_p_squared": (delta_p**2).mean(axis=1),
    }
    mean_nll, delta = mean_interval(samples["nll"], "nats/token"), mean_interval(samples["delta_nll"], "nats/token")
    reference_ppl = float(np.exp(reference_nll.mean()))
    groups = list(kld)
    squared = mean_interval(samples["delta_p_squared"], "")
    metrics = {
        "nll": mean_nll,
        "ppl": _exponential(mean_nll),
        "delta_nll": delta,
        # the reference's own perplexity is a constant of the text here: the interval is that of the pairs
        "delta_ppl": _mapped(delta, lambda d: reference_ppl * float(np.expm1(d)), "ppl"),
        "kld_mean": mean_interval(samples["kld_mean"], "nats/token"),
        "kld_median": quantile_interval(groups, 0.5, "nats/token"),
        "kld_p99": quantile_interval(groups, 0.99, "nats/token"),
        "kld_p999": quantile_interval(groups, 0.999, "nats/token"),
        "top1_agreement": mean_interval(samples["top1"], "fraction"),
        "delta_p_rms": _mapped(squared, lambda s: float(np.sqrt(max(s, 0.0))), "probability"),
        **_cost(layers),
    }
    return metrics, {name: values.tolist() for name, values in samples.items()}


def _cost(layers: list[LayerEngagement]) -> dict[str, Estimate]:
    return {
        "bits_per_value": Estimate(value=bits_per_value(layers), unit="bits"),
        "allocated_bits_per_value": Estimate(value=allocated_bits_per_value(layers), unit="bits"),
        "engaged_layers": Estimate(value=sum(layer.engaged for layer in layers), unit="layers"),
    }


def _mapped(estimate: Estimate, function: Callable[[float], float], unit: str) -> Estimate:
    """A monotone function of an estimate and of its interval."""

    def bound(value: float | None) -> float | None:
        return None if value is None else function(value)

    return Estimate(
        value=function(estimate.value),
        low=bound(estimate.low),
        high=bound(estimate.high),
        unit=unit,
        interval=estimate.interval,
    )


def _exponential(mean_nll: Estimate) -> Estimate:
    return _mapped(mean_nll, lambda value: float(np.exp(value)), "ppl")
