"""The transform of a layer from what calibration measured: the Fisher matrix, a sample of vectors, the layer below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_mlx.codes.deadzone import DeadZone
from veloxquant_mlx.transforms.coded_matrix import EXACT_BITS, CodedMatrix, code_matrix
from veloxquant_mlx.transforms.klt import Block, CachedShape, LayerKLT, Scope
from veloxquant_mlx.transforms.rope import LayerRopes

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

PREDICTOR_RIDGE: Final = 1e-3
"""Of the mean square of the decoded vector below: keeps its empty directions out of the forecast."""


@dataclass(frozen=True, eq=False)
class FittedLayer:
    """A layer's transform with what the next steps of a calibration need.

    Attributes:
        transform: the tables, rounded to their bits.
        coefficients: ``[T, n]`` fp32 of the calibration vectors, not quantized: what codes are fitted to.
        decoded: ``[T, N]`` fp32, the centred vectors as decoded at the operating step: what the layer above is
            predicted from.
    """

    transform: LayerKLT
    coefficients: Singles
    decoded: Singles


def regularised(fisher: Floats, epsilon: float) -> Floats:
    """F + ε tr(F)/N · I: without it, directions that no gradient of the sample has touched would be free."""
    return np.asarray(fisher + epsilon * np.trace(fisher) / len(fisher) * np.eye(len(fisher)))


def roots(metric: Floats) -> tuple[Floats, Floats]:
    """The symmetric square root of a positive matrix, and its inverse."""
    values, vectors = np.linalg.eigh(metric)
    root = np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _predictor(below: Singles, centred: Singles, bits: int) -> CodedMatrix:
    gram = np.asarray(below.T.astype(np.float64) @ below, dtype=np.float64)
    gram[np.diag_indices(len(gram))] += PREDICTOR_RIDGE * np.trace(gram) / len(gram)
    weights = np.asarray(np.linalg.solve(gram, (below.T @ centred).astype(np.float64)), dtype=np.float64)
    return code_matrix(weights.T, bits, gram)


def _block(start: int, stop: int, fisher: Floats, covariance: Floats, epsilon: float, step: float, bits: int) -> Block:
    metric = regularised(fisher[start:stop, start:stop], epsilon)
    root, inverse = roots(metric)
    covariance = covariance[start:stop, start:stop]
    _, vectors = np.linalg.eigh(root @ covariance @ root)
    vectors = vectors[:, ::-1]
    encoder = code_matrix((root @ vectors).T, bits, covariance)
    decoder = vectors.T @ inverse
    # What rounding the encoder did to the coefficients, the decoder undoes as far as they are coded at all.
    rounded = np.array(encoder.dense(), dtype=np.float64)
    noise = step**2 / 12 * np.eye(len(rounded))
    coefficients = rounded @ covariance @ rounded.T
    decoder = decoder + np.linalg.solve(coefficients + noise, rounded @ covariance - coefficients @ decoder)
    return Block(start, stop, encoder, code_matrix(decoder, bits, metric))


def fit_layer(
    layer: int,
    shape: CachedShape,
    ropes: LayerRopes,
    fisher: Floats,
    vectors: NDArray[np.float16] | Singles,
    *,
    scope: Scope,
    step: float,
    below: tuple[int, Singles] | None = None,
    epsilon: float = 0.1,
    bits: int = EXACT_BITS,
) -> FittedLayer:
    """Fit the transform of one layer.

    Args:
        layer: index of its cache.
        shape: what it caches.
        ropes: what rotates it.
        fisher: ``[N, N]``, E[g gᵀ] of the loss gradient with respect to a token's vector.
        vectors: ``[T, N]`` calibration vectors, unrotated, sinks left out.
        scope: what shares a transform.
        step: the operating step, in √nats: where the layer above sees this one decoded.
        below: for scope ``below``, the index of the layer to predict from and its decoded vectors ``[T, N_below]``;
            absent: the layer is not predicted.
        epsilon: regularisation of the Fisher matrix, as a part of its mean eigenvalue.
        bits: an entry of the matrices; what rounding the encoder loses, the decoder is fitted to.

    Raises:
        ValueError: sizes that do not agree, or numbers that are not finite, naming the layer.
    """
    size = shape.size
    if fisher.shape != (size, size) or vectors.ndim != 2 or vectors.shape[1] != size:
        raise ValueError(f"layer {layer} of {size} values a token: got {fisher.shape} and {vectors.shape}")
    if not (np.isfinite(fisher).all() and np.trace(fisher) > 0):
        raise ValueError(f"layer {layer}: its Fisher matrix must be finite, and not all zero")
    x = vectors.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"layer {layer}: its calibration vectors must be finite")
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x -= mean
    predictor, forecast = None, None
    if scope == "below" and below is not None:
        predictor = _predictor(below[1], x, bits)
        forecast = below[1] @ np.array(predictor.dense()).T
        x -= forecast
    covariance = (x.T @ x).astype(np.float64) / len(x)
    blocks = [
        _block(start, stop, np.asarray(fisher, dtype=np.float64), covariance, epsilon, step, bits)
        for start, stop in shape.parts(scope)
    ]
    y = np.concatenate([x[:, b.start : b.stop] @ np.array(b.encoder.dense()).T for b in blocks], axis=1)
    deviations = np.sqrt(np.square(y).mean(axis=0))
    order = None
    if len(blocks) > 1:
        order = np.argsort(-deviations, kind="stable")
        y, deviations = y[:, order], deviations[order]
    transform = LayerKLT(
        layer=layer,
        shape=shape,
        ropes=ropes,
        mean=mx.array(mean),
        blocks=tuple(blocks),
        order=None if order is None else mx.array(order.astype(np.uint16)),
        below=None if predictor is None or below is None else below[0],
        predictor=predictor,
        deviations=mx.array(deviations.astype(np.float32)),
    )
    lower = None if predictor is None or below is None else mx.array(below[1])[None]
    zone = DeadZone.fit(y, step)
    decoded = np.array(transform.decode(mx.array(zone.values(zone.quantize(y)))[None], lower)[0])
    return FittedLayer(transform, y, decoded)
