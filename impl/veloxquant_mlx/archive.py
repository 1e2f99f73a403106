"""Prompt caches at rest: any cache's tokens into any other kind of cache, and files of them through ``fisher_klt``.

People keep gigabytes of prompt caches on disk. ``python -m veloxquant_mlx archive`` writes one anew at one or two bits
a value; ``restore`` gives mlx-lm's own fp16 file back, decoded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from veloxquant_mlx.cache.coded import CodedStore
from veloxquant_mlx.cache.packed import PackedKVCache
from veloxquant_mlx.cache.persistence import load_prompt_cache, save_prompt_cache
from veloxquant_mlx.calibration.fisher_klt import FisherCode, decoded_caches
from veloxquant_mlx.hook import own_caches

READ: Final = (KVCache, RotatingKVCache, QuantizedKVCache, PackedKVCache)
"""Caches whose tokens can be read as keys and values; others (states of other layers) are passed on as they are."""


@dataclass(frozen=True, eq=False)
class Held:
    """The last tokens of one layer, oldest first.

    Attributes:
        offset: tokens that the layer has seen.
        keys: ``[B, H, T, D]``, rotated as attention reads them.
        values: likewise; T is below ``offset`` where a sliding window has dropped tokens.
    """

    offset: int
    keys: mx.array
    values: mx.array


def held_tokens(caches: Sequence[Any]) -> list[Held | None]:
    """What attention could read of each layer, decoded; None for states of other kinds and empty caches.

    Args:
        caches: a model's, single: mlx-lm's own or this project's.

    Raises:
        ValueError: a cache of another class that holds keys, such as a batch of sequences, or one whose tokens are not
            in a row.
    """
    coded = [cache for cache in caches if isinstance(getattr(cache, "storage", None), CodedStore)]
    decoded = {id(cache): pair for cache, pair in zip(coded, decoded_caches(coded), strict=True)}
    held: list[Held | None] = []
    for layer, cache in enumerate(caches):
        if not isinstance(cache, READ):
            if hasattr(cache, "keys"):
                raise ValueError(f"layer {layer} is a {type(cache).__name__}: only single sequences can be rewritten")
            held.append(None)
        elif cache.empty():
            held.append(None)
        else:
            keys, values = decoded.get(id(cache)) or _keys_and_values(cache)
            tokens = min(cache.offset, getattr(cache, "max_size", None) or cache.offset)
            held.append(Held(cache.offset, keys[:, :, -tokens:], values[:, :, -tokens:]))
    return held


def _keys_and_values(cache: Any) -> tuple[mx.array, mx.array]:
    if isinstance(cache, PackedKVCache):
        return cache.keys_and_values()
    if isinstance(cache, RotatingKVCache):
        if cache.keep and cache.offset > cache.max_size:
            raise ValueError(f"a window that keeps its first {cache.keep} tokens has dropped some behind them")
        in_order: Any = cache._temporal_order
        return in_order(cache.keys), in_order(cache.values)
    if isinstance(cache, QuantizedKVCache):
        return _dequantized(cache, cache.keys), _dequantized(cache, cache.values)
    keys, values = cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :]
    return keys, values


def _dequantized(cache: QuantizedKVCache, side: Any) -> mx.array:
    codes, scales, biases = (part[..., : cache.offset, :] for part in side)
    return mx.dequantize(codes, scales, biases, group_size=cache.group_size, bits=cache.bits)


def refilled(source: Sequence[Any], target: Sequence[Any]) -> list[Any]:
    """The tokens of one list of caches in those of another list.

    This project's caches get all tokens but the last and then that one, as if the last had been generated: tokens have
    aged, and windows have been left behind, as in a cache that a model has filled.

    Args:
        source: filled, single sequences.
        target: empty, of the same model: this project's caches or mlx-lm's.

    Returns:
        ``target``, filled; states of layers without keys are those of ``source``.

    Raises:
        ValueError: lists of other lengths, a target that is not empty, or a class that cannot be read or filled.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} layers cannot be written into {len(target)}: they are of other models")
    held = held_tokens(source)
    made = [mine if isinstance(mine, READ) else theirs for theirs, mine in zip(source, target, strict=True)]
    for layer, (tokens, cache) in enumerate(zip(held, made, strict=True)):
        if isinstance(cache, READ) and not cache.empty():
            raise ValueError(f"layer {layer} of the target holds tokens already")
        if tokens is not None and not isinstance(cache, (KVCache, RotatingKVCache, PackedKVCache)):
            raise ValueError(f"layer {layer}: a {type(cache).__name__} cannot be filled")
    for steps in (slice(None, -1), slice(-1, None)):
        for tokens, cache in zip(held, made, strict=True):
            if tokens is not None and isinstance(cache, PackedKVCache):
                mx.eval(cache.update_and_fetch(*(side[:, :, steps] for side in _from_the_first_token(tokens, cache))))
    for tokens, cache in zip(held, made, strict=True):
        if tokens is not None and not isinstance(cache, PackedKVCache):
            _fill_theirs(cache, tokens)
    return made


