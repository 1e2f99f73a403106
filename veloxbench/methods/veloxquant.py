"""The reference implementation's methods, each at its uniform code widths."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import veloxquant_kernels
import veloxquant_mlx
from veloxbench.environment import source_hash
from veloxbench.methods import BuildContext, Geometry, register
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache


def _implementation() -> str:
    return f"veloxquant_mlx {source_hash(veloxquant_mlx, veloxquant_kernels)[:16]}"


def _register_uniform(name: str, summary: str, targets: tuple[float, ...]) -> None:
    """Register ``KVCacheConfig(method=name, code_bits=target)``, without sinks or window."""

    def formula(target: float, geometry: Geometry) -> Fraction:
        config = KVCacheConfig(method=name, code_bits=int(target))
        keys = config.quantizer("keys", int(target)).bits_per_value(geometry.head_dim)
        values = config.quantizer("values", int(target)).bits_per_value(geometry.value_dim)
        both = geometry.head_dim + geometry.value_dim
        return (keys * geometry.head_dim + values * geometry.value_dim) / both

    @register(
        name,
        summary=summary,
        cache_classes=(PackedKVCache,),
        targets=targets,
        target_means="code_bits",
        formula=formula,
        implementation=_implementation,
    )
    def factory(context: BuildContext, target: float) -> list[Any]:
        return KVCacheBuilder.build(context.model, KVCacheConfig(method=name, code_bits=int(target)))


_register_uniform(
    "turboquant_mse",
    "random rotation, Lloyd-Max codes, one fp16 norm per vector (arXiv 2504.19874)",
    tuple(float(bits) for bits in range(8, 0, -1)),
)
