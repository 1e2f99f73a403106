"""mlx-turboquant: rotated keys in mlx-lm's quantized cache."""

from __future__ import annotations

from typing import Any

from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext


@entry(targets=(8, 4, 3, 2))
def rotated(context: BuildContext, target: float, *, group_size: int = 64, qjl: bool = False) -> list[Any]:
    """``make_prompt_cache`` at a width; ``qjl=true`` adds its one-bit sketch of what is left of the keys."""
    import mlx_turboquant

    return list(mlx_turboquant.make_prompt_cache(context.model, int(target), group_size, qjl=qjl))
