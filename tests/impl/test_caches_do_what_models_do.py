"""Caches do what models do, and bear what their data do: odd first tokens, values not finite or large, threads,
hooks, files.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import ALL_METHODS, gaussian
from mlx_lm.models import cache as mlx_lm_cache

from veloxquant_mlx.cache.base import (
    KVCacheBuilder,
    KVCacheConfig,
    PackedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from veloxquant_mlx.quantizers.base import QUANTIZERS
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic

STATIC_4_BITS = 0.0095
"""Lloyd-Max at 16 levels (Max 1960)."""


def cache_of(method: str, max_size: int | None = None, **fields: Any) -> PackedKVCache:
    config = KVCacheConfig(method=method, **{**ALL_METHODS[method], **fields})
    return PackedKVCache(config.layer_spec(0, *config.layer_widths([True] * 3)[0], max_size))


@pytest.mark.parametrize("odd", ["equal", "nearly equal", "tiny", "huge", "equal and huge", "zero"])
@pytest.mark.parametrize("chunk", [300, 50, 1])
def test_static_scales_follow_what_comes_after_odd_first_tokens(odd: str, chunk: int) -> None:
    """64 first tokens unlike the rest, in any chunks: of N(0, 1) tokens after them, the last 200 lose at most three
    times what Lloyd-Max loses (the scale is one token's RMS, and the mean is that of other tokens).
    """
    x = gaussian((1, 2, 300, 64))
    first = {
        "equal": x[:, :, :1] + 0 * x[:, :, :64],
        "nearly equal": x[:, :, :1] + 1e-3 * x[:, :, :64],
        "tiny": 0.01 * x[:, :, :64],
        "huge": 100 * x[:, :, :64],
        "equal and huge": 100 * x[:, :, :1] + 0 * x[:, :, :64],
        "zero": 0 * x[:, :, :64],
    }
    x[:, :, :64] = first[odd]
    cache = cache_of("turboquant_static", code_bits=4, calibration=64)
    for start in range(0, 300, chunk):
        part = mx.array(x[:, :, start : start + chunk])
        keys, _ = cache.update_and_fetch(part, part)
    error = np.array(keys)[:, :, 100:] - x[:, :, 100:]
    assert (error**2).sum() / (x[:, :, 100:] ** 2).sum() < 3 * STATIC_4_BITS
    in_use = sum(h.array.nbytes * h.used_slots / h.slots for h in cache.held_arrays())
    assert in_use == cache.formula_nbytes()


def test_gaussian_tokens_keep_one_scale() -> None:
    """What the first tokens describe costs code_bits per value exactly."""
    cache = cache_of("turboquant_static", code_bits=4)
    x = mx.array(gaussian((1, 2, 300, 64)))
    cache.update_and_fetch(x, x)
    assert cache.bits_per_value() == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_value_that_is_not_finite_stays_with_its_token_or_group(method: str, value: float) -> None:
    """Token 70 decodes to something that is not finite; others do only in its group (kivi: 8 tokens of a channel)."""
    clean = gaussian((1, 2, 160, 16)).astype(np.float16)
    x = clean.copy()
    x[0, 1, 70, 5] = value
    cache = cache_of(method, window=0)
    keys, values = cache.update_and_fetch(mx.array(x), mx.array(x))
    for got, quantizer in ((keys, cache.spec.keys), (values, cache.spec.values)):
        lost = np.argwhere(~np.isfinite(np.array(got)))
        block = quantizer.block_tokens if quantizer.name == "kivi_keys" else 1
        assert 70 in lost[:, 2]
        assert set(lost[:, 1]) == {1}
        assert {token // block for token in lost[:, 2]} == {70 // block}


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_calibration_survives_a_token_that_is_not_finite(method: str) -> None:
    """A NaN in the third token leaves the tokens behind it finite."""
    x = gaussian((1, 1, 120, 16)).astype(np.float16)
    x[0, 0, 2, 3] = np.nan
    keys, values = cache_of(method, window=0).update_and_fetch(mx.array(x), mx.array(x))
    assert all(np.isfinite(np.array(side)[:, :, 32:]).all() for side in (keys, values))


@pytest.mark.parametrize("size", [4e4, 65504.0, 1e5, 3e38])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_finite_values_beyond_half_precision_stay_finite(method: str, size: float) -> None:
    """bf16 reaches 3.4e38: what is finite there decodes to finite values at every width, in fp16 too."""
    x = gaussian((1, 1, 80, 16))
    x[..., 3], x[..., 4] = size, -size
    for fields in ({}, {"code_bits": 1}, {"code_bits": 8}):
        if "code_bits" in fields and "code_bits" not in ALL_METHODS[method]:
            continue
        cache = cache_of(method, window=0, **fields)
        tokens = mx.array(x).astype(mx.bfloat16)
        keys, values = cache.update_and_fetch(tokens, tokens)
        assert all(bool(mx.all(mx.isfinite(side))) for side in (keys, values))
        assert all(bool(mx.all(mx.isfinite(side))) for side in cache.fetch(80, mx.float16))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_no_tokens_are_a_pass_like_any_other(method: str) -> None:
    """Zero tokens before, between and after others change nothing, sinks or not."""
    x, none = mx.array(gaussian((1, 2, 40, 16))), mx.zeros((1, 2, 0, 16))
    for sinks in (0, 3):
        cache, plain = cache_of(method, sinks=sinks), cache_of(method, sinks=sinks)
        cache.update_and_fetch(none, none)
        cache.update_and_fetch(x, x)
        plain.update_and_fetch(x, x)
        got, want = cache.update_and_fetch(none, none)[0], plain.keys_and_values()[0]
        assert mx.array_equal(got, want.astype(got.dtype))
        assert cache.bits_per_value() == plain.bits_per_value()
        codes = cache.spec.keys.encode(none)
        assert cache.spec.keys.decode(codes).shape == none.shape


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name not in ("per_head",)])
def test_tables_serve_other_threads(name: str) -> None:
    """A table that a thread asked for first, under a stream of its own and without evaluating, serves all others."""
    seeded = any(field.name == "seed" for field in dataclasses.fields(QUANTIZERS[name]))
    quantizer = QUANTIZERS[name](**({"seed": 77} if seeded else {}))

    def first() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            quantizer.decode(quantizer.encode(mx.ones((1, 1, 64, 64))))

    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    decoded = quantizer.decode(quantizer.encode(mx.array(gaussian((1, 1, 64, 64)))))
    assert bool(mx.all(mx.isfinite(decoded)))


def test_a_side_that_a_model_assigns_is_what_it_holds() -> None:
    """Equal values change nothing; others are coded; another shape is refused."""
    cache, x = cache_of("turboquant_mse"), mx.array(gaussian((1, 2, 20, 64)))
    cache.update_and_fetch(x, x)
    before = cache.keys
    cache.keys = mx.depends(cache.keys, mx.zeros(3))
    assert mx.array_equal(cache.keys, before)
    cache.values = mx.zeros_like(cache.values)
    assert not mx.any(cache.values)
    with pytest.raises(ValueError, match=r"keys can be assigned in the shape .*\(1, 2, 20, 64\), got \(1, 2, 3, 64\)"):
        cache.keys = x[:, :, :3]


def test_a_sliding_layer_gives_sharing_layers_what_attention_read() -> None:
    """After 600 tokens through a window of 8, the layers that share it read 607 tokens; after one more, 8."""
    cache, x = cache_of("turboquant_mse", 8, window=0), mx.array(gaussian((1, 2, 600, 64)))
    for tokens in (x, x, x[:, :, :1]):
        read, _ = cache.update_and_fetch(tokens, tokens)
        shared, _ = cache.keys_and_values()
        assert mx.array_equal(shared, read)


def test_a_model_may_make_these_caches(llama_model: Any) -> None:
    """An object's make_cache that builds packed caches does not call itself; a class that does is told."""
    config = KVCacheConfig(method="turboquant_mse")

    class Hooked:
        layers = llama_model.layers

        def __call__(self, ids: mx.array, cache: Any) -> mx.array:
            return llama_model(ids, cache=cache)

    model: Any = Hooked()
    model.make_cache = lambda: KVCacheBuilder.build(model, config)
    assert [type(cache) for cache in mlx_lm_cache.make_prompt_cache(model)] == [PackedKVCache] * 3
    Hooked.make_cache = lambda self: KVCacheBuilder.build(self, config)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="give it to the object"):
        KVCacheBuilder.build(Hooked(), config)


