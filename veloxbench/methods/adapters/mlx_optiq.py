"""mlx-optiq's KV part: mlx-lm's quantized cache as its server builds it, at one width."""

from __future__ import annotations

from typing import Any

from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext


def _converted(context: BuildContext, bits: list[int], group_size: int) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache
    from optiq.runtime.kv.rotating import empty_quantized_like

    own = make_prompt_cache(context.model)
    return [empty_quantized_like(cache, width, group_size) for cache, width in zip(own, bits, strict=True)]


@entry(targets=(8, 4, 3, 2))
def uniform(context: BuildContext, target: float, *, group_size: int = 64) -> list[Any]:
    """Every layer at one width, as ``optiq serve --kv-bits``."""
    return _converted(context, [int(target)] * len(context.model.layers), group_size)
