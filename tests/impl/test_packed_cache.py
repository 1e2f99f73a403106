"""The storage class behind mlx-lm's cache protocol."""

from __future__ import annotations

import copy
import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gaussian
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, LayerSpec, PackedKVCache
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

EIGHT_BIT_KEYS = 2e-2
"""Relative error of logits at 8 bits: sqrt(D(8)) = 0.6% per vector, through three layers."""

HALF_PRECISION = 4e-3
"""Relative error of logits when K and V are fp16 in an fp32 model: 2**-11 per entry, through four layers."""


def spec(code_bits: int = 4, **fields: Any) -> LayerSpec:
    return LayerSpec(TurboQuantMSE(code_bits), TurboQuantMSE(code_bits), **fields)


def tokens(n: int, seed: int = 0, n_batch: int = 1, n_heads: int = 2, head_dim: int = 64) -> mx.array:
    return mx.array(gaussian((n_batch, n_heads, n, head_dim), seed)).astype(mx.float16)


def filled(cache: PackedKVCache, keys: mx.array, values: mx.array, chunks: list[int]) -> tuple[mx.array, mx.array]:
    start, fetched = 0, None
    for chunk in chunks:
        fetched = cache.update_and_fetch(keys[:, :, start : start + chunk], values[:, :, start : start + chunk])
        mx.eval(fetched)
        start += chunk
    assert fetched is not None
    return fetched


def used_bytes(cache: PackedKVCache) -> float:
    return sum(held.array.nbytes * held.used_slots / held.slots for held in cache.held_arrays())


@pytest.mark.parametrize("chunks", [[700], [1] * 7 + [300, 393], [256, 256, 188]])
def test_what_attention_reads_is_what_the_quantizer_decodes(chunks: list[int]) -> None:
    """However tokens arrive, the fetch equals one encode and decode of all of them."""
    keys, values = tokens(700, 1), tokens(700, 2)
    fetched = filled(PackedKVCache(spec(3)), keys, values, chunks)
    for x, got in zip((keys, values), fetched, strict=True):
        quantizer = TurboQuantMSE(3)
        expected = quantizer.decode(quantizer.encode(x), mx.float32)
        np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (4, 0), (0, 32), (4, 32)])
@pytest.mark.parametrize("n_tokens", [1, 3, 33, 300, 513])
def test_bytes_follow_the_formula_exactly(sinks: int, window: int, n_tokens: int) -> None:
    """Bytes in use equal sinks and window at 16 bits plus the rest at code_bits + 16/head_dim."""
    cache = PackedKVCache(spec(3, sinks=sinks, window=window))
    chunks = [1, n_tokens - 1] if n_tokens > 1 else [1]
    filled(cache, tokens(n_tokens, 1), tokens(n_tokens, 2), chunks)
    dense = min(n_tokens, sinks) + min(max(0, n_tokens - sinks), window)
    bits = dense * 16 + (n_tokens - dense) * (3 + 16 / 64)
    assert used_bytes(cache) == 2 * 2 * 64 * bits / 8
    assert float(cache.bits_per_value()) == bits / n_tokens
    assert cache.spec.expected_nbytes(n_tokens, n_kv_heads=2, key_dim=64, value_dim=64) == used_bytes(cache)


def test_sinks_and_window_are_exact_fp16() -> None:
    """The first 4 and the last 16 tokens come back bit for bit, those between do not."""
    keys = tokens(64, 3)
    got, _ = filled(PackedKVCache(spec(2, sinks=4, window=16)), keys, keys, [10, 1, 53])
    exact = np.all(np.array(got) == np.array(keys.astype(mx.float32)), axis=(0, 1, 3))
    np.testing.assert_array_equal(np.flatnonzero(exact), [*range(4), *range(48, 64)])


