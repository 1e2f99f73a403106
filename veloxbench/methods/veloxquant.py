"""The reference implementation's methods at uniform code widths; ``sinks=N`` keeps the first N tokens in fp16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import veloxquant_kernels
import veloxquant_mlx
from veloxbench.environment import source_hash
from veloxbench.methods import BuildContext, Geometry, register
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache


def implementation() -> str:
    """Hash of the reference implementation's and the kernels' source."""
    return f"veloxquant_mlx {source_hash(veloxquant_mlx, veloxquant_kernels)[:16]}"


def storage_formula(cache: PackedKVCache, tokens: int, geometry: Geometry) -> Fraction:
    """Bytes of one layer after ``tokens`` tokens, from its quantizers' costs, sinks and window."""
    spec = cache.spec
    shape = {"n_kv_heads": geometry.n_kv_heads, "key_dim": geometry.head_dim, "value_dim": geometry.value_dim}
    return Fraction(spec.expected_nbytes(tokens, **shape))


def _register(name: str, summary: str, options: Mapping[float, Mapping[str, Any]]) -> None:
    """Register a method by its options at each target, a code width."""

    @register(
        name,
        summary=summary,
        cache_classes=(PackedKVCache,),
        targets=tuple(options),
        target_means="code_bits",
        formula=storage_formula,
        implementation=implementation,
    )
    def factory(context: BuildContext, target: float, *, sinks: int = 0) -> list[Any]:
        return KVCacheBuilder.build(context.model, KVCacheConfig(method=name, sinks=sinks, **options[target]))


def _widths(widths: Iterable[int]) -> dict[float, dict[str, int]]:
    return {float(bits): {"code_bits": bits} for bits in widths}


_register(
    "turboquant_mse",
    "random rotation, Lloyd-Max codes, one fp16 norm per vector (arXiv 2504.19874)",
    _widths(range(8, 0, -1)),
)
_register(
    "turboquant_prod",
    "TurboQuant MSE at one bit less and a sign sketch of the residual: unbiased products (arXiv 2504.19874)",
    _widths(range(8, 0, -1)),
)
_register(
    "turboquant_static",
    "TurboQuant codes under a mean and scale per head from the first 64 tokens, no norm per token",
    _widths(range(8, 0, -1)),
)
_register("rvq", "residual vector quantization of 8 coordinates at a time", _widths(range(4, 0, -1)))
_register(
    "kivi",
    "keys per channel, values per token, groups of 32, the last 128 tokens in fp16 (arXiv 2402.02750)",
    _widths((8, 4, 3, 2)),
)
_register("ternary", "three levels, five to a byte, one fp16 norm per vector", {1.6: {}})
