"""The perplexity suite: what attention loses by reading the compressed cache.

NLL, perplexity and the divergence from the same model's fp16 cache on the same tokens, under a stated
protocol. The unit of every interval is the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray
from pydantic import Field

from veloxbench.errors import UnfitEnvironmentError
from veloxbench.measure.account import allocated_bits_per_value, bits_per_value
from veloxbench.measure.divergence import PositionStats, ReferenceRows, compare
from veloxbench.measure.protocol import Chunked, Decode, Protocol, feed
from veloxbench.measure.reference import lockstep, vocabulary_of
from veloxbench.measure.suite import ArmCaches, Bench, Cell, Measured, Measurement, Rates, Suite, Tick, measures
from veloxbench.methods.registry import reference_of
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.intervals import finite, mean_interval, quantile_interval
from veloxbench.records.record import Estimate, LayerEngagement, content_hash

NOISE_FLOOR_SEQUENCES = 2

FLOOR_LIMIT = 1e-3
"""Nats a token: fp32 leaves 4e-7 between batch sizes, half precision on a GPU below 1e-3, damage far more."""


def rows_per_step(protocol: Protocol, n_sequences: int) -> list[int]:
    """Scored positions of each forward pass that scores any, all sequences together."""
    lengths = (stop - max(start, protocol.score_from) for start, stop in protocol.windows())
    return [n_sequences * length for length in lengths if length > 0]


def run_reference(reference: Iterator[ReferenceRows], n_sequences: int, tick: Tick) -> NDArray[np.float64]:
    """Read the reference to its end; returns its NLL per sequence and position, ``[S, n_scored]``."""
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
    bench: Bench, tokens: NDArray[np.int32], protocol: Protocol, reference: Iterator[ReferenceRows]
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

    arm = bench.caches(REFERENCE)
    stats, _ = run_arm(bench.model, arm, tokens[:n], protocol, first_sequences(), bench.pool, lambda _: None)
    return stats.kld_nats.astype(np.float64)


def reference_metrics(nll: NDArray[np.float64], floor: NDArray[np.float64], layers: list[LayerEngagement]) -> Measured:
    """Metrics and samples of the fp16 arm.

    Raises:
        NotFiniteError: a figure is NaN or infinite.
        UnfitEnvironmentError: the fp16 cache differs from itself by more than :data:`FLOOR_LIMIT`.
    """
    nll, floor = finite("nll", nll), finite("kld_floor", floor)
    if floor.mean() > FLOOR_LIMIT:
        raise UnfitEnvironmentError(
            f"the fp16 cache differs from itself by {floor.mean():.3g} nats a token, a thousand times what rounding "
            f"explains ({FLOOR_LIMIT:g} is the limit): the model is not deterministic here, or its reference is damaged"
        )
    per_sequence = nll.mean(axis=1)
    mean = mean_interval(per_sequence, "nats/token")
    metrics = {
        "nll": mean,
        "ppl": _exponential(mean),
        "kld_floor_mean": mean_interval(floor.mean(axis=1), "nats/token"),
        "kld_floor_max": Estimate(value=float(floor.max()), unit="nats/token"),
        **cost(layers),
    }
    return Measured(metrics, {"nll": per_sequence.tolist(), "kld_floor": floor.mean(axis=1).tolist()}, layers)


def arm_metrics(stats: PositionStats, reference_nll: NDArray[np.float64], layers: list[LayerEngagement]) -> Measured:
    """Metrics and samples of an arm against the reference, paired position by position."""
    nll, kld = finite("nll", stats.nll), finite("kld", stats.kld_nats)
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
        **cost(layers),
    }
    return Measured(metrics, {name: values.tolist() for name, values in samples.items()}, layers)


def cost(layers: list[LayerEngagement]) -> dict[str, Estimate]:
    """What the tokens held cost, from the arrays held."""
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


def kept_decoded(arm: ArmCaches) -> ArmCaches:
    """The arm, its caches told to keep decoded tokens: what attention reads is the same, and each record says so."""
    for cache in arm.caches:
        if hasattr(cache.inner, "keep_decoded"):
            cache.inner.keep_decoded = True
    return arm


@measures
class Perplexity(Suite):
    """Every arm under every protocol of the grid, against the same tokens through the fp16 cache."""

    name = "perplexity"
    section = "protocols"
    tasks = tuple[Annotated[Chunked | Decode, Field(discriminator="name")], ...]

    def cells(self, tasks: Sequence[Protocol], arms: Sequence[Arm]) -> Iterator[Cell]:
        """One per protocol and arm; a sequence's last token is only a target."""
        for task in tasks:
            for arm in arms:
                yield Cell(self.name, task.name, task, arm, task.sequences, task.n_tokens + 1, task.n_tokens)

    def seconds(self, cell: Cell, rates: Rates) -> float:
        """Tokens in batches, and for the decode protocol steps of a batch."""
        task: Protocol = cell.task
        if isinstance(task, Chunked):
            return cell.slower * task.sequences * task.length * rates.token_seconds
        batched = task.sequences * task.prefix * rates.token_seconds
        return cell.slower * (batched + task.steps * (rates.step_seconds + task.sequences * rates.token_seconds))

    def units(self, cell: Cell) -> int:
        """Scored positions of all sequences."""
        return int(cell.task.sequences * cell.task.n_scored)

    def measure(self, item: Measurement, bench: Bench, tick: Tick) -> Measured:
        """Feed the arm and compare every scored position with the reference; the reference gets its noise floor."""
        task, tokens, arm = item.cell.task, item.block.tokens, kept_decoded(bench.caches(item.cell.arm))
        if item.cell.arm == REFERENCE:
            nll = run_reference(computed_reference(item, bench, arm), len(tokens), tick)
            floor = noise_floor(bench, tokens, task, reference_rows_of(item, bench))
            return reference_metrics(nll, floor, arm.engagement())
        stats, nll = run_arm(bench.model, arm, tokens, task, reference_rows_of(item, bench), bench.pool, tick)
        return arm_metrics(stats, nll, arm.engagement())