def test_buffers_grow_in_steps_and_geometrically() -> None:
    """Slots are multiples of 256 and at least those used; growing to 3000 reallocates at most 12 times."""
    cache = PackedKVCache(spec(1))
    x = tokens(3000, 4, n_heads=1)
    seen = []
    for start in range(0, 3000, 20):
        cache.update_and_fetch(x[:, :, start : start + 20], x[:, :, start : start + 20])
        held = cache.held_arrays()
        mx.eval([h.array for h in held])
        assert all(h.slots % 256 == 0 and h.used_slots == start + 20 <= h.slots for h in held)
        seen.append(held[0].slots)
    assert seen[-1] <= 3000 * 9 / 8 + 256
    assert len(set(seen)) <= 12


def test_trim_forgets_and_overwrites() -> None:
    """After a trim the cache continues as if the forgotten tokens had never come."""
    a, b, c = tokens(40, 5), tokens(8, 6), tokens(12, 7)
    cache = PackedKVCache(spec())
    filled(cache, mx.concatenate([a, b], axis=2), mx.concatenate([a, b], axis=2), [48])
    assert cache.trim(8) == 8
    got, _ = cache.update_and_fetch(c, c)
    fresh = PackedKVCache(spec())
    expected, _ = filled(fresh, mx.concatenate([a, c], axis=2), mx.concatenate([a, c], axis=2), [52])
    assert mx.array_equal(got, expected)
    assert cache.size() == fresh.size() == 52
    assert cache.trim(100) == 52
    assert cache.size() == 0


def test_trim_reaches_through_window_into_codes_and_sinks() -> None:
    """Trimming past the window leaves the coded tokens as decoded; past them, the sinks."""
    keys = tokens(64, 8)
    cache = PackedKVCache(spec(4, sinks=4, window=16))
    before, _ = filled(cache, keys, keys, [64])
    cache.trim(30)
    got, _ = cache.update_and_fetch(keys[:, :, 34:35], keys[:, :, 34:35])
    np.testing.assert_allclose(np.array(got[:, :, :34]), np.array(before[:, :, :34]), rtol=0, atol=2e-6)
    cache.trim(33)
    got, _ = cache.update_and_fetch(keys[:, :, 2:3], keys[:, :, 2:3])
    assert mx.array_equal(got, keys[:, :, :3].astype(got.dtype))


def test_a_copy_is_independent() -> None:
    """Updating a deep copy leaves the original's fetch unchanged."""
    keys = tokens(20, 9)
    cache = PackedKVCache(spec())
    filled(cache, keys, keys, [20])
    twin = copy.deepcopy(cache)
    twin.trim(10)
    twin.update_and_fetch(-keys, -keys)
    cache.trim(1)
    got, _ = cache.update_and_fetch(keys[:, :, 19:], keys[:, :, 19:])
    expected, _ = filled(PackedKVCache(spec()), keys, keys, [20])
    assert mx.array_equal(got, expected)


def test_a_cache_from_another_ones_state_is_independent() -> None:
    """Two caches of one state may both continue: neither writes into the other's buffers."""
    keys = tokens(20, 9)
    cache = PackedKVCache(spec())
    filled(cache, keys, keys, [20])
    twin = PackedKVCache.from_state(cache.state)
    twin.trim(10)
    mx.eval(twin.update_and_fetch(-keys, -keys))
    expected, _ = filled(PackedKVCache(spec()), keys, keys, [20])
    assert mx.array_equal(cache.fetch(20, mx.float32)[0], expected)


@pytest.mark.parametrize("fields", [{}, {"max_size": 512}, {"sinks": 4, "window": 32}])
@pytest.mark.parametrize("n_heads", [1, 2])
def test_no_decoded_copy_survives_a_step(n_heads: int, fields: dict[str, int]) -> None:
    """Once the tokens given and fetched are gone, active memory has grown by the packed bytes alone."""
    cache = PackedKVCache(spec(2, **fields))
    warm = tokens(64, n_heads=n_heads, head_dim=256)
    filled(cache, warm, warm, [64])  # builds the tables
    gc.collect()
    before, packed_before = mx.get_active_memory(), cache.nbytes
    for start in range(0, 2048, 512):
        x = tokens(512, start, n_heads=n_heads, head_dim=256)
        mx.eval(cache.update_and_fetch(x, x))
    del x
    mx.eval([held.array for held in cache.held_arrays()])
    packed = cache.nbytes - packed_before
    shared = 6 * (16384 + 4096)  # MLX lets a copy share a buffer that is up to 16 KiB larger; six arrays, pages
    assert mx.get_active_memory() - before < packed + shared
    copies = cache.keys_and_values()
    mx.eval(copies)
    assert mx.get_active_memory() - before > packed + shared  # the measurement would see an fp16 copy


