"""Save and load prompt caches: one safetensors file, no pickle, classes by name from a fixed list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from veloxquant_mlx.cache.fused import fuse, leaves
from veloxquant_mlx.cache.packed import BatchPackedKVCache, PackedKVCache
from veloxquant_mlx.observers.key_norm import KeyNormObserver

FORMAT: Final = "veloxquant-prompt-cache-1"

OURS: Final = (PackedKVCache, BatchPackedKVCache)

CACHE_CLASSES: Final[dict[str, Any]] = {
    **{
        cls.__name__: cls
        for cls in (
            mlx_lm_cache.ArraysCache,
            mlx_lm_cache.BatchKVCache,
            mlx_lm_cache.BatchRotatingKVCache,
            mlx_lm_cache.ChunkedKVCache,
            mlx_lm_cache.ConcatenateKVCache,
            mlx_lm_cache.KVCache,
            mlx_lm_cache.QuantizedKVCache,
            mlx_lm_cache.RotatingKVCache,
        )
    },
    **{cls.__name__: cls for cls in OURS},
}
"""What a file may name; anything else is refused."""


def _class_name(cache: Any) -> str:
    for base in type(cache).__mro__:
        if CACHE_CLASSES.get(base.__name__) is base:
            return str(base.__name__)
    raise ValueError(f"a cache of class {type(cache).__name__} cannot be saved")


def _flattened(value: Any, arrays: dict[str, mx.array]) -> Any:
    if isinstance(value, mx.array):
        name = str(len(arrays))
        arrays[name] = value
        return {"array": name}
    if isinstance(value, (list, tuple)):
        return [_flattened(item, arrays) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a cache state holds {type(value).__name__}, which cannot be saved")


def _restored(value: Any, arrays: Mapping[str, mx.array]) -> Any:
    if isinstance(value, dict):
        return arrays[value["array"]]
    return [_restored(item, arrays) for item in value] if isinstance(value, list) else value


def _described(cache: Any, arrays: dict[str, mx.array]) -> dict[str, Any]:
    if isinstance(cache, mlx_lm_cache.CacheList):
        return {"class": "CacheList", "caches": [_described(part, arrays) for part in cache.caches]}
    return {"class": _class_name(cache), "state": _flattened(cache.state, arrays)}


def _rebuilt(entry: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> Any:
    if entry["class"] == "CacheList":
        cache_list: Any = mlx_lm_cache.CacheList
        return cache_list(*(_rebuilt(part, arrays) for part in entry["caches"]))
    if entry["class"] not in CACHE_CLASSES:
        raise ValueError(f"the file names the unknown cache class {entry['class']!r}")
    return CACHE_CLASSES[entry["class"]].from_state(_restored(entry["state"], arrays))


def save_prompt_cache(file_name: str | Path, cache: Sequence[Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a prompt cache, ours or mlx-lm's layers mixed, to a ``.safetensors`` file.

    Observers are not saved; the norms beside which an outlier observer judges the next token are.

    Args:
        file_name: where to.
        cache: one cache per layer.
        metadata: text to save along.

    Raises:
        ValueError: a cache of a class that cannot be restored.
    """
    arrays: dict[str, mx.array] = {}
    layers = [_described(layer, arrays) for layer in cache]
    header = {"format": FORMAT, "layers": json.dumps(layers), "metadata": json.dumps(dict(metadata or {}))}
    mx.save_safetensors(str(file_name), arrays, header)


def load_prompt_cache(
    file_name: str | Path,
    return_metadata: bool = False,
    *,
    outlier_observer: KeyNormObserver | None = None,
    model: Any = None,
) -> Any:
    """Read what :func:`save_prompt_cache` wrote.

    Args:
        file_name: the file.
        return_metadata: whether to return the metadata too.
        outlier_observer: flags the tokens to come in every layer that keeps outliers, beside the norms of the tokens
            before them, which were saved; its report counts from here on. Without it such a cache can be read, but
            an update raises RuntimeError. A distortion observer is not reattached.
        model: what the caches are for: its layers are fused as ``KVCacheBuilder.build`` fuses them by default. Without
            it every packed cache stays on the plain path, and says so; :func:`veloxquant_mlx.cache.fused.fuse` takes
            other modes.

    Returns:
        The caches, or the caches and the metadata where asked.

    Raises:
        ValueError: another file format, a class that is not on the list, an observer for a file without outliers, or a
            file of outliers without the norms, as earlier versions wrote.
    """
    loaded: Any = mx.load(str(file_name), return_metadata=True)
    arrays, header = loaded
    if header.get("format") != FORMAT:
        raise ValueError(f"{file_name} is no prompt cache of this format ({FORMAT})")
    cache = [_rebuilt(entry, arrays) for entry in json.loads(header["layers"])]
    if outlier_observer is not None:
        routed = [c for c in leaves(cache) if isinstance(c, OURS) and getattr(c.spec, "outlier_keys", None) is not None]
        if not routed:
            raise ValueError(f"outlier_observer was given, but no layer of {file_name} keeps outlier tokens")
        for layer in routed:
            layer.attach_outlier_observer(outlier_observer)
    if model is not None:
        cache, _ = fuse(model, cache)
    else:
        for packed in leaves(cache):
            if isinstance(packed, PackedKVCache):
                packed.not_fused = "loaded without its model"
    return (cache, json.loads(header["metadata"])) if return_metadata else cache
