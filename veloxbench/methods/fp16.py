"""The reference arm: the model's own mlx-lm caches, holding fp16."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from veloxbench.methods.registry import BuildContext, Geometry, register
from veloxbench.records.provenance import versions


def _formula(cache: Any, tokens: int, geometry: Geometry) -> Fraction:
    held = min(tokens, cache.max_size) if isinstance(cache, RotatingKVCache) else tokens
    return Fraction(2 * held * geometry.n_values)


@register(
    "fp16",
    summary="mlx-lm's own cache in fp16: what every other arm is compared with",
    cache_classes=(KVCache, RotatingKVCache),
    targets=None,
    target_means=None,
    formula=_formula,
    implementation=lambda: f"mlx-lm {versions()['mlx-lm']}",
)
def fp16(context: BuildContext, target: None) -> list[Any]:
    """``model.make_cache()`` as mlx-lm makes it."""
    return list(make_prompt_cache(context.model))
