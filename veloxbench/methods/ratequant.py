"""RateQuant of the reference implementation: widths from gradients and measured distortion."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import veloxquant_kernels
import veloxquant_mlx
from veloxbench.methods.registry import BuildContext, register
from veloxbench.methods.veloxquant import implementation, kept, storage_formula
from veloxbench.records.provenance import source_hash
from veloxbench.records.record import content_hash
from veloxquant_mlx.allocators.curves import Weighting
from veloxquant_mlx.allocators.ratequant import (
    DistortionCurves,
    Sensitivities,
    allocate_bits_ratequant,
    calibrate_layer_sensitivities,
    fit_distortion_curve,
    refine_distortion_curve,
    shuffled,
)
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.methods import METHODS, make_options


@dataclass(frozen=True)
class Recipe:
    """How a target is met; the defaults are RateQuant at its plainest.

    Attributes:
        base: the method that codes.
        unit: what gets one width: ``layer``, ``layer_kv`` or ``head``.
        sinks: first tokens kept in fp16, paid for.
        min_bits: smallest width.
        weighting: how gradients meet errors.
        refined_at: uniform width at which the heads' real contributions correct the forecast; 0 for none.
        trust: how far the correction is followed: 1 wholly, 0.5 half way.
    """

    base: str = "turboquant_mse"
    unit: str = "layer"
    sinks: int = 0
    min_bits: int = 1
    weighting: Weighting = "coherent"
    refined_at: int = 0
    trust: float = 1.0


_FINE = Recipe(unit="head")
_COARSE = Recipe("turboquant_static", unit="head", sinks=1, refined_at=2)

RECIPES: Mapping[float, Recipe] = {
    4.0: _FINE,
    3.0: replace(_FINE, refined_at=2, trust=0.5),
    2.0: _COARSE,
    1.5: _COARSE,
    1.0: replace(_COARSE, min_bits=0),
}
"""For each target the recipe of least mean KLD on calibration text (profile ``ratequant-recipes``)."""


def _implementation() -> str:
    recipes = content_hash({f"{target:g}": asdict(recipe) for target, recipe in RECIPES.items()})
    return f"{implementation()} recipes {recipes[:8]}"


@register(
    "ratequant",
    summary=getattr(METHODS["ratequant"], "summary", "ratequant"),  # an earlier revision, in a comparison, has none
    cache_classes=(PackedKVCache,),
    targets=tuple(RECIPES),
    target_means="bits_per_value",
    formula=storage_formula,
    implementation=_implementation,
)
def ratequant(
    context: BuildContext,
    target: float,
    *,
    base: str | None = None,
    unit: str | None = None,
    sinks: int | None = None,
    min_bits: int | None = None,
    weighting: Weighting | None = None,
    refined_at: int | None = None,
    trust: float | None = None,
    at_tokens: int = 2048,
    shuffle: int = 0,
) -> list[Any]:
    """Calibrate once per model (kept on disk), allocate, build.

    Args:
        base: as in :class:`Recipe`, and so the next six. Without any of them the target's recipe is taken; with one,
            the others are the plainest.
        unit: likewise.
        sinks: likewise.
        min_bits: likewise.
        weighting: likewise.
        refined_at: likewise.
        trust: likewise.
        at_tokens: sequence length at which the target holds: fp16 sinks and windows weigh more in shorter ones, and
            sliding-window layers hold a larger share of them.
        shuffle: 0 for RateQuant's allocation; otherwise the seed of a random permutation of its widths, the
            baseline that an allocation has to beat.
    """
    given: dict[str, Any] = {
        "base": base,
        "unit": unit,
        "sinks": sinks,
        "min_bits": min_bits,
        "weighting": weighting,
        "refined_at": refined_at,
        "trust": trust,
    }
    given = {name: value for name, value in given.items() if value is not None}
    recipe = Recipe(**given) if given else RECIPES[target]
    curves = _curves(context, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the realised cost is in every record
        allocation = allocate_bits_ratequant(
            curves,
            target,
            recipe.min_bits,
            max(curves.widths),
            unit=recipe.unit,
            window=make_options(recipe.base, {}).default_window,
            at_tokens=at_tokens,
        )
    if shuffle:
        allocation = shuffled(allocation, shuffle)
    config = KVCacheConfig(method="ratequant", base=recipe.base, bit_allocation=allocation, sinks=recipe.sinks)
    return KVCacheBuilder.build(context.model, config)


def _curves(context: BuildContext, recipe: Recipe) -> DistortionCurves:
    """Curves of this model, from disk where this code has made them before."""
    code = source_hash(veloxquant_mlx, veloxquant_kernels)
    place = context.cache_folder / content_hash([context.model_id, context.n_layers, code])[:24]
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"curves-{recipe.base}-{recipe.sinks}-{recipe.weighting}-{recipe.refined_at}-{recipe.trust:g}.json"
    return kept(path, DistortionCurves.load, lambda: _made_curves(context, recipe, place))


def _made_curves(context: BuildContext, recipe: Recipe, place: Path) -> DistortionCurves:
    options = make_options(recipe.base, {})
    if recipe.refined_at:
        forecast = _curves(context, replace(recipe, refined_at=0, trust=1.0))
        return refine_distortion_curve(
            context.model, context.tokenizer, forecast, recipe.refined_at, options.factories(), trust=recipe.trust
        )
    sensitivities = kept(
        place / "sensitivities.safetensors",
        Sensitivities.load,
        lambda: calibrate_layer_sensitivities(context.model, context.tokenizer),
    )
    return fit_distortion_curve(
        sensitivities,
        options.factories(),
        widths=tuple(options.widths),
        sinks=recipe.sinks,
        weighting=recipe.weighting,
    )
