"""turboquant-mlx-full: rotation and codebook for the KV cache."""

from __future__ import annotations

from typing import Any

from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext


@entry(targets=(2, 3, 4, 8))
def uniform(context: BuildContext, target: float, *, group_size: int = 64, fp16_tokens: int = 0) -> list[Any]:
    """Keys and values at one width; ``fp16_tokens`` first tokens stay in fp16 (the docstring recommends 1024)."""
    from turboquant_mlx.layers.polar_kv_cache import make_turboquant_cache

    return list(
        make_turboquant_cache(context.model, int(target), group_size=group_size, min_tokens_before_quant=fp16_tokens)
    )


@entry()
def mixed(
    context: BuildContext, target: None, *, k_bits: int = 8, v_bits: int = 3, group_size: int = 64, fp16_tokens: int = 0
) -> list[Any]:
    """Keys at 8 bits and values at 3, its recommended default."""
    from turboquant_mlx.layers.polar_kv_cache import make_turboquant_cache

    return list(
        make_turboquant_cache(
            context.model,
            k_bits=k_bits,
            v_bits=v_bits,
            group_size=group_size,
            min_tokens_before_quant=fp16_tokens,
        )
    )
