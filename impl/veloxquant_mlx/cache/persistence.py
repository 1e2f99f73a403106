"""Save and load prompt caches: one safetensors file, no pickle, classes by name from a fixed list.

mlx-lm's own files load here as well. The other way round, mlx-lm's ``save_prompt_cache`` and ``load_prompt_cache``
serve caches of ours wherever this package is imported (:func:`register_with_mlx_lm`): a cache
for mlx-lm's ``--prompt-cache-file`` is saved by mlx-lm's function, for its loader can make nothing of this format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from veloxquant_mlx.cache.fused import fuse, leaves
from veloxquant_mlx.cache.packed import BatchPackedKVCache, PackedKVCache
from veloxquant_mlx.cache.storage import check_count
from veloxquant_mlx.files import beside, reading
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


def register_with_mlx_lm() -> None:
    """Let mlx-lm's ``load_prompt_cache`` know the classes of this package, which its files name."""
    for cls in OURS:
        setattr(mlx_lm_cache, cls.__name__, cls)
    mlx_lm_cache.FusedKVCache = PackedKVCache  # type: ignore[attr-defined]  # fused anew by whoever has the model


register_with_mlx_lm()


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


def _of_mlx_lm(file_name: str, header: Mapping[str, str]) -> tuple[list[Any], dict[str, str]]:
    """The caches and the metadata of a file that mlx-lm's ``save_prompt_cache`` wrote."""
    for name in (text for key, text in header.items() if key.startswith("1.")):
        if name not in (*CACHE_CLASSES, "CacheList", "FusedKVCache"):
            raise ValueError(f"the file names the unknown cache class {name!r}")
    loaded: Any = mlx_lm_cache.load_prompt_cache(file_name, return_metadata=True)  # type: ignore[no-untyped-call]
    cache, metadata = loaded
    return cache, dict(metadata)


def _check_theirs(cache: Any) -> None:
    """Raise ValueError where the token count of one of mlx-lm's caches and its arrays disagree."""
    name = type(cache).__name__
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        for array in cache.cache:
            if array is not None and not isinstance(array, mx.array):
                raise ValueError(f"{name} must hold arrays, got {str(array)[:50]}")
        return
    first = [side[0] if isinstance(side, (list, tuple)) else side for side in (cache.keys, cache.values)]
    place: Any = getattr(cache, "_idx", cache.offset)
    check_count(f"{name}: tokens", place)
    if all(array is None for array in first) and not place:
        return
    for array in first:
        if not isinstance(array, mx.array) or array.ndim != 4:
            raise ValueError(f"{name} must hold keys and values [B, H, T, D] of its {place} tokens")
    keys, values = first
    needed = place - getattr(cache, "start_position", 0)
    if isinstance(cache, mlx_lm_cache.RotatingKVCache):
        check_count(f"{name}: offset", cache.offset)
        needed = max(place, min(cache.offset, cache.max_size))
    if keys.shape[:3] != values.shape[:3] or not 0 <= needed <= keys.shape[2]:
        raise ValueError(f"{name} counts {needed} tokens, but holds {keys.shape[2]} keys and {values.shape[2]} values")


def save_prompt_cache(file_name: str | Path, cache: Sequence[Any], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a prompt cache, ours or mlx-lm's layers mixed, to a ``.safetensors`` file.

    The file is written beside its place and renamed, so that a reader finds the old one or the new one, whole.
    Observers are not saved; the norms beside which an outlier observer judges the next token are.

    Args:
        file_name: where to; ``.safetensors`` is added to a name that ends otherwise.
        cache: one cache per layer.
        metadata: text to save along.

    Returns:
        The file that was written.

    Raises:
        ValueError: a cache of a class that cannot be restored.
        OSError: there is no such folder, or something else than a file has that name.
    """
    arrays: dict[str, mx.array] = {}
    layers = [_described(layer, arrays) for layer in cache]
    header = {"format": FORMAT, "layers": json.dumps(layers), "metadata": json.dumps(dict(metadata or {}))}
    path = str(file_name) if str(file_name).endswith(".safetensors") else f"{file_name}.safetensors"
    with beside(path) as made:
        mx.save_safetensors(str(made), arrays, header)
    return Path(path)


def load_prompt_cache(
    file_name: str | Path,
    return_metadata: bool = False,
    *,
    outlier_observer: KeyNormObserver | None = None,
    model: Any = None,
) -> Any:
    """Read what :func:`save_prompt_cache` wrote, or mlx-lm's function of that name.

    Everything is read at once: what happens to the file afterwards does not matter.

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
        OSError: there is no such file.
        ValueError: another file format, a damaged file, token counts that disagree with the arrays, a class that is not
            on the list, an observer for a file without outliers, or a file of outliers without the norms, as earlier
            versions wrote.
    """
    with reading(file_name, "prompt cache"):
        loaded: Any = mx.load(str(file_name), return_metadata=True)
        arrays, header = loaded
        mx.eval(arrays)
        if header.get("format") == FORMAT:
            cache = [_rebuilt(entry, arrays) for entry in json.loads(header["layers"])]
            metadata = json.loads(header["metadata"])
        elif "1.0" in header and "2.0" in header:
            cache, metadata = _of_mlx_lm(str(file_name), header)
        else:
            raise ValueError(f"it is no prompt cache of this format ({FORMAT}), nor of mlx-lm's")
        for leaf in leaves(cache):
            if not isinstance(leaf, OURS):
                _check_theirs(leaf)
        mx.eval([leaf.state for leaf in leaves(cache)])
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
    return (cache, metadata) if return_metadata else cache