def filled(model: Any, first: int = 0) -> list[Any]:
    caches = KVCacheBuilder.build(model, KVCacheConfig(method="turboquant_mse"))
    mx.eval(model(mx.array([[(first + i) % 100 for i in range(40)]]), cache=caches))
    return caches


def test_a_loaded_cache_does_not_care_for_its_file(llama_model: Any, tmp_path: Path) -> None:
    """Saving over a file that was loaded, or deleting it, changes nothing that was loaded; nothing else is left."""
    path, one = tmp_path / "chat.safetensors", filled(llama_model)
    save_prompt_cache(path, one)
    loaded = load_prompt_cache(path)
    save_prompt_cache(path, filled(llama_model, 50))
    assert mx.array_equal(loaded[0].keys, one[0].keys)
    assert [file.name for file in tmp_path.iterdir()] == ["chat.safetensors"]
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError, match="no regular file"):
        save_prompt_cache(tmp_path / "folder.safetensors", one)


@pytest.mark.parametrize(("written", "altered"), [("12, 12, 40,", "12, 12, 39,"), ("64, 40, null", "64, 257, null")])
def test_a_file_whose_counts_disagree_with_its_arrays_is_refused(
    llama_model: Any, tmp_path: Path, written: str, altered: str
) -> None:
    """What is cached is verified: an offset of 39 beside 40 coded tokens, and 257 tokens in 256 slots."""
    path = str(tmp_path / "chat.safetensors")
    save_prompt_cache(path, filled(llama_model))
    arrays, metadata = mx.load(path, return_metadata=True)
    assert written in metadata["layers"]
    metadata["layers"] = metadata["layers"].replace(written, altered, 1)
    mx.save_safetensors(path, arrays, metadata)
    with pytest.raises(ValueError, match=r"chat\.safetensors"):
        load_prompt_cache(path)