def _from_the_first_token(held: Held, cache: PackedKVCache) -> tuple[mx.array, mx.array]:
    """With stand-ins for tokens that a window has dropped: positions count from the first, and windows drop them again.

    A stand-in is what costs least: zeros, or the calibration's mean where one is coded against it.
    """
    dropped = held.offset - held.keys.shape[2]
    if not dropped:
        return held.keys, held.values
    if isinstance(cache.storage, CodedStore):
        transform = cache.storage.spec.code.transform
        missing = transform.keys_and_values(mx.zeros((1, dropped, transform.shape.size)))
    else:
        missing = mx.zeros_like(held.keys[:, :, :1]), mx.zeros_like(held.values[:, :, :1])
        missing = mx.repeat(missing[0], dropped, axis=2), mx.repeat(missing[1], dropped, axis=2)
    return _joined(missing[0], held.keys), _joined(missing[1], held.values)


def _joined(before: mx.array, side: mx.array) -> mx.array:
    return mx.concatenate([before.astype(side.dtype), side], axis=2)


def _fill_theirs(cache: Any, held: Held) -> None:
    mx.eval(cache.update_and_fetch(held.keys, held.values))
    cache.offset = held.offset


@dataclass(frozen=True)
class Rewritten:
    """What :func:`archive` and :func:`restore` report.

    Attributes:
        nbytes_before: of the file that was read.
        nbytes_after: of the file that was written.
        tokens: of the sequence.
        seconds: for reading, coding and writing.
    """

    nbytes_before: int
    nbytes_after: int
    tokens: int
    seconds: float


def archive(file: str | Path, out: str | Path, code: FisherCode, model: Any) -> Rewritten:
    """Write a prompt cache anew through a calibrated code, mlx-lm's or ours, whatever it was stored in.

    The calibration is named in the file by its hash and path, and is needed to read it again: keep it.

    Args:
        file: a prompt cache, as mlx-lm or this project saves it.
        out: where to; may be ``file`` itself, which is then replaced whole.
        code: a saved calibration of ``model``.
        model: what the cache belongs to.

    Raises:
        OSError: there is no such file.
        ValueError: another model's calibration or cache, a calibration that was never saved, or a file that is no
            prompt cache.
    """
    if code.path is None:
        raise ValueError("the calibration was never saved: an archive names it by its file, so save it first")
    return _rewritten(file, out, code.caches(model))


def restore(file: str | Path, out: str | Path, model: Any) -> Rewritten:
    """Write an archived prompt cache anew as the one that mlx-lm would have saved, fp16 and decoded.

    Args:
        file: what :func:`archive` wrote.
        out: where to.
        model: what the cache belongs to.

    Raises:
        OSError: there is no such file.
        ValueError: the calibration of the archive cannot be had, or a file that is no prompt cache.
    """
    return _rewritten(file, out, own_caches(model))


def _rewritten(file: str | Path, out: str | Path, target: Sequence[Any]) -> Rewritten:
    began = time.perf_counter()
    before = Path(file).stat().st_size
    source, metadata = load_prompt_cache(file, return_metadata=True)
    made = refilled(source, target)
    written = save_prompt_cache(out, made, metadata)
    tokens = max((cache.offset for cache in made if isinstance(cache, READ)), default=0)
    return Rewritten(before, written.stat().st_size, tokens, time.perf_counter() - began)
