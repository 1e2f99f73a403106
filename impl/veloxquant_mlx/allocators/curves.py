"""Distortion of a quantizer on a model's own keys and values, measured at every width.

RateQuant (arXiv 2605.06675, §3) models it as ``D(b) = α·β^(−b)``. That fit is kept for reading and for the
closed-form allocation; integer allocation uses the measured table, because below two bits the exponential can
predict more distortion than the signal has power.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import TypeAdapter

from veloxquant_mlx.allocators.sensitivity import KINDS, HeadSensitivities, Provenance, Sensitivities
from veloxquant_mlx.files import reading
from veloxquant_mlx.quantizers.base import Coding, Quantizer, pair_name
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

Floats = NDArray[np.float64]


QuantizerFactory = Callable[[int], Quantizer]
"""Code width -> quantizer; the quantizer classes themselves serve."""

QuantizerFactories = QuantizerFactory | Mapping[str, QuantizerFactory]
"""One factory for keys and values, or one of each: ``{"keys": ..., "values": ...}``."""

Weighting = Literal["coherent", "token", "product"]
"""How gradients meet errors; see :func:`fit_distortion_curve`."""


def by_kind(quantizer: QuantizerFactories) -> Mapping[str, QuantizerFactory]:
    """The factories of keys and of values.

    Raises:
        ValueError: a mapping with other names.
    """
    if not isinstance(quantizer, Mapping):
        return dict.fromkeys(KINDS, quantizer)
    if set(quantizer) != set(KINDS):
        raise ValueError(
            f"quantizer must map {' and '.join(KINDS)}, got {', '.join(map(repr, quantizer)) or 'nothing'}"
        )
    return {kind: quantizer[kind] for kind in KINDS}


@dataclass(frozen=True)
class ExponentialFit:
    """``D(b) ≈ alpha * beta**-b`` by least squares on ln D.

    Attributes:
        alpha: distortion that the fit predicts at zero bits.
        beta: factor by which a bit divides it; 4 at the rate-distortion bound of a Gaussian.
        log_rmse: root mean square of ln D - ln fit; 0.1 reads as about 10%.
    """

    alpha: float
    beta: float
    log_rmse: float


def exponential_fit(widths: Sequence[int], distortions: ArrayLike) -> ExponentialFit:
    """Fit ``alpha * beta**-b`` to the distortions at ``widths``, zero left out.

    Raises:
        ValueError: fewer than two widths above zero, or a distortion that is not positive.
    """
    bits = np.array(widths, dtype=np.float64)
    distortion = np.asarray(distortions, dtype=np.float64)
    coded = bits > 0
    if coded.sum() < 2:
        raise ValueError(f"widths={list(widths)}: an exponential needs two widths above zero")
    if not (distortion[coded] > 0).all():
        raise ValueError(f"distortions must be positive, got {distortion[coded].tolist()}")
    design = np.stack([np.ones(coded.sum()), -bits[coded]], axis=1)
    target = np.log(distortion[coded])
    (log_alpha, log_beta), *_ = np.linalg.lstsq(design, target, rcond=None)
    residual = target - design @ np.array([log_alpha, log_beta])
    return ExponentialFit(float(np.exp(log_alpha)), float(np.exp(log_beta)), float(np.sqrt(np.mean(residual**2))))


@dataclass(frozen=True)
class DistortionCurve:
    """One head's keys or values: how much error each width leaves, and what that costs.

    Attributes:
        layer: index of the layer's cache.
        kind: ``keys`` or ``values``.
        head: index of the KV head.
        head_dim: length of its vectors.
        sinks: first tokens left out, because the cache keeps them in fp16.
        weight: gradient sensitivity w.
        variance: mean square per coordinate around the head's mean vector: D(0).
        distortions: measured mean square error per coordinate at each of the set's widths.
        losses: forecast of the loss increase at each width, in nats per token; what allocation minimises.
        fit: exponential through the distortions above zero bits.
        max_size: the layer's sliding window in tokens, None for full attention.
    """

    layer: int
    kind: str
    head: int
    head_dim: int
    sinks: int
    weight: float
    variance: float
    distortions: tuple[float, ...]
    losses: tuple[float, ...]
    fit: ExponentialFit
    max_size: int | None = None

    def __post_init__(self) -> None:
        name = f"layer_{self.layer}.{self.kind}.head_{self.head}"
        for field, values in (
            ("weight", [self.weight]),
            ("distortions", self.distortions),
            ("losses", self.losses),
        ):
            bad = [value for value in values if not (np.isfinite(value) and value >= 0)]
            if bad:
                raise ValueError(f"{field} of {name} must be finite and not negative, got {bad[0]}")


@dataclass(frozen=True)
class DistortionCurves:
    """Curves of every head of a model for one quantizer.

    Attributes:
        curves: in the model's order: layer, then keys before values, then head.
        widths: code widths measured, ascending.
        costs: for every head_dim, the quantizer's real bits_per_value at each width.
        quantizer: its name; two as in ``kivi_keys/affine`` where values are coded differently.
        sinks: first tokens that full-attention layers keep in fp16.
        weighting: how losses were formed from gradients and errors.
        provenance: of the sensitivities.
        value_costs: ``costs`` of the values, where they differ from the keys'.
        codings: parameters and blocks of the keys' and of the values' quantizer; None in curves saved before they were
            kept, whose quantizers then count as coding token by token.
    """

    curves: tuple[DistortionCurve, ...]
    widths: tuple[int, ...]
    costs: dict[int, tuple[Fraction, ...]]
    quantizer: str
    sinks: int
    weighting: Weighting
    provenance: Provenance
    value_costs: dict[int, tuple[Fraction, ...]] | None = None
    codings: tuple[Coding, Coding] | None = None

    def coding(self, kind: str) -> Coding:
        """Blocks of the quantizer of ``keys`` or ``values``."""
        return Coding(self.quantizer) if self.codings is None else self.codings[KINDS.index(kind)]

    def cost(self, curve: DistortionCurve, column: int) -> Fraction:
        """Real bits_per_value of a head at the width of a column."""
        costs = self.costs if curve.kind == "keys" or self.value_costs is None else self.value_costs
        return costs[curve.head_dim][column]

    def save(self, path: str | Path) -> None:
        """Write the curves as JSON, fractions as ``"5/4"``."""
        Path(path).write_bytes(_CURVES.dump_json(self, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> DistortionCurves:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, or holds no curves.
        """
        with reading(path, "distortion curves"):
            return _CURVES.validate_json(Path(path).read_bytes())