def reference_key(item: Measurement) -> str:
    """The name under which the reference's log-probabilities are kept, made from the key of the reference's record."""
    subject = item.subject.model_copy(update={"method": reference_of(REFERENCE)})
    return content_hash([subject.key, "log-probabilities"])


def reference_rows_of(item: Measurement, bench: Bench) -> Iterator[ReferenceRows]:
    """The reference's rows: from disk where they are kept, else computed now."""
    key = reference_key(item)
    if not bench.references.has(key):
        return computed_reference(item, bench, bench.caches(REFERENCE))

    def again() -> Iterator[ReferenceRows]:
        bench.say("the fp16 reference that was kept is damaged or gone: it is computed again")
        return computed_reference(item, bench, bench.caches(REFERENCE))

    return bench.references.read(key, rows_per_step(item.cell.task, len(item.block.tokens)), again)


def computed_reference(item: Measurement, bench: Bench, arm: ArmCaches) -> Iterator[ReferenceRows]:
    """The reference's rows from a pass of ``arm``: kept on disk, or in lockstep where they would not fit."""
    task, tokens, references = item.cell.task, item.block.tokens, bench.references
    key = reference_key(item)
    n_rows, vocabulary = sum(rows_per_step(task, len(tokens))), vocabulary_of(bench.model, tokens)
    steps = feed(bench.model, arm.caches, tokens, task)
    if references.has(key) or not references.fits(n_rows, vocabulary):
        return lockstep(steps, bench.pool)
    bench.say(
        f"keeping the fp16 reference's log-probabilities: {references.size(n_rows, vocabulary) / 1e6:.0f} MB "
        f"in {references.folder} (least recently used out above {references.cap_bytes / 2**30:g} GiB)"
    )
    return references.write(key, steps, n_rows, vocabulary, bench.pool)
