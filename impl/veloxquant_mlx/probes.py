"""Probes in the place of a model's caches: what its layers store is seen, and attention reads it as it came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, create_attention_mask

from veloxquant_mlx.hook import own_caches


class ProbeCache:
    """A cache that holds nothing: it adds a δ to one forward pass and remembers what passed through.

    Args:
        delta: errors ``[B, H, T, D]`` to add to the keys and to the values; absent to only watch.
    """

    def __init__(self, delta: tuple[mx.array, mx.array] | None = None):
        self.delta = delta
        self.offset = 0
        self.seen: tuple[mx.array, mx.array] | None = None
        self._fetched: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values ``[B, H, T, D]`` of the whole sequence, with δ added."""
        self.seen = keys, values
        if self.delta is not None:
            keys = keys + self.delta[0].astype(keys.dtype)
            values = values + self.delta[1].astype(values.dtype)
        self.offset = keys.shape[2]
        self._fetched = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What was fetched last, for layers that read another layer's cache."""
        if self._fetched is None:
            raise ValueError("keys_and_values was called before update_and_fetch")
        return self._fetched

    def make_mask(self, n_tokens: int, **options: Any) -> Any:
        """The causal (and windowed) mask of a first pass over ``n_tokens``."""
        return create_attention_mask(n_tokens, offset=0, **{"return_array": False, "window_size": None, **options})


def attention_part(cache: Any) -> Any:
    """The keys and values among a layer's caches (a hybrid layer has several), or None."""
    parts = cache.caches if isinstance(cache, CacheList) else [cache]
    return next((part for part in parts if type(part) in (KVCache, RotatingKVCache)), None)


def probe_layers(model: Module) -> tuple[int, ...]:
    """Indices of the model's caches that hold keys and values (a state-space layer's does not)."""
    return tuple(i for i, cache in enumerate(own_caches(model)) if attention_part(cache) is not None)


def probed_caches(model: Module, probes: Mapping[int, ProbeCache]) -> list[Any]:
    """The model's own caches with probes in place of the keys and values of some.

    Args:
        model: an mlx-lm model.
        probes: by index of the cache.
    """
    caches = list(own_caches(model))
    for layer, probe in probes.items():
        own = caches[layer]
        parts = own.caches if isinstance(own, CacheList) else [own]
        probed = [probe if part is attention_part(own) else part for part in parts]
        caches[layer] = CacheList(*probed) if isinstance(own, CacheList) else probe  # type: ignore[no-untyped-call]
    return caches