def test_the_cache_hides_no_array() -> None:
    """Every mx.array reachable through the object's attributes is reported as held or static."""
    cache = PackedKVCache(spec(4, sinks=4, window=8))
    filled(cache, tokens(50), tokens(50), [50])
    reported = {id(held.array) for held in cache.held_arrays()} | {id(a) for a in cache.static_arrays()}

    def walk(value: Any) -> list[mx.array]:
        if isinstance(value, mx.array):
            return [value]
        if isinstance(value, (list, tuple)):
            return [array for item in value for array in walk(item)]
        if hasattr(value, "__dict__"):
            return [array for item in vars(value).values() for array in walk(item)]
        return []

    assert {id(array) for array in walk(cache)} <= reported
    assert not hasattr(cache, "bits")
    assert not hasattr(cache, "group_size")


def test_eight_bits_give_nearly_the_same_logits(llama_model: Any) -> None:
    """A llama that reads an 8-bit cache in chunks agrees with the fp16 cache."""
    ids = mx.array(np.random.default_rng(0).integers(0, 128, (2, 48)))
    config = KVCacheConfig(method="turboquant_mse", code_bits=8)
    packed, plain = KVCacheBuilder.build(llama_model, config), make_prompt_cache(llama_model)
    for start, stop in ((0, 20), (20, 47), (47, 48)):
        got = llama_model(ids[:, start:stop], cache=packed)
        expected = llama_model(ids[:, start:stop], cache=plain)
        error = mx.linalg.norm(got - expected) / mx.linalg.norm(expected)
        assert error.item() < EIGHT_BIT_KEYS
    assert all(isinstance(cache, PackedKVCache) for cache in packed)


@pytest.mark.parametrize("chunks", [[40], [5, 35], [1] * 40, [20, 1, 1, 18], [16, 1, 23], [15, 2, 23]])
def test_sliding_layers_attend_like_the_rotating_cache(gemma_model: Any, chunks: list[int]) -> None:
    """gemma3 with windows of 16 agrees with mlx-lm's own caches for any chunking, all tokens in fp16."""
    ids = mx.array(np.random.default_rng(1).integers(0, 128, (2, 40)))
    packed = KVCacheBuilder.build(gemma_model, KVCacheConfig(method="turboquant_mse", window=100))
    plain = make_prompt_cache(gemma_model)
    assert [cache.spec.max_size for cache in packed] == [16, 16, None, 16]
    start = 0
    for chunk in chunks:
        got = gemma_model(ids[:, start : start + chunk], cache=packed)
        expected = gemma_model(ids[:, start : start + chunk], cache=plain)
        assert (mx.linalg.norm(got - expected) / mx.linalg.norm(expected)).item() < HALF_PRECISION
        start += chunk
    assert [cache.size() for cache in packed] == [cache.size() for cache in plain]


def test_a_sliding_layer_drops_old_tokens_in_steps() -> None:
    """A window of 100 tokens never holds more than two steps of slots and counts 100 tokens as used."""
    cache = PackedKVCache(spec(max_size=100))
    for seed in range(10):
        x = tokens(150, seed)
        cache.update_and_fetch(x, x)
    held = cache.held_arrays()
    assert all(h.used_slots == 100 and h.slots <= 512 for h in held)
    assert cache.spec.expected_nbytes(1500, n_kv_heads=2, key_dim=64, value_dim=64) == used_bytes(cache)
    assert cache.bits_per_value() == 4.25
    assert not cache.is_trimmable()


