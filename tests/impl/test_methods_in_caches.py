"""Every registered method inside real caches: bytes, generation, batches, save and load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import ALL_METHODS, gaussian, tiny_llama
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from veloxquant_mlx.cache.base import (
    BatchPackedKVCache,
    KVCacheBuilder,
    KVCacheConfig,
    PackedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)


def config(method: str, **fields: Any) -> KVCacheConfig:
    return KVCacheConfig(method=method, **{**ALL_METHODS[method], **fields})


def tokens(n: int, seed: int, n_batch: int = 1, head_dim: int = 64) -> mx.array:
    return mx.array(gaussian((n_batch, 2, n, head_dim), seed)).astype(mx.float16)


def in_use(cache: Any) -> float:
    return sum(held.array.nbytes * held.used_slots / held.slots for held in cache.held_arrays())


@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_bytes_in_use_are_the_formula(llama_model: Any, method: str, head_dim: int) -> None:
    """After chunks, single tokens and a trim, arrays in use and formula agree to the byte."""
    for cache in KVCacheBuilder.build(llama_model, config(method)):
        for seed, n in enumerate((50, 1, 1, 30)):
            x = tokens(n, seed, head_dim=head_dim)
            keys, values = cache.update_and_fetch(x, x)
        assert keys.shape == values.shape == (1, 2, 82, head_dim)
        assert bool(mx.isfinite(keys).all())
        assert bool(mx.isfinite(values).all())
        assert in_use(cache) == cache.formula_nbytes()
        cache.trim(13)
        assert in_use(cache) == cache.formula_nbytes()
        assert cache.values_held() == 2 * 2 * 69 * head_dim


@pytest.mark.parametrize("method", sorted(set(ALL_METHODS) - {"turboquant_prod_adaptive"}))
@pytest.mark.parametrize("n_tokens", [5, 40, 300])
def test_bytes_are_a_function_of_the_token_count(llama_model: Any, method: str, n_tokens: int) -> None:
    """expected_nbytes(tokens), which never sees an array, is what an untrimmed cache uses."""
    for cache in KVCacheBuilder.build(llama_model, config(method, sinks=2)):
        x = tokens(n_tokens, 1, n_batch=3)
        for start in range(0, n_tokens, 50):
            cache.update_and_fetch(x[:, :, start : start + 50], x[:, :, start : start + 50])
        expected = cache.spec.expected_nbytes(n_tokens, n_batch=3, n_kv_heads=2, key_dim=64, value_dim=64)
        assert in_use(cache) == expected


@pytest.mark.parametrize("method", ALL_METHODS)
def test_generation_reads_the_cache_it_is_given(llama_model: Any, method: str) -> None:
    """mlx-lm's generate_step fills our caches with prompt and answer, and repeats itself exactly."""
    prompt = mx.array(np.random.default_rng(0).integers(0, 128, 60))
    answers = []
    for _ in range(2):
        caches = KVCacheBuilder.build(llama_model, config(method))
        steps = generate_step(prompt, llama_model, max_tokens=6, prompt_cache=caches, prefill_step_size=32)
        answers.append([int(token) for token, _ in steps])
    plain = make_prompt_cache(llama_model)
    for _ in generate_step(prompt, llama_model, max_tokens=6, prompt_cache=plain, prefill_step_size=32):
        pass
    assert answers[0] == answers[1]
    assert all(isinstance(cache, PackedKVCache) for cache in caches)
    assert [cache.size() for cache in caches] == [cache.size() for cache in plain]


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_saved_cache_continues_like_the_original(llama_model: Any, method: str, tmp_path: Path) -> None:
    """Logits after load equal those of the cache that was saved, bit for bit; metadata come back."""
    ids = mx.array(np.random.default_rng(1).integers(0, 128, (1, 50)))
    caches = KVCacheBuilder.build(llama_model, config(method))
    llama_model(ids[:, :45], cache=caches)
    save_prompt_cache(tmp_path / "cache.safetensors", caches, {"model": "tiny"})
    loaded, metadata = load_prompt_cache(tmp_path / "cache.safetensors", return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert [cache.spec for cache in loaded] == [cache.spec for cache in caches]
    assert mx.array_equal(llama_model(ids[:, 45:], cache=loaded), llama_model(ids[:, 45:], cache=caches))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_batch_decodes_each_sequence_like_its_single_cache(llama_model: Any, method: str) -> None:
    """Merged sequences of lengths 40, 7 and 0 fetch, per row, exactly what their single caches fetch."""
    singles = [KVCacheBuilder.build(llama_model, config(method))[0] for _ in range(3)]
    for seed, (cache, n) in enumerate(zip(singles, (40, 7, 0), strict=True)):
        if n:
            cache.update_and_fetch(tokens(n, seed), tokens(n, seed + 9))
    batch = PackedKVCache.merge(singles)
    assert isinstance(batch, BatchPackedKVCache)
    assert batch.offset.tolist() == [40, 7, 0]
    assert batch.left_padding.tolist() == [0, 33, 40]
    x = tokens(3, 5, n_batch=3)
    keys, values = batch.update_and_fetch(x, -x)
    for i, cache in enumerate(singles):
        expected = cache.update_and_fetch(x[i : i + 1], -x[i : i + 1])
        for got, want in zip((keys, values), expected, strict=True):
            assert mx.array_equal(got[i : i + 1, :, -want.shape[2] :], want)
            assert not mx.any(got[i, :, : got.shape[2] - want.shape[2]])
        assert mx.array_equal(batch.extract(i).keys_and_values()[0], cache.keys_and_values()[0])
    assert in_use(batch) == batch.formula_nbytes() == sum(cache.formula_nbytes() for cache in singles)


@pytest.mark.parametrize("method", ["turboquant_mse", "kivi", "turboquant_prod_adaptive", "turboquant_static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batch_generation_gives_the_answers_of_single_generation(
    request: pytest.FixtureRequest, family: str, method: str
) -> None:
    """mlx-lm's BatchGenerator over prompts of 21, 4 and 35 tokens answers as three single runs do."""
    model = request.getfixturevalue({"llama": "llama_model", "gemma3": "gemma_model"}[family])
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 128, n).tolist() for n in (21, 4, 35)]
    singles = []
    for prompt in prompts:
        caches = KVCacheBuilder.build(model, config(method))
        steps = generate_step(mx.array(prompt), model, max_tokens=8, prompt_cache=caches, prefill_step_size=16)
        singles.append([int(token) for token, _ in steps])
    generator = BatchGenerator(model, max_tokens=8, prefill_step_size=16, completion_batch_size=2)
    uids = generator.insert(prompts, caches=[KVCacheBuilder.build(model, config(method)) for _ in prompts])
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    assert [answers[uid] for uid in uids] == singles


