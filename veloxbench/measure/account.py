"""What a layer's cache holds: which class, in which dtypes, how many bits and bytes, every array counted."""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxbench.errors import EngagementError
from veloxbench.methods.cache_under_test import CacheUnderTest
from veloxbench.records.record import LayerEngagement

SMALL_NBYTES = 4096
"""NumPy arrays up to this size may be anything, a plan or a table of a few numbers: nothing that grows with tokens."""


class HeldArray(NamedTuple):
    """One array that a cache holds for its tokens, and how many of its token slots are in use."""

    name: str
    array: mx.array
    used_slots: int
    slots: int

    @property
    def used_bytes(self) -> float:
        """``nbytes`` x used / allocated slots."""
        return self.array.nbytes * self.used_slots / self.slots if self.slots else 0.0


Array = mx.array | NDArray[np.generic]


def reachable(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Array]]:
    """Every array, MLX's or NumPy's, reachable from an object through attributes, containers and dataclasses.

    Args:
        value: where to begin.
        path: its name, with which those of the arrays begin.
        seen: ids of what is not to be reported (any more).
    """
    if isinstance(value, (mx.array, np.ndarray)):
        if id(value) not in seen:
            seen.add(id(value))
            yield path, value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), type)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple, deque)):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        items = list(getattr(value, "__dict__", {}).items())
        if dataclasses.is_dataclass(value):
            items += [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    for name, item in items:
        yield from reachable(item, f"{path}.{name}" if path else name, seen)


def held_arrays(cache: Any) -> list[HeldArray]:
    """Every token array of a cache, with the slots in use.

    A cache may say itself what it holds (``held_arrays()`` and ``static_arrays()``), and what a measurement of quality
    let it keep in decoded form beside that (``decoded_arrays()``, which is not counted). Otherwise each array found on
    it counts, with axis -2 as its token slots, filled up to the cache's ``offset`` or sliding window
    (mlx-lm's keeps a whole prefill chunk beyond its window until the next token comes).

    Raises:
        EngagementError: the cache holds an array that its own account leaves out.
    """
    everything = list(reachable(cache, "", set()))
    if hasattr(cache, "held_arrays"):
        declared = [HeldArray(h.name, h.array, h.used_slots, h.slots) for h in cache.held_arrays()]
        known = [h.array for h in declared] + cache.static_arrays()
        if getattr(cache, "keep_decoded", False):
            known += cache.decoded_arrays()
        missing = _left_out(everything, known)
        if missing:
            raise EngagementError(
                f"{type(cache).__name__} holds arrays that its account leaves out: {', '.join(missing)}"
            )
        return declared
    offset = getattr(cache, "offset", None)
    tokens = min(int(offset), getattr(cache, "max_size", None) or int(offset)) if isinstance(offset, int) else None
    return [_found(name, array, tokens) for name, array in everything if isinstance(array, mx.array)]


def _found(name: str, array: mx.array, tokens: int | None) -> HeldArray:
    """An array of a cache that gives no account: axis -2 are its token slots, where it has such an axis."""
    slots = array.shape[-2] if array.ndim > 1 else 1
    return HeldArray(name, array, slots if tokens is None else min(tokens, slots), slots)


def _left_out(found: Sequence[tuple[str, Array]], known: Sequence[mx.array]) -> list[str]:
    """Arrays that are none of the known ones, and NumPy arrays of some size that share no known one's memory."""
    ids = {id(array) for array in known}
    missing = [name for name, array in found if isinstance(array, mx.array) and id(array) not in ids]
    own = [(name, array) for name, array in found if isinstance(array, np.ndarray) and array.nbytes > SMALL_NBYTES]
    if own:
        views = [np.array(array, copy=False) for array in known if array.size and array.dtype != mx.bfloat16]
        missing += [name for name, array in own if not any(np.may_share_memory(array, view) for view in views)]
    return missing


def static_bytes(caches: Sequence[CacheUnderTest]) -> int:
    """Bytes of calibration tables and codebooks that do not grow with tokens, each array counted once."""
    arrays = {
        id(array): array.nbytes
        for cache in caches
        if hasattr(cache.inner, "static_arrays")
        for array in cache.inner.static_arrays()
    }
    return sum(arrays.values())


def engagement(
    caches: Sequence[CacheUnderTest], claimed: Sequence[bool], expected: type | tuple[type, ...]
) -> list[LayerEngagement]:
    """What holds each layer, in which dtypes, bits and bytes.

    Args:
        caches: one per layer, after tokens went through them.
        claimed: whether the method says that it holds the layer.
        expected: the cache class (or classes) of the method.
    Raises:
        EngagementError: a claimed layer is held by another class, or stored nothing.
    """
    layers = []
    for index, (cache, claim) in enumerate(zip(caches, claimed, strict=True)):
        inner = cache.inner
        is_attention = cache.n_values_per_token > 0
        held = held_arrays(inner) if is_attention else []
        tokens = max((h.used_slots for h in held), default=0)
        if hasattr(inner, "held_arrays"):  # its slots may be blocks of tokens
            tokens = int(inner.size())
        elif held and isinstance(getattr(inner, "offset", None), int) and not getattr(inner, "max_size", None):
            tokens = inner.offset  # of a peer's cache: its tokens may lie along any axis
        engaged = isinstance(inner, expected) and tokens > 0
        if claim and not engaged:
            raise EngagementError(
                f"layer {index} is held by {type(inner).__name__} with {tokens} tokens, "
                f"not by the method that claims it"
            )
        key_bits, value_bits = code_bits(inner)
        layers.append(
            LayerEngagement(
                layer=index,
                cache_class=type(inner).__name__,
                claimed=claim,
                engaged=engaged and claim,
                key_bits=key_bits,
                value_bits=value_bits,
                stored_dtypes=sorted({str(h.array.dtype).removeprefix("mlx.core.") for h in held}),
                tokens=tokens,
                n_values=tokens * cache.n_values_per_token,
                used_bytes=sum(h.used_bytes for h in held),
                allocated_bytes=sum(h.array.nbytes for h in held),
                attention=getattr(inner, "attention", None),
            )
        )
    return layers


def code_bits(inner: Any) -> tuple[float | None, float | None]:
    """Code widths of keys and values: a quantized cache's own where it has one, or those of the dtype it stores.

    Where every KV head has a quantizer of its own, the width is their mean.
    """
    if hasattr(inner, "spec"):
        return _code_bits(getattr(inner.spec, "keys", None)), _code_bits(getattr(inner.spec, "values", None))
    if hasattr(inner, "bits"):
        return float(inner.bits), float(inner.bits)
    keys = getattr(inner, "keys", None)
    if isinstance(keys, mx.array):
        return keys.dtype.size * 8.0, inner.values.dtype.size * 8.0
    return None, None


def _code_bits(quantizer: Any) -> float | None:
    parts = getattr(quantizer, "quantizers", (quantizer,))
    widths = [part.code_bits for part in parts if hasattr(part, "code_bits")]
    return statistics.fmean(widths) if len(widths) == len(parts) else None


def bits_per_value(layers: Sequence[LayerEngagement]) -> float:
    """Resident bits of the stored tokens per cached K and V value, over all attention layers."""
    return 8 * sum(layer.used_bytes for layer in layers) / sum(layer.n_values for layer in layers)


def allocated_bits_per_value(layers: Sequence[LayerEngagement]) -> float:
    """Bits of the whole buffers per cached K and V value: caches grow in steps, so that part of a buffer is unused."""
    return 8 * sum(layer.allocated_bytes for layer in layers) / sum(layer.n_values for layer in layers)
