"""What each head's errors really cost in a cache that is already coarse, and curves that agree with it.

Curves forecast a loss to second order around the fp16 cache. At two bits the caches no longer are near it: errors of
many layers meet, and the curvature that each head sees is another. The remedy measures at the place itself. Let
every head's error be scaled by s, 1 in the cache as it is. Where the divergence grows like s², half its derivative at
s = 1 is what the head contributes, and the contributions add up to the divergence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray
from rich.progress import track

from veloxquant_mlx.allocators.curves import (
    DistortionCurve,
    DistortionCurves,
    QuantizerFactories,
    by_kind,
    coding_errors,
)
from veloxquant_mlx.allocators.sensitivity import bundled_texts, calibration_sequences
from veloxquant_mlx.probes import ProbeCache, probe_layers, probed_caches
from veloxquant_mlx.quantizers.base import Quantizer, pair_name
from veloxquant_mlx.quantizers.per_head import PerHead
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

Floats = NDArray[np.float64]

LEAST_CORRECTION = 0.1
"""A head whose contribution is measured as nothing, or below, keeps this share of its forecast: it is noise."""

SEQUENCES_AT_ONCE = 4


class ErrorCache(ProbeCache):
    """Hands back keys and values with a quantizer's errors in them, each head's times a scale.

    Errors are constants to the gradient: only the scales are variables. (A real change of a scale also moves the codes
    of later layers; on average over tokens that is noise.)

    Args:
        keys: quantizer of the keys.
        values: quantizer of the values.
        sinks: first tokens without error.
        scales: ``[2, H]``, of keys and values.
    """

    def __init__(self, keys: Quantizer, values: Quantizer, sinks: int, scales: mx.array):
        super().__init__()
        self.quantizers, self.sinks, self.scales = (keys, values), sinks, scales

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values ``[B, H, T, D]`` of the whole sequence."""
        moved = [
            x + scale[:, None, None] * self._errors(quantizer, x)
            for x, quantizer, scale in zip((keys, values), self.quantizers, self.scales, strict=True)
        ]
        self.offset = keys.shape[2]
        self._fetched = moved[0], moved[1]
        return self._fetched

    def _errors(self, quantizer: Quantizer, x: mx.array) -> mx.array:
        stored = mx.stop_gradient(x)[:, :, self.sinks :].astype(mx.float16)
        errors = mx.pad(coding_errors(quantizer, stored), [(0, 0), (0, 0), (self.sinks, 0), (0, 0)])
        return mx.stop_gradient(errors).astype(x.dtype)


def divergence_from_errors(
    model: Module, tokens: mx.array, reference: mx.array, caches: Mapping[int, ErrorCache]
) -> mx.array:
    """Summed KL divergence of the model with errors in its cache from the model without.

    Args:
        model: an mlx-lm model.
        tokens: ``[B, T]`` ids.
        reference: ``[B, T, V]`` log-probabilities without errors.
        caches: by index of the layer's cache.

    Returns:
        A scalar, in nats.
    """
    logits = model(tokens, cache=probed_caches(model, caches)).astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.sum(mx.exp(reference) * (reference - log_probs))


def head_contributions(
    model: Module,
    sequences: NDArray[np.int32],
    curves: DistortionCurves,
    widths: Mapping[tuple[int, str], tuple[int, ...]],
    quantizer: QuantizerFactories,
    *,
    quiet: bool = False,
) -> tuple[dict[tuple[int, str], Floats], float]:
    """What each head's errors contribute to the divergence of a cache from fp16.

    Args:
        model: an mlx-lm model.
        sequences: ``[S, T]`` token ids.
        curves: name the heads and their sinks.
        widths: code widths of each layer's keys' and values' heads, by ``(layer, kind)``.
        quantizer: makes the quantizer of a width, one for keys and values or one of each.
        quiet: no progress bar.

    Returns:
        Nats per token of each head, ``[H]`` by ``(layer, kind)``, and the divergence itself. They add up to it as far
        as it grows with the square of the errors.
    """
    layers = list(probe_layers(model))
    sinks = {curve.layer: curve.sinks for curve in curves.curves}
    factories = by_kind(quantizer)
    coders = {key: PerHead(tuple(factories[key[1]](bits) for bits in row)) for key, row in widths.items()}
    totals = [np.zeros((2, len(widths[layer, "keys"]))) for layer in layers]
    divergence = 0.0
    for start in track(range(0, len(sequences), SEQUENCES_AT_ONCE), "measuring", disable=quiet):
        tokens = mx.array(sequences[start : start + SEQUENCES_AT_ONCE])
        logits = model(tokens).astype(mx.float32)
        reference = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(reference)

        def of(scales: list[mx.array], tokens: mx.array = tokens, reference: mx.array = reference) -> mx.array:
            caches = {
                layer: ErrorCache(coders[layer, "keys"], coders[layer, "values"], sinks[layer], scale)
                for layer, scale in zip(layers, scales, strict=True)
            }
            return divergence_from_errors(model, tokens, reference, caches)

        value, slopes = mx.value_and_grad(of)([mx.ones(total.shape) for total in totals])
        mx.eval(value, slopes)
        divergence += float(value)
        for total, slope in zip(totals, slopes, strict=True):
            total += 0.5 * np.array(slope, dtype=np.float64)
    contributions = {
        (layer, kind): total[side] / sequences.size
        for layer, total in zip(layers, totals, strict=True)
        for side, kind in enumerate(("keys", "values"))
    }
    return contributions, divergence / sequences.size


