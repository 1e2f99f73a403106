"""Reference implementation of KV-cache quantization on MLX: quantizers, caches, allocators, observers.

``attach(model, KVCacheConfig(...))`` is the way in for users, ``cache.base`` what it builds on, ``methods`` the one
list of methods. Imports run down only: cache, then allocators and observers, then quantizers, then transforms, and
``veloxquant_kernels`` below all; a test holds it.
"""

import importlib
from typing import TYPE_CHECKING

import veloxquant_kernels  # noqa: F401  (loads a real BLAS before MLX on Linux)

if TYPE_CHECKING:
    from veloxquant_mlx.cache.attach import attach
    from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
    from veloxquant_mlx.hook import detach

__all__ = ["KVCacheBuilder", "KVCacheConfig", "attach", "detach"]

_PLACES = {"attach": "cache.attach", "detach": "hook", "KVCacheBuilder": "cache.base", "KVCacheConfig": "cache.base"}


def __getattr__(name: str) -> object:
    """The public names, from their modules when they are first asked for: mlx-lm takes seconds to import."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
