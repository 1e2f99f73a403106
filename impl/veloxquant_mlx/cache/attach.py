"""One line after which mlx-lm builds this project's caches: ``attach(model, KVCacheConfig(...))``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.hook import CacheHook


class Calibrated(Protocol):
    """A calibration that makes the caches of its model, as ``FisherCode`` is."""

    def builder(self, model: Any) -> Callable[[], list[Any]]:
        """What makes one list of caches at every call.

        Raises:
            ValueError: another model.
        """


def attach(model: Any, config: KVCacheConfig | Calibrated) -> CacheHook:
    """Let everything of mlx-lm that makes caches for ``model`` make those of ``config``.

    ``make_prompt_cache``, ``generate``, ``batch_generate``, the server and chat all do; a draft model is attached to by
    a call of its own. Attaching once more replaces the configuration. mlx-lm's ``max_kv_size`` has no effect on a model
    that makes its own caches, and ``kv_bits`` none on these.

    Args:
        model: as ``mlx_lm.load`` returns it.
        config: what :meth:`KVCacheBuilder.build` takes, or a calibration (``FisherCode.load(path)``). A first list of
            caches is built and dropped, so that what does not fit the model is said here.

    Returns:
        The hook. ``with attach(model, config):`` removes it at the end of the block; ``detach(model)`` removes all.

    Raises:
        ValueError: as :meth:`KVCacheBuilder.build`; the model stays as it was.
    """
    build: Callable[[], list[Any]]
    build = partial(KVCacheBuilder.build, model, config) if isinstance(config, KVCacheConfig) else config.builder(model)
    build()
    return CacheHook(model, build)