_CURVES = TypeAdapter(DistortionCurves)


def coding_errors(quantizer: Quantizer, vectors: mx.array) -> mx.array:
    """What storing and reading back adds to each vector.

    Args:
        quantizer: what to measure; one that calibrates does so on its first tokens, as in a cache.
        vectors: ``[B, H, T, D]``; tokens beyond whole blocks of the quantizer stay exact, as in a cache.

    Returns:
        ``[B, H, T, D]`` fp32.
    """
    coded = vectors.shape[2] // quantizer.block_tokens * quantizer.block_tokens
    x = vectors[:, :, :coded]
    static = quantizer.calibrate(x[:, :, : quantizer.calibration_tokens or None])
    error = quantizer.decode(quantizer.encode(x, static), mx.float32) - x.astype(mx.float32)
    return mx.pad(error, [(0, 0), (0, 0), (0, vectors.shape[2] - coded), (0, 0)])


def _paired(squares: Floats, errors: mx.array, weight: Floats) -> Floats:
    """½ E[(1/T) Σ_t ‖g_t‖² mse_t] of each head, for errors that are independent between tokens.

    A ratio to the measured tokens' own gradients, so that the weight still rests on all sequences.
    """
    mse = np.array(mx.mean(mx.square(errors), axis=-1), dtype=np.float64)
    gradients = squares.sum(axis=(0, 2))
    return np.asarray(0.5 * weight * (squares * mse).sum(axis=(0, 2)) / np.where(gradients > 0, gradients, 1))


def _dot(a: mx.array, b: mx.array) -> Floats:
    """Per head, the sum of products over everything else."""
    return np.array(mx.sum(a * b, axis=(0, 2, 3)), dtype=np.float64)


def _coherent(entry: HeadSensitivities, errors: mx.array, squares: Floats, weight: Floats, sinks: int) -> Floats:
    """Loss of each head from errors with a part ``-λ (x - mean)`` that all tokens share."""
    x = entry.vectors[:, :, sinks:].astype(mx.float32)
    centred = x - mx.mean(x, axis=(0, 2), keepdims=True)
    energy = _dot(centred, centred)
    shrinkage = -_dot(errors, centred) / np.where(energy > 0, energy, 1)
    rest = errors + mx.array(shrinkage.astype(np.float32))[:, None, None] * centred
    # One number per sequence and head: how the loss moves when all its vectors shrink together.
    slope = mx.sum(entry.gradients[:, :, sinks:].astype(mx.float32) * centred, axis=(2, 3))
    tokens = entry.vectors.shape[2]
    curvature = np.array(mx.mean(mx.square(slope), axis=0), dtype=np.float64) / tokens
    return _paired(squares, rest, weight) + 0.5 * shrinkage**2 * curvature


