"""Distortion of a quantizer on a model's own keys and values, measured at every width.

RateQuant (arXiv 2605.06675, §3) models it as ``D(b) = α·β^(−b)``. That fit is kept for reading and for the
closed-form allocation; integer allocation uses the measured table, because below two bits the exponential can
predict more distortion than the signal has power.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from veloxquant_mlx.allocators.sensitivity import HeadSensitivities, Provenance, Sensitivities
from veloxquant_mlx.quantizers.base import Quantizer
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

Floats = NDArray[np.float64]


QuantizerFactory = Callable[[int], Quantizer]
"""Code width -> quantizer; the quantizer classes themselves serve."""

Weighting = Literal["token", "product"]
"""How gradients meet errors: token by token, or as a product of means (the paper's)."""


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
        quantizer: its name.
        sinks: first tokens that full-attention layers keep in fp16.
        weighting: how losses were formed from gradients and errors.
        provenance: of the sensitivities.
    """

    curves: tuple[DistortionCurve, ...]
    widths: tuple[int, ...]
    costs: dict[int, tuple[Fraction, ...]]
    quantizer: str
    sinks: int
    weighting: Weighting
    provenance: Provenance

    def save(self, path: str | Path) -> None:
        """Write the curves as JSON, fractions as ``"5/4"``."""
        fields = asdict(self)
        fields["costs"] = {str(dim): [str(cost) for cost in row] for dim, row in self.costs.items()}
        Path(path).write_text(json.dumps(fields, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> DistortionCurves:
        """Read what :meth:`save` wrote."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        curves = tuple(
            DistortionCurve(
                **curve
                | {
                    "distortions": tuple(curve["distortions"]),
                    "losses": tuple(curve["losses"]),
                    "fit": ExponentialFit(**curve["fit"]),
                }
            )
            for curve in fields["curves"]
        )
        costs = {int(dim): tuple(map(Fraction, row)) for dim, row in fields["costs"].items()}
        return cls(
            **fields
            | {
                "curves": curves,
                "widths": tuple(fields["widths"]),
                "costs": costs,
                "provenance": Provenance(**fields["provenance"]),
            }
        )


def squared_errors(quantizer: Quantizer, vectors: mx.array) -> Floats:
    """Mean square error per coordinate that storing each token leaves.

    Args:
        quantizer: what to measure; one that calibrates does so on its first tokens, as in a cache.
        vectors: ``[B, H, T, D]``; tokens beyond whole blocks of the quantizer stay exact, as in a cache.

    Returns:
        ``[B, H, T]``.
    """
    coded = vectors.shape[2] // quantizer.block_tokens * quantizer.block_tokens
    x = vectors[:, :, :coded]
    static = quantizer.calibrate(x[:, :, : quantizer.calibration_tokens or None])
    error = quantizer.decode(quantizer.encode(x, static)).astype(mx.float32) - x.astype(mx.float32)
    per_token = np.array(mx.mean(mx.square(error), axis=-1), dtype=np.float64)
    return np.pad(per_token, [(0, 0), (0, 0), (0, vectors.shape[2] - coded)])


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
    errors = np.stack([squared_errors(quantizer, vectors) for quantizer in quantizers], axis=-1)
    distortions = errors.mean(axis=(0, 2))
    if weighting == "token":
        # A ratio to the kept tokens' own gradients, so that the weight still rests on all sequences.
        kept = squares[: errors.shape[0]]
        gradients = kept.sum(axis=(0, 2))
        seen = np.einsum("sht,shtw->hw", kept, errors) / np.where(gradients > 0, gradients, 1)[:, None]
    else:
        seen = distortions
    losses = 0.5 * weight[:, None] * seen
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
        )
        for head in range(entry.n_kv_heads)
    ]


def fit_distortion_curve(
    sensitivities: Sensitivities,
    quantizer: QuantizerFactory = TurboQuantMSE,
    *,
    widths: Sequence[int] = tuple(range(1, 9)),
    sinks: int = 0,
    weighting: Weighting = "token",
) -> DistortionCurves:
    """Measure D(b) of a quantizer on the model's own keys and values, head by head.

    The loss that a width causes is forecast as ``½ E[(1/T) Σ_t ‖∂L/∂x_t‖² · mse_t(b)]``, gradients and errors
    paired token by token. RateQuant multiplies their means instead (``weighting="product"``), which overrates
    heads whose sensitive tokens have small vectors: attention sinks, above all in the values.

    Args:
        sensitivities: from :func:`~veloxquant_mlx.allocators.ratequant.calibrate_layer_sensitivities`.
        quantizer: makes the quantizer of a code width: the one that the cache will use.
        widths: code widths to measure, 0..8; 0 only where ``quantizer`` has a code of no bits.
        sinks: first tokens that the cache will keep in fp16, on layers of full attention.
        weighting: ``token`` or ``product``.

    Returns:
        Measured tables with their real costs, and an exponential fit of each for reading.

    Raises:
        ValueError: widths that are not distinct integers in 0..8, sinks that leave no token, an unknown
            weighting, or whatever ``quantizer`` raises for a width.
    """
    ordered = tuple(sorted(widths))
    if len(set(ordered)) < len(ordered) or not all(isinstance(b, int) and 0 <= b <= 8 for b in ordered):
        raise ValueError(f"widths must be distinct integers in 0..8, got {tuple(widths)}")
    if not 0 <= sinks < sensitivities.provenance.seq_len:
        raise ValueError(f"sinks={sinks} must lie in 0..{sensitivities.provenance.seq_len - 1}")
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting={weighting!r} must be one of {', '.join(get_args(Weighting))}")
    quantizers = [quantizer(bits) for bits in ordered]
    head_dims = sorted({entry.head_dim for entry in sensitivities.heads})
    return DistortionCurves(
        curves=tuple(
            curve
            for entry in sensitivities.heads
            for curve in _head_curves(entry, quantizers, ordered, sinks, weighting)
        ),
        widths=ordered,
        costs={dim: tuple(q.bits_per_value(dim) for q in quantizers) for dim in head_dims},
        quantizer=quantizers[-1].name,
        sinks=sinks,
        weighting=weighting,
        provenance=sensitivities.provenance,
    )