@pytest.mark.parametrize("method", sorted(set(ALL_METHODS) - {"turboquant_prod_adaptive", "ratequant"}))
def test_value_bits_change_the_values_alone(llama_model: Any, method: str) -> None:
    """value_bits=1 keeps the keys' codes and makes values as cheap as the method's one-bit code."""
    plain = KVCacheBuilder.build(llama_model, config(method))[0]
    mixed = KVCacheBuilder.build(llama_model, config(method, value_bits=1))[0]
    assert mixed.spec.keys == plain.spec.keys
    cost, before = mixed.spec.values.bits_per_value(64), plain.spec.values.bits_per_value(64)
    # a code and a sixty-fourth of an fp16 norm cost 1.25 bits: one bit already, and nothing to save
    assert cost == before if before == 1.25 else cost < before


@pytest.mark.parametrize("n_heads", [(4, 4), (4, 2), (4, 1)])
def test_mha_gqa_and_mqa_run(n_heads: tuple[int, int]) -> None:
    """Four query heads over four, two and one KV heads agree with fp16 at 8 bits."""
    model = tiny_llama(1, 48, *n_heads)
    ids = mx.array(np.random.default_rng(4).integers(0, 128, (1, 30)))
    got = model(ids, cache=KVCacheBuilder.build(model, KVCacheConfig(method="turboquant_mse", code_bits=8)))
    expected = model(ids, cache=make_prompt_cache(model))
    assert (mx.linalg.norm(got - expected) / mx.linalg.norm(expected)).item() < 0.02


def test_lockstep_rows_and_merge(llama_model: Any) -> None:
    """A row of a lockstep batch decodes like the batch; the batch itself refuses to merge."""
    cache = KVCacheBuilder.build(llama_model, config("turboquant_static", sinks=3, window=5))[0]
    x = tokens(60, 8, n_batch=3)
    keys, _ = cache.update_and_fetch(x, x)
    part = cache.rows(slice(1, 3))
    got, _ = part.fetch(60, mx.float32)
    assert mx.array_equal(got, keys[1:3])
    assert in_use(part) == part.formula_nbytes()
    with pytest.raises(ValueError, match="lockstep batch cannot be merged"):
        PackedKVCache.merge([copy.deepcopy(cache)])


def test_a_file_that_names_another_class_is_refused(tmp_path: Path) -> None:
    """Classes are resolved from a fixed list; anything else in the file is an error, not an import."""
    layers = '[{"class": "os.system", "state": []}]'
    header = {"format": "veloxquant-prompt-cache-1", "layers": layers, "metadata": "{}"}
    mx.save_safetensors(str(tmp_path / "bad.safetensors"), {"0": mx.zeros(1)}, header)
    with pytest.raises(ValueError, match=r"unknown cache class 'os\.system'"):
        load_prompt_cache(tmp_path / "bad.safetensors")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"0": mx.zeros(1)}, {})
    with pytest.raises(ValueError, match="no prompt cache of this format"):
        load_prompt_cache(tmp_path / "other.safetensors")
