"""The one adapter around every layer's cache under test."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


class CacheUnderTest:
    """Casts keys and values to fp16 before the inner cache and delegates everything else.

    mlx-lm chooses its attention by ``hasattr(cache, "bits")``; delegation through ``__getattr__`` keeps
    that choice the inner cache's own. Indices are passed on because hybrid models keep their other layers'
    states as ``cache[0]``. Every arm is wrapped, the fp16 arm too.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.n_values_per_token = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Store ``[B, H, T, D]`` keys and values as the inner cache does, after a cast to fp16."""
        batch, heads, _, head_dim = keys.shape
        self.n_values_per_token = batch * heads * (head_dim + values.shape[-1])
        return self.inner.update_and_fetch(keys.astype(mx.float16), values.astype(mx.float16))

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # copy and pickle ask before __init__ ran
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __getitem__(self, index: Any) -> Any:
        return self.inner[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.inner[index] = value


class ForeignUnderTest(CacheUnderTest):
    """The adapter around a peer's cache, which passes for an instance of the peer's class.

    Peers choose their attention by ``isinstance``, where mlx-lm asks for attributes.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.inner)


def arrays_of(cache: Any) -> list[mx.array]:
    """The arrays in a cache's declared state (to evaluate it)."""
    leaves: Any = tree_flatten(cache.state)
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
