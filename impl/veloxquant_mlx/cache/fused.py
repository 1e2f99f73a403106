"""Decode steps that attend to the packed arrays directly, through mlx-lm's own attention call.

mlx-lm sends every cache that has ``bits`` to ``models.base.quantized_scaled_dot_product_attention``, with whatever the
cache returned from ``update_and_fetch``. A :class:`FusedKVCache` returns a handle, and one replacement of that function
(:func:`install_route`, undone by :func:`remove_route`) answers handles and forwards everything else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import mlx.core as mx
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models.cache import CacheList

from veloxquant_kernels.codebook import centroids_array
from veloxquant_kernels.fused_attention import PackedSide, fused_attention, unsupported
from veloxquant_kernels.kernel import Backend, resolve_backend, why_no_metal
from veloxquant_mlx.cache.packed import PackedKVCache
from veloxquant_mlx.cache.sequence import fetch_dtype
from veloxquant_mlx.cache.sides import SidesStore
from veloxquant_mlx.cache.spec import LayerSpec
from veloxquant_mlx.cache.storage import CodedBlocks, Side
from veloxquant_mlx.hook import own_caches
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import rotation

FusedMode = Literal["auto", "on", "off"]

_FUNCTION: Final = "quantized_scaled_dot_product_attention"
_original: Callable[..., mx.array] | None = None


def _route(queries: mx.array, q_keys: Any, q_values: Any, *, scale: float, mask: Any, **rest: Any) -> mx.array:
    if isinstance(q_keys, Handle):
        return q_keys.cache.attend(queries, scale, mask)
    assert _original is not None
    return _original(queries, q_keys, q_values, scale=scale, mask=mask, **rest)


def install_route() -> None:
    """Let mlx-lm's quantized attention answer the handles of fused caches; a second call changes nothing."""
    global _original
    if _original is None:
        _original = getattr(mlx_lm_base, _FUNCTION)
        setattr(mlx_lm_base, _FUNCTION, _route)


def remove_route() -> None:
    """Give mlx-lm its own function back; fused caches then fail loudly."""
    global _original
    if _original is not None:
        setattr(mlx_lm_base, _FUNCTION, _original)
        _original = None


@contextlib.contextmanager
def fused_route() -> Iterator[None]:
    """The route for the length of a block, whatever it was before."""
    installed = _original is not None
    install_route()
    try:
        yield
    finally:
        if not installed:
            remove_route()


@dataclass(frozen=True)
class Handle:
    """What a fused cache returns in place of keys and values: a promise that only the route can keep."""

    cache: FusedKVCache


def _packed_side(side: Side) -> PackedSide:
    quantizer, coded = side.quantizer, side.coded
    assert isinstance(quantizer, TurboQuantMSE)
    assert isinstance(coded, CodedBlocks)
    words, norms = coded.arrays
    centroids = centroids_array(quantizer.codebook(coded.head_dim))
    signs = rotation(coded.head_dim, quantizer.seed).signs
    assert signs is not None  # the kernel serves this head_dim
    return PackedSide(words, norms, centroids, signs, quantizer.code_bits, side.sink, side.tail)


