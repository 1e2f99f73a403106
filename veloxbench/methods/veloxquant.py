"""The reference implementation's methods at uniform code widths.

``sinks=N`` keeps the first N tokens in fp16, ``value_bits=N`` gives all values a width of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import veloxquant_kernels
import veloxquant_mlx
from veloxbench.errors import EngagementError
from veloxbench.methods.registry import BuildContext, Geometry, register
from veloxbench.records.provenance import source_hash
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.quantizers.mixed import MixedQuantizer


def implementation() -> str:
    """Hash of the reference implementation's and the kernels' source."""
    return f"veloxquant_mlx {source_hash(veloxquant_mlx, veloxquant_kernels)[:16]}"


def storage_formula(cache: PackedKVCache, tokens: int, geometry: Geometry) -> Fraction:
    """Bytes of one layer after ``tokens`` tokens, from its quantizers' costs, sinks and window.

    Where the data decide (a width per block, flagged tokens), from the costs and counts of what was decided.

    Raises:
        EngagementError: the data decide, and the cache holds another number of tokens.
    """
    spec = cache.spec
    if spec.outlier_keys is not None or any(isinstance(side, MixedQuantizer) for side in (spec.keys, spec.values)):
        wanted = min(tokens, cache.max_size or tokens)
        if cache.tokens_held() != (wanted, wanted):  # its own formula counts what is there
            raise EngagementError(
                f"layer {spec.layer} holds {cache.tokens_held()} tokens of keys and values after {tokens}, not {wanted}"
            )
        return cache.formula_nbytes()
    shape = {"n_kv_heads": geometry.n_kv_heads, "key_dim": geometry.head_dim, "value_dim": geometry.value_dim}
    return Fraction(spec.expected_nbytes(tokens, **shape))


Factory = Callable[..., list[Any]]


def _ours(name: str, summary: str, targets: Iterable[float]) -> Callable[[Factory], Factory]:
    """Register a factory of packed caches; its targets are code widths."""
    return register(
        name,
        summary=summary,
        cache_classes=(PackedKVCache,),
        targets=tuple(targets),
        target_means="code_bits",
        formula=storage_formula,
        implementation=implementation,
    )


def _register(name: str, summary: str, options: Mapping[float, Mapping[str, Any]]) -> None:
    """Register a method by its options at each target."""

    @_ours(name, summary, options)
    def factory(context: BuildContext, target: float, *, sinks: int = 0, value_bits: int | None = None) -> list[Any]:
        config = KVCacheConfig(method=name, sinks=sinks, value_bits=value_bits, **options[target])
        return KVCacheBuilder.build(context.model, config)


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


@_ours("affine", "fp16 scale and zero point per group of channels (group_size=32), at every width", range(8, 0, -1))
def affine(
    context: BuildContext, target: float, *, sinks: int = 0, value_bits: int | None = None, group_size: int = 32
) -> list[Any]:
    """Affine codes at any width and head_dim.

    Args:
        sinks: first tokens in fp16.
        value_bits: code width of the values.
        group_size: channels per group.
    """
    config = KVCacheConfig(
        method="affine", code_bits=int(target), group_size=group_size, sinks=sinks, value_bits=value_bits
    )
    return KVCacheBuilder.build(context.model, config)


@_ours(
    "turboquant_prod_adaptive",
    "TurboQuant Prod, every block of 32 tokens at the least width whose cosine is enough; the target is the largest",
    range(8, 1, -1),
)
def turboquant_prod_adaptive(
    context: BuildContext,
    target: float,
    *,
    sinks: int = 0,
    value_bits: int | None = None,
    base_bits: int = 2,
    distortion_threshold: float = 0.05,
) -> list[Any]:
    """Widths from ``base_bits`` to the target.

    Args:
        sinks: first tokens in fp16.
        value_bits: code width of the values, which then do not choose.
        base_bits: width that every block has at least.
        distortion_threshold: 1 minus the cosine similarity that is enough.
    """
    config = KVCacheConfig(
        method="turboquant_prod_adaptive",
        base_bits=base_bits,
        max_bits=int(target),
        distortion_threshold=distortion_threshold,
        sinks=sinks,
        value_bits=value_bits,
    )
    return KVCacheBuilder.build(context.model, config)
