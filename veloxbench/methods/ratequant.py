"""RateQuant of the reference implementation: a width per layer from gradients and measured distortion."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import veloxquant_kernels
import veloxquant_mlx
from veloxbench.environment import source_hash
from veloxbench.methods import BuildContext, register
from veloxbench.methods.veloxquant import implementation, storage_formula
from veloxbench.records import content_hash
from veloxquant_mlx.allocators.ratequant import (
    BitAllocation,
    DistortionCurves,
    Sensitivities,
    allocate_bits_ratequant,
    calibrate_layer_sensitivities,
    fit_distortion_curve,
    shuffled,
)
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.quantizers.base import Quantizer
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic

WIDTHS = {"turboquant_mse": range(1, 9), "turboquant_static": range(9)}
QUANTIZERS: dict[str, Callable[[int], Quantizer]] = {
    "turboquant_mse": TurboQuantMSE,
    "turboquant_static": TurboQuantStatic,
}
LEAST_WITH_NORMS = 1.5
"""Below this target a norm per token costs too much of it: codes with static scales take over."""


@register(
    "ratequant",
    summary="a code width per layer by RateQuant (arXiv 2605.06675) over TurboQuant; shuffle=N permutes the widths",
    cache_classes=(PackedKVCache,),
    targets=(4.0, 3.0, 2.0, 1.5, 1.0),
    target_means="bits_per_value",
    formula=storage_formula,
    implementation=implementation,
)
def ratequant(context: BuildContext, target: float, *, unit: str = "layer", shuffle: int = 0) -> list[Any]:
    """Calibrate once per model (kept on disk), allocate, build.

    Args:
        unit: what gets one width: ``layer``, ``layer_kv`` or ``head``.
        shuffle: 0 for RateQuant's allocation; otherwise the seed of a random permutation of its widths, the
            baseline that an allocation has to beat.
    """
    base = "turboquant_mse" if target >= LEAST_WITH_NORMS else "turboquant_static"
    allocation = _allocation(_curves(context, base), target, unit)
    if shuffle:
        allocation = shuffled(allocation, shuffle)
    config = KVCacheConfig(method="ratequant", base=base, bit_allocation=allocation)
    return KVCacheBuilder.build(context.model, config)


def _allocation(curves: DistortionCurves, target: float, unit: str) -> BitAllocation:
    return allocate_bits_ratequant(curves, target, min_bits=min(curves.widths), max_bits=8, unit=unit)


def _curves(context: BuildContext, base: str) -> DistortionCurves:
    """Sensitivities and curves of this model, from disk where this code has made them before."""
    code = source_hash(veloxquant_mlx, veloxquant_kernels)
    place = context.cache_folder / content_hash([context.model_id, context.n_layers, code])[:24]
    place.mkdir(parents=True, exist_ok=True)
    curves_path, sensitivities_path = place / f"curves-{base}.json", place / "sensitivities.safetensors"
    if curves_path.exists():
        return DistortionCurves.load(curves_path)
    if sensitivities_path.exists():
        sensitivities = Sensitivities.load(sensitivities_path)
    else:
        sensitivities = calibrate_layer_sensitivities(context.model, context.tokenizer)
        _save(sensitivities, sensitivities_path)
    curves = fit_distortion_curve(sensitivities, QUANTIZERS[base], widths=tuple(WIDTHS[base]))
    _save(curves, curves_path)
    return curves


def _save(artefact: DistortionCurves | Sensitivities, path: Path) -> None:
    """Whole or not at all: a run may be killed at any moment."""
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    artefact.save(partial)
    partial.replace(path)
