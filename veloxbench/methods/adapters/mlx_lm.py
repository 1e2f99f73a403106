"""mlx-lm's own quantized cache: from the first token, and as its generation starts it."""

from __future__ import annotations

from typing import Any

from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext, plain_caches

START = 5000
"""Tokens after which ``mlx_lm.generate`` quantizes, unless told otherwise (``quantized_kv_start``)."""


class _LateCache:
    """An fp16 cache that becomes mlx-lm's quantized one once it holds ``start`` tokens, as its generation does it."""

    def __init__(self, inner: Any, bits: int, group_size: int, start: int) -> None:
        self.inner, self.start = inner, start
        self.conversion = {"bits": bits, "group_size": group_size}

    def update_and_fetch(self, keys: Any, values: Any) -> Any:
        if hasattr(self.inner, "to_quantized") and self.inner.offset >= self.start:
            self.inner = self.inner.to_quantized(**self.conversion)
        return self.inner.update_and_fetch(keys, values)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


@entry(targets=(8, 6, 5, 4, 3, 2))
def strict(context: BuildContext, target: float, *, group_size: int = 64) -> list[Any]:
    """``QuantizedKVCache`` from the first token."""
    from mlx_lm.models.cache import QuantizedKVCache

    return plain_caches(context.model, lambda layer: QuantizedKVCache(group_size=group_size, bits=int(target)))


@entry(targets=(8, 6, 5, 4, 3, 2))
def generate(context: BuildContext, target: float, *, group_size: int = 64, start: int = START) -> list[Any]:
    """``--kv-bits`` as ``mlx_lm.generate`` has it: fp16 until token 5000, quantized from then on."""
    from mlx_lm.models.cache import make_prompt_cache

    own = make_prompt_cache(context.model)
    return plain_caches(context.model, lambda layer: _LateCache(own[layer], int(target), group_size, start))
