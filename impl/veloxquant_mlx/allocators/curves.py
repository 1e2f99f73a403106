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
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from veloxquant_mlx.allocators.sensitivity import HeadSensitivities, Provenance, Sensitivities

Floats = NDArray[np.float64]


class Quantizer(Protocol):
    """What a curve is measured with: the package's quantizers, or anything shaped like them."""

    def encode(self, x: mx.array) -> Any:
        """Codes of ``[B, H, T, D]``."""

    def decode(self, codes: Any) -> mx.array:
        """``[B, H, T, D]`` of the codes."""

    def bits_per_value(self, head_dim: int) -> Fraction:
        """Real cost of one value, everything counted."""


QuantizerFactory = Callable[[int], Quantizer]
"""Code width -> quantizer; the quantizer classes themselves serve."""


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
    """One head's keys or values: what an error costs and how much error each width leaves.

    Attributes:
        layer: index of the layer's cache.
        kind: ``keys`` or ``values``.
        head: index of the KV head.
        head_dim: length of its vectors.
        weight: gradient sensitivity w.
        variance: mean square per coordinate around the head's mean vector, D(0) of a code that stores nothing
            but that mean.
        distortions: measured mean square error per coordinate at each of the set's widths.
        fit: exponential through the widths above zero.
    """

    layer: int
    kind: str
    head: int
    head_dim: int
    weight: float
    variance: float
    distortions: tuple[float, ...]
    fit: ExponentialFit

    def __post_init__(self) -> None:
        name = f"layer_{self.layer}.{self.kind}.head_{self.head}"
        if not (np.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight of {name} must be finite and not negative, got {self.weight}")
        if not all(np.isfinite(d) and d >= 0 for d in self.distortions):
            raise ValueError(f"distortions of {name} must be finite and not negative, got {self.distortions}")


@dataclass(frozen=True)
class DistortionCurves:
    """Curves of every head of a model for one quantizer.

    Attributes:
        curves: in the model's order: layer, then keys before values, then head.
        widths: code widths measured, ascending.
        costs: for every head_dim, the quantizer's real bits_per_value at each width.
        quantizer: its name.
        provenance: of the sensitivities.
    """

    curves: tuple[DistortionCurve, ...]
    widths: tuple[int, ...]
    costs: dict[int, tuple[Fraction, ...]]
    quantizer: str
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
        return cls(
            curves=tuple(
                DistortionCurve(
                    **{
                        **curve,
                        "distortions": tuple(curve["distortions"]),
                        "fit": ExponentialFit(**curve["fit"]),
                    }
                )
                for curve in fields["curves"]
            ),
            widths=tuple(fields["widths"]),
            costs={int(dim): tuple(map(Fraction, row)) for dim, row in fields["costs"].items()},
            quantizer=fields["quantizer"],
            provenance=Provenance(**fields["provenance"]),
        )


def measured_distortion(quantizer: Quantizer, vectors: mx.array) -> Floats:
    """Mean square error per coordinate that encoding and decoding leaves on each head.

    Args:
        quantizer: what to measure.
        vectors: ``[B, H, T, D]``.

    Returns:
        ``[H]``.
    """
    x = vectors.astype(mx.float32)
    error = quantizer.decode(quantizer.encode(vectors)).astype(mx.float32) - x
    return np.array(mx.mean(error * error, axis=(0, 2, 3)), dtype=np.float64)


def _variance(vectors: mx.array) -> Floats:
    return np.array(mx.mean(mx.var(vectors.astype(mx.float32), axis=(0, 2)), axis=-1), dtype=np.float64)


def _head_curves(
    entry: HeadSensitivities, quantizers: Sequence[Quantizer], widths: Sequence[int]
) -> list[DistortionCurve]:
    variance = _variance(entry.vectors)
    weight = entry.weights.mean(axis=0)
    table = np.stack([measured_distortion(quantizer, entry.vectors) for quantizer in quantizers], axis=1)
    return [
        DistortionCurve(
            layer=entry.layer,
            kind=entry.kind,
            head=head,
            head_dim=entry.head_dim,
            weight=float(weight[head]),
            variance=float(variance[head]),
            distortions=tuple(table[head].tolist()),
            fit=exponential_fit(widths, table[head]),
        )
        for head in range(entry.n_kv_heads)
    ]


def fit_distortion_curve(
    sensitivities: Sensitivities,
    quantizer: QuantizerFactory | None = None,
    *,
    widths: Sequence[int] = tuple(range(1, 9)),
) -> DistortionCurves:
    """Measure D(b) of a quantizer on the model's own keys and values, head by head.

    Args:
        sensitivities: from :func:`~veloxquant_mlx.allocators.ratequant.calibrate_layer_sensitivities`.
        quantizer: makes the quantizer of a code width, the one that the cache will use; by default TurboQuant
            MSE.
        widths: code widths to measure, 0..8; 0 only where ``quantizer`` has a code of no bits.

    Returns:
        Measured tables with their real costs, and an exponential fit of each for reading.

    Raises:
        ValueError: widths that are not distinct integers in 0..8, or whatever ``quantizer`` raises for one.
    """
    ordered = tuple(sorted(widths))
    if len(set(ordered)) < len(ordered) or not all(isinstance(b, int) and 0 <= b <= 8 for b in ordered):
        raise ValueError(f"widths must be distinct integers in 0..8, got {tuple(widths)}")
    if quantizer is None:
        from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

        quantizer = TurboQuantMSE
    quantizers = [quantizer(bits) for bits in ordered]
    head_dims = sorted({entry.head_dim for entry in sensitivities.heads})
    return DistortionCurves(
        curves=tuple(curve for entry in sensitivities.heads for curve in _head_curves(entry, quantizers, ordered)),
        widths=ordered,
        costs={dim: tuple(q.bits_per_value(dim) for q in quantizers) for dim in head_dims},
        quantizer=type(quantizers[-1]).__name__,
        provenance=sensitivities.provenance,
    )
