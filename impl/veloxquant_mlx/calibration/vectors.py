"""What a model caches on a text: the vectors whose covariance and codes are fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxquant_mlx.calibration.gradients import SINKS
from veloxquant_mlx.probes import ProbeCache, probed_caches
from veloxquant_mlx.transforms.klt import cached_vectors
from veloxquant_mlx.transforms.rope import LayerRopes


def captured_vectors(
    model: Module,
    sequences: NDArray[np.int32],
    layers: Sequence[int],
    ropes: dict[int, LayerRopes],
    *,
    on_sequence: Callable[[], None] | None = None,
) -> dict[int, NDArray[np.float32]]:
    """The vectors that layers cache, rotation undone, without the first tokens of each sequence (sinks).

    Args:
        model: an mlx-lm model.
        sequences: ``[S, T]`` token ids, one forward pass each.
        layers: caches to watch; memory is ``S · T · N`` fp32 values of each.
        ropes: of each of them.
        on_sequence: called after each.

    Returns:
        By layer, ``[S · (T − sinks), N]`` fp32.

    Raises:
        ValueError: vectors that are not finite, naming the layer.
    """
    kept: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in layers}
    for ids in sequences:
        probes = {layer: ProbeCache() for layer in layers}
        caches: list[Any] = probed_caches(model, probes)
        model(mx.array(ids[None]), cache=caches)  # the logits are never evaluated
        for layer, probe in probes.items():
            if probe.seen is None:
                raise ValueError(f"layer {layer} of the model never called update_and_fetch")
            x = np.array(cached_vectors(*probe.seen, ropes[layer])[0, SINKS:])
            if not np.isfinite(x).all():
                raise ValueError(f"layer {layer} caches vectors that are not finite on the calibration text")
            kept[layer].append(x)
        if on_sequence is not None:
            on_sequence()
    return {layer: np.concatenate(parts) for layer, parts in kept.items()}
