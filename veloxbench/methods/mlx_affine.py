"""mlx-lm's own quantized cache: affine codes with a scale and a bias per group of channels."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mlx_lm.models.cache import QuantizedKVCache

from veloxbench.methods.registry import BuildContext, Geometry, plain_caches, register
from veloxbench.records.provenance import versions


def _formula(cache: QuantizedKVCache, tokens: int, geometry: Geometry) -> Fraction:
    # fp16 scale and bias per group, codes packed without loss in uint32 words
    bits = cache.bits + Fraction(2 * 16, cache.group_size)
    return bits * tokens * geometry.n_values / 8


@register(
    "mlx-affine",
    summary="mlx-lm's QuantizedKVCache: affine, fp16 scale and bias per group (group_size=64 or 32)",
    cache_classes=(QuantizedKVCache,),
    targets=(8, 6, 4, 3, 2),
    target_means="code_bits",
    formula=_formula,
    implementation=lambda: f"mlx-lm {versions()['mlx-lm']}",
    foreign="mlx-lm",
)
def mlx_affine(context: BuildContext, target: float, *, group_size: int = 64) -> list[Any]:
    """``QuantizedKVCache`` in place of every plain ``KVCache``; rotating caches stay (mlx-lm has no quantized form)."""
    return plain_caches(context.model, lambda layer: QuantizedKVCache(group_size=group_size, bits=int(target)))