def refine_distortion_curve(
    model: Module,
    tokenizer: Any,
    curves: DistortionCurves,
    widths: int | Mapping[str, int],
    quantizer: QuantizerFactories = TurboQuantMSE,
    *,
    trust: float = 1.0,
    num_samples: int = 16,
    texts: Iterable[str] | None = None,
    quiet: bool = False,
) -> DistortionCurves:
    """Curves whose losses agree with what each head costs in a real cache near the target.

    Every head's losses are multiplied by what it contributes to the divergence of that cache over what its curve had
    forecast there, to the power of ``trust``; how loss falls with width stays as measured by
    :func:`fit_distortion_curve`. Contributions are noisier than forecasts, and truer the coarser the cache: 1 serves at
    2 bits and below, 0.5 (the geometric mean of both) at 3.

    Args:
        model: the model that was calibrated.
        tokenizer: its tokenizer.
        curves: from :func:`fit_distortion_curve`.
        widths: where to measure: one width everywhere, or an allocation.
        quantizer: the one that the curves were measured with.
        trust: how far to follow the contributions, from 0 (not at all) to 1.
        num_samples: sequences, as long as those of the calibration.
        texts: as in :func:`~veloxquant_mlx.allocators.ratequant.calibrate_layer_sensitivities`.
        quiet: no progress bar.

    Returns:
        The same curves with other losses.

    Raises:
        ValueError: another quantizer than the curves', a width that was not measured, a head without one, trust out
            of bounds, or texts too short.
    """
    if not 0 <= trust <= 1:
        raise ValueError(f"trust={trust} must lie in 0..1")
    name = pair_name(*(make(curves.widths[-1]) for make in by_kind(quantizer).values()))
    if name != curves.quantizer:
        raise ValueError(f"quantizer is {name!r}, but the curves were measured with {curves.quantizer!r}")
    sequences = calibration_sequences(
        tokenizer,
        bundled_texts() if texts is None else texts,
        num_samples=num_samples,
        seq_len=curves.provenance.seq_len,
    )
    columns = [curves.widths.index(_width_of(curve, widths, curves.widths)) for curve in curves.curves]
    rows: dict[tuple[int, str], tuple[int, ...]] = {}
    for curve, column in zip(curves.curves, columns, strict=True):
        key = curve.layer, curve.kind
        rows[key] = (*rows.get(key, ()), curves.widths[column])
    contributions, _ = head_contributions(model, sequences, curves, rows, quantizer, quiet=quiet)
    return replace(
        curves,
        curves=tuple(
            _corrected(curve, contributions[curve.layer, curve.kind][curve.head] / curve.losses[column], trust)
            if curve.losses[column] > 0
            else curve
            for curve, column in zip(curves.curves, columns, strict=True)
        ),
    )


def _corrected(curve: DistortionCurve, ratio: float, trust: float) -> DistortionCurve:
    factor = max(ratio, LEAST_CORRECTION) ** trust
    return replace(curve, losses=tuple(factor * loss for loss in curve.losses))


def _width_of(curve: DistortionCurve, widths: int | Mapping[str, int], known: tuple[int, ...]) -> int:
    layer = f"layer_{curve.layer}"
    names = (f"{layer}.{curve.kind}.head_{curve.head}", f"{layer}.{curve.kind}", layer)
    width = widths if isinstance(widths, int) else next((widths[name] for name in names if name in widths), None)
    if width is None:
        raise ValueError(f"widths names none of {', '.join(names)}")
    if width not in known:
        raise ValueError(f"width {width} of {names[0]} was not measured; the curves have {known}")
    return width