def test_mlx_lm_and_this_package_read_each_others_files(llama_model: Any, tmp_path: Path) -> None:
    """mlx-lm's functions save and load our caches; ours load what mlx-lm saved."""
    ours, theirs = filled(llama_model), mlx_lm_cache.make_prompt_cache(llama_model)
    llama_model(mx.array([[1, 2, 3]]), cache=theirs)
    path = str(tmp_path / "a.safetensors")
    mlx_lm_cache.save_prompt_cache(path, ours, {"model": "m"})
    for load in (mlx_lm_cache.load_prompt_cache, load_prompt_cache):
        loaded, metadata = load(path, return_metadata=True)
        assert mx.array_equal(loaded[0].keys, ours[0].keys)
        assert metadata == {"model": "m"}
    mlx_lm_cache.save_prompt_cache(path, theirs)
    loaded = load_prompt_cache(path)
    assert mx.array_equal(loaded[0].keys_and_values()[0], theirs[0].keys_and_values()[0])


def test_a_reserved_code_is_no_vectors() -> None:
    """The vector whose code is the reserved one (found by decoding its neighbour) decodes to finite values."""
    quantizer = TurboQuantStatic(1, seed=3)
    static = quantizer.calibrate(mx.array(gaussian((1, 1, 64, 8))))
    every = mx.array(np.array(np.meshgrid(*[[-1.0, 1.0]] * 8), dtype=np.float32).reshape(8, -1).T[None, None])
    decoded = quantizer.decode(quantizer.encode(every * 3, static), mx.float32)
    assert bool(mx.all(mx.isfinite(decoded)))