@pytest.mark.parametrize("window_size", [None, 16, 10])
@pytest.mark.parametrize("n_new", [1, 2, 7, 20])
@pytest.mark.parametrize("n_before", [0, 1, 9, 15, 16, 17, 40])
def test_sliding_masks_are_the_rotating_caches(n_before: int, n_new: int, window_size: int | None) -> None:
    """For several new tokens the mask is the RotatingKVCache's own; for one, the same tokens are visible."""
    ours, theirs = PackedKVCache(spec(max_size=16)), RotatingKVCache(16)
    x = tokens(n_before + n_new, 3)
    for start in range(n_before):
        for cache in (ours, theirs):
            cache.update_and_fetch(x[:, :, start : start + 1], x[:, :, start : start + 1])
    masks = [cache.make_mask(n_new, window_size=window_size) for cache in (ours, theirs)]
    new = x[:, :, n_before:]
    keys = [cache.update_and_fetch(new, new)[0] for cache in (ours, theirs)]
    if isinstance(masks[1], mx.array) and n_new > 1:
        assert mx.array_equal(*masks)
    elif isinstance(masks[1], mx.array):
        visible = [int(mx.sum(mask).item()) for mask in masks]
        assert visible[0] == visible[1] == window_size
    else:
        assert masks[0] == masks[1]
    assert keys[0].shape == keys[1].shape


@pytest.mark.parametrize("n_before", [0, 5])
@pytest.mark.parametrize("n_new", [1, 4])
@pytest.mark.parametrize("return_array", [False, True])
@pytest.mark.parametrize("window_size", [None, 3])
def test_full_masks_are_mlx_lms(n_before: int, n_new: int, return_array: bool, window_size: int | None) -> None:
    """make_mask of a full-attention layer equals KVCache.make_mask."""
    ours, theirs = PackedKVCache(spec()), KVCache()
    ours.offset = theirs.offset = n_before
    masks = [c.make_mask(n_new, return_array=return_array, window_size=window_size) for c in (ours, theirs)]
    if isinstance(masks[1], mx.array):
        assert mx.array_equal(*masks)
    else:
        assert masks[0] == masks[1]


@pytest.mark.parametrize("method", ["turboquant_mse", "turboquant_prod_adaptive"])
def test_a_window_of_fp16_tokens_alone_has_a_cost(method: str) -> None:
    """Once every coded token has left the sliding window, the fp16 tokens cost 16 bits each, and coding goes on."""
    config = KVCacheConfig(method=method, window=40)
    cache = PackedKVCache(config.layer_spec(0, None, None, 32))
    x = tokens(296, 1)
    filled(cache, x, x, [296])
    cache.begin_step()  # as the next update begins
    assert cache.storage.keys.coded.blocks == 0
    assert cache.bits_per_value() == 16
    assert float(cache.formula_nbytes()) == used_bytes(cache)
    got, _ = filled(cache, x[:, :, :100], x[:, :, :100], [100])
    assert got.shape[2] == 131
    assert float(cache.formula_nbytes()) == used_bytes(cache)


def test_a_width_that_leaves_the_window_costs_nothing() -> None:
    """An adaptive stream of which every block left the window is gone: only the width in use is held and paid."""
    config = KVCacheConfig(method="turboquant_prod_adaptive", block_size=8, distortion_threshold=0.1)
    cache = PackedKVCache(config.layer_spec(0, None, None, 32))
    hard = tokens(264, 1)
    easy = mx.zeros_like(hard)
    filled(cache, hard, hard, [264])
    used = {held.name for held in cache.held_arrays() if held.used_slots}
    filled(cache, easy, easy, [264] * 3)
    assert not used & {held.name for held in cache.held_arrays()} - {"keys.choices", "values.choices"}
    assert cache.bits_per_value() > 0
    assert float(cache.formula_nbytes()) == used_bytes(cache)
