"""The hook by which a model makes its caches: mlx-lm asks ``model.make_cache()``, and a :class:`CacheHook` answers.

``make_prompt_cache`` stands behind ``generate``, ``batch_generate``, the server, chat and speculative decoding, so that
one hook reaches them all. Users call :func:`veloxquant_mlx.attach` and :func:`detach`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace, TracebackType
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

_ASKING: ContextVar[bool] = ContextVar("a class is asked for its model's own caches", default=False)
_ANSWERING: ContextVar[frozenset[int]] = ContextVar("hooks that are building caches", default=frozenset())


class CacheHook:
    """Stands in place of a model's ``make_cache``; as a context manager it leaves at the end of the block.

    Args:
        model: whose caches are made. The hook and the model refer to each other until :func:`detach`.
        build: makes one list of caches. Where it asks mlx-lm for the model's caches itself, it gets the model's own.
    """

    def __init__(self, model: Any, build: Callable[[], list[Any]]) -> None:
        self.model = model
        self.build = build
        self.before = _instance_hook(model)
        model.make_cache = self

    def __call__(self) -> list[Any]:
        """A new list of caches, one for each layer."""
        answering = _ANSWERING.get()
        if id(self.model) in answering:
            return own_caches(self.model)
        token = _ANSWERING.set(answering | {id(self.model)})
        try:
            return self.build()
        finally:
            _ANSWERING.reset(token)

    def remove(self) -> None:
        """Put back what stood here before, with every hook that was set after this one; a second call does nothing."""
        hook = _instance_hook(self.model)
        while isinstance(hook, CacheHook) and hook is not self:
            hook = hook.before
        if hook is not self:
            return
        if self.before is None:
            del self.model.make_cache
        else:
            self.model.make_cache = self.before

    def __enter__(self) -> CacheHook:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def _instance_hook(model: Any) -> Any:
    """What was set as ``make_cache`` on this model, beside what its class defines."""
    return getattr(model, "__dict__", {}).get("make_cache")


def detach(model: Any) -> None:
    """Let the model make the caches that it made before the first hook; a model without one stays as it is.

    Caches that were made already go on as they are.
    """
    while isinstance(hook := _instance_hook(model), CacheHook):
        hook.remove()


def own_caches(model: Any) -> list[Any]:
    """The caches that the model's class makes (or mlx-lm for it), whatever was set on the model itself.

    Raises:
        ValueError: the class itself was given a ``make_cache`` that builds these caches.
    """
    if _ASKING.get():
        raise ValueError(
            f"make_cache of {type(model).__name__} builds these caches and hides the model's own; give it to the object"
        )
    token = _ASKING.set(True)
    try:
        made_by_class = getattr(type(model), "make_cache", None)
        if made_by_class is not None and _instance_hook(model) is not None:
            return list(made_by_class(model))
        return list(make_prompt_cache(model if _instance_hook(model) is None else SimpleNamespace(layers=model.layers)))
    finally:
        _ASKING.reset(token)