def _head_curves(
    entry: HeadSensitivities,
    quantizers: Sequence[Quantizer],
    widths: Sequence[int],
    sinks: int,
    weighting: Weighting,
) -> list[DistortionCurve]:
    sinks = sinks if entry.max_size is None else 0  # the first tokens of a sliding window leave it
    vectors = entry.vectors[:, :, sinks:]
    squares = entry.squared_gradients[:, :, sinks:]
    share = squares.shape[2] / entry.squared_gradients.shape[2]  # fp16 tokens cost no loss
    weight = squares.mean(axis=(0, 2)) * share
    kept = squares[: vectors.shape[0]]
    table, forecast = [], []
    for quantizer in quantizers:
        errors = coding_errors(quantizer, vectors)
        mse = np.array(mx.mean(mx.square(errors), axis=(0, 2, 3)), dtype=np.float64)
        table.append(mse)
        if weighting == "coherent":
            forecast.append(_coherent(entry, errors, kept, weight, sinks))
        elif weighting == "token":
            forecast.append(_paired(kept, errors, weight))
        else:
            forecast.append(0.5 * weight * mse)
    distortions, losses = np.stack(table, axis=1), np.stack(forecast, axis=1)
    variance = np.array(mx.var(vectors.astype(mx.float32), axis=(0, 2)).mean(axis=-1), dtype=np.float64)
    return [
        DistortionCurve(
            layer=entry.layer,
            kind=entry.kind,
            head=head,
            head_dim=entry.head_dim,
            sinks=sinks,
            weight=float(weight[head]),
            variance=float(variance[head]),
            distortions=tuple(distortions[head].tolist()),
            losses=tuple(losses[head].tolist()),
            fit=exponential_fit(widths, distortions[head]),
            max_size=entry.max_size,
        )
        for head in range(entry.n_kv_heads)
    ]


def fit_distortion_curve(
    sensitivities: Sensitivities,
    quantizer: QuantizerFactories = TurboQuantMSE,
    *,
    widths: Sequence[int] = tuple(range(1, 9)),
    sinks: int = 0,
    weighting: Weighting = "coherent",
) -> DistortionCurves:
    """Measure D(b) of a quantizer on the model's own keys and values, head by head.

    Each width's loss is forecast to second order, in nats per token, by one of three weightings:

    - ``product``: ``½ w D(b)``, RateQuant's. Overrates heads whose sensitive tokens have small vectors:
      attention sinks, above all in the values.
    - ``token``: ``½ E[(1/T) Σ_t ‖∂L/∂x_t‖² mse_t(b)]``, gradients and errors paired token by token. Assumes that
      errors of different tokens are independent, which fails below 3 bits.
    - ``coherent``: errors split into ``-λ (x_t - mean)``, the shrinkage that all tokens share (a centroid is the
      mean of its cell, and zero bits shrink to nothing), and the rest. The rest is weighted as in ``token``; the
      shrinkage adds ``½ λ² E[(Σ_t ∂L/∂x_t · (x_t - mean))²] / T``.

    Args:
        sensitivities: from :func:`~veloxquant_mlx.allocators.ratequant.calibrate_layer_sensitivities`.
        quantizer: makes the quantizer of a code width: the one that the cache will use. Where values are coded
            differently from keys (KIVI), a mapping with one for each: ``make_options("kivi", {}).factories()``.
        widths: code widths to measure, 0..8; 0 only where ``quantizer`` has a code of no bits.
        sinks: first tokens that the cache will keep in fp16, on layers of full attention.
        weighting: ``coherent``, ``token`` or ``product``.

    Returns:
        Measured tables with their real costs, and an exponential fit of each for reading.

    Raises:
        ValueError: widths that are not distinct integers in 0..8, sinks that leave no token, an unknown
            weighting, a mapping without keys or values, or whatever ``quantizer`` raises for a width.
    """
    ordered = tuple(sorted(widths))
    if len(set(ordered)) < len(ordered) or not all(isinstance(b, int) and 0 <= b <= 8 for b in ordered):
        raise ValueError(f"widths must be distinct integers in 0..8, got {tuple(widths)}")
    if not 0 <= sinks < sensitivities.provenance.seq_len:
        raise ValueError(f"sinks={sinks} must lie in 0..{sensitivities.provenance.seq_len - 1}")
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting={weighting!r} must be one of {', '.join(get_args(Weighting))}")
    quantizers = {kind: [make(bits) for bits in ordered] for kind, make in by_kind(quantizer).items()}
    head_dims = sorted({entry.head_dim for entry in sensitivities.heads})
    costs, value_costs = (
        {dim: tuple(q.bits_per_value(dim) for q in quantizers[kind]) for dim in head_dims} for kind in KINDS
    )
    return DistortionCurves(
        curves=tuple(
            curve
            for entry in sensitivities.heads
            for curve in _head_curves(entry, quantizers[entry.kind], ordered, sinks, weighting)
        ),
        widths=ordered,
        costs=costs,
        quantizer=pair_name(quantizers["keys"][-1], quantizers["values"][-1]),
        sinks=sinks,
        weighting=weighting,
        provenance=sensitivities.provenance,
        value_costs=None if value_costs == costs else value_costs,
        codings=(Coding.of(quantizers["keys"][-1]), Coding.of(quantizers["values"][-1])),
    )