class FusedKVCache(PackedKVCache):
    """A :class:`PackedKVCache` whose decode steps run the fused attention kernel.

    Storage, bytes, save and load are the packed cache's. Prefill, and steps that the kernel does not cover, decode
    as the packed cache does; :attr:`steps` counts both, with the reason, and :attr:`attention` says it in words.

    Attributes:
        unserved: why the kernel cannot serve this layer's shapes, where it cannot; known from the first call on.
        backend: of the kernel; None takes Metal where it can run, else the kernel's plain-MLX reference.
    """

    bits: Final = 0
    """mlx-lm looks for this attribute to choose its quantized attention; the value has no meaning."""
    group_size: Final = 0
    """Read by mlx-lm beside :attr:`bits`."""
    backend: Backend | None = None
    unserved: str | None = None

    @classmethod
    def from_packed(cls, cache: PackedKVCache, backend: Backend | None = None) -> FusedKVCache:
        """A fused cache that takes over the storage and observers of ``cache``."""
        made = cls.__new__(cls)
        made.__dict__.update(copy.copy(cache).__dict__)
        made.backend = backend
        return made

    @functools.cached_property
    def steps(self) -> Counter[str]:
        """Attention calls by path: ``"fused"``, or why the plain path was taken."""
        return Counter()

    @property
    def attention(self) -> str:
        """Attention calls by path: ``fused 8, plain 1 (several new tokens)``."""
        paths = [f"fused {self.steps['fused']}"] if "fused" in self.steps else []
        paths += [f"plain {n} ({reason})" for reason, n in sorted(self.steps.items()) if reason != "fused"]
        return ", ".join(paths) or "fused, not used yet"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append ``[B, H, L, D]`` and return handles for the route."""
        self.store(keys, values)
        handle = Handle(self)
        return handle, handle

    def attend(self, queries: mx.array, scale: float, mask: Any) -> mx.array:
        """Attention of ``[B, n_heads, L, D]`` queries over everything stored."""
        reason = self._not_fused(queries, mask)
        if reason is None:
            self.steps["fused"] += 1
            if mask is not None:
                mask = mask.reshape(_four_axes(mask))
            sides = self._sides()
            keys, values = _packed_side(sides.keys), _packed_side(sides.values)
            n_packed = sides.keys.coded.blocks
            return fused_attention(queries, keys, values, n_packed, scale=scale, mask=mask, backend=self.backend)
        self.steps[reason] += 1
        keys_read, values_read = self.fetch(self.size(), fetch_dtype(queries.dtype))
        return mx.fast.scaled_dot_product_attention(queries, keys_read, values_read, scale=scale, mask=mask)

    def _sides(self) -> SidesStore:
        assert isinstance(self.storage, SidesStore)
        return self.storage

    def _not_fused(self, queries: mx.array, mask: Any) -> str | None:
        spec = self.spec
        assert isinstance(spec.keys, TurboQuantMSE)
        assert isinstance(spec.values, TurboQuantMSE)
        group = queries.shape[1] // self.shapes()[0][1]
        self.unserved = unsupported(queries.shape[3], group, spec.keys.code_bits, spec.values.code_bits)
        if self.unserved is not None:
            return self.unserved
        if queries.shape[2] != 1:
            return "several new tokens"
        if not self._sides().keys.coded.blocks:
            return "nothing packed yet"
        if isinstance(mask, str) or (mask is not None and _four_axes(mask)[1:3] != (1, 1)):
            return "a mask per head"
        return None


def _four_axes(mask: mx.array) -> tuple[int, ...]:
    return (1,) * (4 - mask.ndim) + tuple(mask.shape)


def why_not_fused(cache: Any) -> str | None:
    """Why a layer's cache cannot take the fused path, or None if it can."""
    if not isinstance(cache, PackedKVCache):
        return f"held by {type(cache).__name__}"
    if not isinstance(cache.spec, LayerSpec):
        return "no fused kernel for entropy codes"
    if cache.spec.max_size is not None:
        return "a sliding window"
    if cache.spec.outlier_keys is not None:
        return "tokens at another width"
    for quantizer in (cache.spec.keys, cache.spec.values):
        if not isinstance(quantizer, TurboQuantMSE):
            return f"no fused kernel for {quantizer.name}"
    return None


def fuse(
    model: Any, caches: Sequence[Any], *, mode: FusedMode = "auto", backend: Backend | None = None
) -> tuple[list[Any], list[str]]:
    """Let the layers that can be attended to in packed form do so.

    Args:
        model: the mlx-lm model; a probe of three tokens through throwaway caches shows whether its attention
            takes mlx-lm's quantized route (families with attention sinks, or with attention of their own, do not).
        caches: one per layer, as ``KVCacheBuilder.build`` or ``load_prompt_cache`` gives them.
        mode: ``auto`` fuses where Metal can run or a ``backend`` is named, and leaves alone what it cannot
            fuse; ``on`` is an error where nothing can be fused; ``off`` leaves the caches as they are. A kernel that
            fails raises in every mode.
        backend: of the kernel; None is Metal.

    Returns:
        The caches, and for each layer ``"fused"`` or why it is not; packed caches, those in a
        ``CacheList`` too, keep the reason (``not_fused``).

    Raises:
        ValueError: an unknown mode, ``on`` for a model or for caches of which no layer can be fused, or caches that are
            not as many as the model's.
        RuntimeError: ``backend="metal"``, or ``on`` without a backend, where Metal cannot run.
    """
    if mode not in get_args(FusedMode):
        raise ValueError(f"fused must be one of {', '.join(map(repr, get_args(FusedMode)))}, got {mode!r}")
    if mode == "off":
        return _explained(caches, ["switched off"] * len(caches))
    if backend is None and (no_metal := why_no_metal()) is not None:
        if mode == "on":
            raise RuntimeError(
                f"the fused path cannot be switched on: {no_metal}; the backend 'emulator' runs the kernels on the CPU"
            )
        return _explained(caches, [no_metal] * len(caches))
    resolve_backend(backend)
    reasons = [why_not_fused(cache) for cache in caches]
    problem = None
    if None in reasons:
        reasons, problem = _probe(model, caches, reasons)
    if problem is None and None not in reasons:
        problem = "no layer has a fused kernel"
    if problem is not None and mode == "on":
        raise ValueError(f"the fused path cannot be switched on: {problem}{_listed(reasons)}")
    if problem is not None:
        return _explained(caches, [reason or problem for reason in reasons])
    install_route()
    fused = [
        FusedKVCache.from_packed(cache, backend) if reason is None else cache
        for cache, reason in zip(caches, reasons, strict=True)
    ]
    return _explained(fused, [reason or "fused" for reason in reasons])


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """The caches themselves, for a ``CacheList`` those that it holds."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def _explained(caches: Sequence[Any], reasons: list[str]) -> tuple[list[Any], list[str]]:
    for cache, reason in zip(caches, reasons, strict=True):
        for leaf in leaves([cache]):
            if isinstance(leaf, PackedKVCache) and not isinstance(leaf, FusedKVCache):
                leaf.not_fused = reason
    return list(caches), reasons


def _listed(reasons: Sequence[str | None]) -> str:
    given = sorted({reason for reason in reasons if reason is not None})
    return f" ({', '.join(given)})" if given else ""


def _fresh(cache: Any, own: Any) -> Any:
    """An empty cache in the place of ``cache``; ``own``, the model's, where ``cache`` is not one of this package."""
    if isinstance(cache, PackedKVCache):
        spec = cache.spec
        return PackedKVCache(
            replace(spec, outlier_keys=None, outlier_values=None) if isinstance(spec, LayerSpec) else spec
        )
    if isinstance(cache, CacheList) and isinstance(own, CacheList):
        cache_list: Any = CacheList
        return cache_list(*(_fresh(part, made) for part, made in zip(cache.caches, own.caches, strict=True)))
    return own


def _probe(model: Any, caches: Sequence[Any], reasons: Sequence[str | None]) -> tuple[list[str | None], str | None]:
    """A two-token prefill and one step on throwaway caches: do the model's attention calls reach the route?

    Returns the reasons, with those of layers whose shapes the kernel does not serve, and what is wrong with the model.
    The caches are new ones, not copies, which would hold tokens of other sequences and report to observers: ours from
    the layers' specs, all others as the model makes them.
    """
    own = own_caches(model)
    if len(own) != len(caches):
        raise ValueError(f"caches has {len(caches)} entries for a model of {len(own)} layers")
    trial = [_fresh(cache, made) for cache, made in zip(caches, own, strict=True)]
    trial = [
        FusedKVCache.from_packed(cache, "reference") if reason is None else cache
        for cache, reason in zip(trial, reasons, strict=True)
    ]
    try:
        with fused_route():
            for tokens in (mx.array([[0, 0]]), mx.array([[0]])):
                mx.eval(model(tokens, cache=trial))
    except (ValueError, TypeError, AttributeError) as error:
        return [*reasons], f"{type(model).__module__} does not take mlx-lm's quantized route ({error})"
    if any(isinstance(cache, FusedKVCache) and sum(cache.steps.values()) != 2 for cache in trial):
        return [*reasons], f"{type(model).__module__} does not take mlx-lm's quantized route"
    return [
        cache.unserved if isinstance(cache, FusedKVCache) else reason
        for cache, reason in zip(trial, reasons, strict=True)
    ], None
