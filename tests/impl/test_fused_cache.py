"""The fused path inside real models: mlx-lm's own call, the executed kernel, the plain path as reference."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import tiny_llama
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models import gpt_oss
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, make_prompt_cache

from veloxquant_kernels import emulator
from veloxquant_mlx.cache import persistence
from veloxquant_mlx.cache.base import (
    KVCacheBuilder,
    KVCacheConfig,
    PackedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from veloxquant_mlx.cache.fused import FusedKVCache, fuse, fused_route, remove_route
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver

needs_compiler = pytest.mark.usefixtures("compiler")
STEPS = 5


@pytest.fixture(autouse=True)
def route_removed() -> Any:
    original = mlx_lm_base.quantized_scaled_dot_product_attention
    yield
    remove_route()
    assert mlx_lm_base.quantized_scaled_dot_product_attention is original


def prompt(n: int, vocabulary: int = 128, n_batch: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, vocabulary, (n_batch, n)))


def step_logits(model: Any, caches: list[Any], tokens: mx.array) -> np.ndarray:
    """Logits of the last STEPS tokens, fed one by one behind a prefill."""
    model(tokens[:, :-STEPS], cache=caches)
    out = [model(tokens[:, i : i + 1], cache=caches) for i in range(tokens.shape[1] - STEPS, tokens.shape[1])]
    return np.array(mx.concatenate(out, axis=1).astype(mx.float32))


CONFIGS = {
    "4 bits": KVCacheConfig(method="turboquant_mse", code_bits=4),
    "K3V2, sinks, window": KVCacheConfig(method="turboquant_mse", code_bits=3, value_bits=2, sinks=4, window=7),
}


@needs_compiler
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("n_batch", [1, 2])
def test_fused_steps_give_the_plain_logits(llama_model: Any, config: KVCacheConfig, n_batch: int) -> None:
    """Same tokens, same storage, attention by the executed kernel: logits agree to fp32 rounding (1e-4 of their
    spread; a code that flips on a rounding error would show as 1e-2)."""
    tokens = prompt(45, n_batch=n_batch)
    expected = step_logits(llama_model, KVCacheBuilder.build(llama_model, config), tokens)
    built = KVCacheBuilder.build(llama_model, config)
    caches, reasons = fuse(llama_model, built, mode="on", backend="emulator")
    assert reasons == ["fused"] * 3
    with emulator.session("checked", seed=2):
        logits = step_logits(llama_model, caches, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(np.std(expected)))
    assert all(cache.steps == {"fused": STEPS, "several new tokens": 1} for cache in caches)
    assert {type(cache) for cache in caches} == {FusedKVCache}


@needs_compiler
def test_a_left_padded_batch_mask_reaches_the_kernel(llama_model: Any) -> None:
    """A bool mask per sequence hides its padding, in the kernel as in the plain path."""
    config = CONFIGS["4 bits"]
    (plain, *_), (packed, *_) = (KVCacheBuilder.build(llama_model, config) for _ in range(2))
    rng = np.random.default_rng(1)
    keys, values = (mx.array(rng.standard_normal((2, 2, 20, 64)).astype(np.float32)) for _ in range(2))
    queries = mx.array(rng.standard_normal((2, 4, 1, 64)).astype(np.float32))
    mask = mx.arange(20)[None, None, None] >= mx.array([0, 6])[:, None, None, None]
    fused = FusedKVCache.from_packed(packed, "emulator")
    fused.update_and_fetch(keys, values)
    out = fused.attend(queries, 0.125, mask)
    expected = mx.fast.scaled_dot_product_attention(
        queries, *plain.update_and_fetch(keys, values), scale=0.125, mask=mask
    )
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=1e-5)


def test_mlx_lms_own_quantized_cache_is_forwarded(llama_model: Any) -> None:
    """With the route installed mlx-lm's affine cache gives what it gave without, bit for bit."""
    tokens = prompt(20)

    def run() -> np.ndarray:
        return step_logits(llama_model, [QuantizedKVCache(group_size=32, bits=4) for _ in range(3)], tokens)

    expected = run()
    with fused_route():
        np.testing.assert_array_equal(run(), expected)


without_metal = pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")


@without_metal
def test_auto_without_metal_changes_nothing(llama_model: Any) -> None:
    """The plain path stays where there is no device, and every cache says so."""
    built = KVCacheBuilder.build(llama_model, CONFIGS["4 bits"])
    assert [type(cache) for cache in built] == [PackedKVCache] * 3
    assert [cache.attention for cache in built] == ["plain (no Metal device)"] * 3
    caches, reasons = fuse(llama_model, built, mode="off")
    assert [a is b for a, b in zip(caches, built, strict=True)] == [True] * 3
    assert reasons == ["switched off"] * 3
    assert caches[0].attention == "plain (switched off)"


@without_metal
def test_on_without_metal_says_what_is_missing(llama_model: Any) -> None:
    """Switched on, a fused path that cannot be is an error, never a silent change of path."""
    for backend in (None, "metal"):
        config = KVCacheConfig(method="turboquant_mse", code_bits=4, fused="on", fused_backend=backend)
        with pytest.raises(RuntimeError, match="Metal device"):
            KVCacheBuilder.build(llama_model, config)


def test_auto_on_the_cpu_of_a_mac_stays_plain(llama_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX launches Metal kernels on its default device only: with the CPU there, the plain path is taken, and named."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with mx.stream(mx.cpu):
        built = KVCacheBuilder.build(llama_model, CONFIGS["4 bits"])
    assert [cache.attention for cache in built] == ["plain (MLX's default device is the CPU)"] * 3


@pytest.mark.parametrize(("field", "value"), [("fused", "yes"), ("fused", True), ("fused_backend", "cuda")])
def test_an_unknown_switch_is_refused(field: str, value: Any) -> None:
    """The three states and the backends are listed."""
    with pytest.raises(ValueError, match=f"{field} must be one of .*got {value!r}"):
        KVCacheConfig(method="turboquant_mse", code_bits=4, **{field: value})


def test_the_builder_switches_layers_on_and_says_what_stays_plain(gemma_model: Any, llama_model: Any) -> None:
    """The one full-attention layer fuses, sliding windows stay plain with their reason, and steps are counted."""
    config = KVCacheConfig(method="turboquant_mse", code_bits=4, fused="on", fused_backend="reference")
    caches = KVCacheBuilder.build(gemma_model, config)
    step_logits(gemma_model, caches, prompt(30))
    said = [cache.attention for cache in caches]
    assert said.count("plain (a sliding window)") == 3
    assert said.count(f"fused {STEPS}, plain 1 (several new tokens)") == 1
    affine = KVCacheConfig(method="affine", code_bits=4, group_size=16, fused="on", fused_backend="reference")
    with pytest.raises(ValueError, match=r"cannot be switched on: .*\(no fused kernel for affine\)"):
        KVCacheBuilder.build(llama_model, affine)


def test_layers_without_a_fused_kernel_stay_plain(llama_model: Any, gemma_model: Any) -> None:
    """Sliding windows, other quantizers and outlier tokens keep the packed cache, with the reason."""
    caches, reasons = fuse(gemma_model, KVCacheBuilder.build(gemma_model, CONFIGS["4 bits"]), backend="reference")
    assert reasons.count("fused") == sum(isinstance(cache, FusedKVCache) for cache in caches) == 1
    assert reasons.count("a sliding window") == 3
    logits = step_logits(gemma_model, caches, prompt(30))
    assert np.isfinite(logits).all()
    affine = KVCacheBuilder.build(llama_model, KVCacheConfig(method="affine", code_bits=4, group_size=16))
    assert fuse(llama_model, affine, backend="reference")[1] == ["no fused kernel for affine"] * 3
    observed = KVCacheConfig(method="turboquant_mse", code_bits=4, outlier_observer=KeyNormObserver(), outlier_bits=8)
    observed_caches = KVCacheBuilder.build(llama_model, observed)
    assert fuse(llama_model, observed_caches, backend="reference")[1] == ["tokens at another width"] * 3
    with pytest.raises(ValueError, match="cannot be switched on"):
        fuse(llama_model, affine, mode="on", backend="reference")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"head_dim": 72}, "head_dim .*72"),
        ({"head_dim": 128, "n_heads": 32, "n_kv_heads": 1}, "32 queries per KV head"),
    ],
    ids=["a rotation that the kernel lacks", "more queries than threadgroup memory holds"],
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes_without_a_fused_kernel_are_found_before_the_first_token(
    shape: dict[str, int], reason: str, config: KVCacheConfig
) -> None:
    """The probe learns what the kernel cannot serve: no layer is called fused, and "on" is an error."""
    model = tiny_llama(n_layers=2, **shape)
    caches, reasons = fuse(model, KVCacheBuilder.build(model, config), backend="reference")
    assert [type(cache) for cache in caches] == [PackedKVCache] * 2
    assert all(re.search(reason, said) for said in reasons)
    with pytest.raises(ValueError, match=f"cannot be switched on: no layer has a fused kernel .*{reason}"):
        fuse(model, KVCacheBuilder.build(model, config), mode="on", backend="reference")


def test_a_mask_per_head_is_plain_where_heads_are_as_many_as_sequences(llama_model: Any) -> None:
    """``[1, 2, 1, tokens]`` of two sequences and two query heads is one mask a head, not one a sequence."""
    packed, *_ = KVCacheBuilder.build(llama_model, CONFIGS["4 bits"])
    rng = np.random.default_rng(1)
    keys, values = (mx.array(rng.standard_normal((2, 2, 20, 64)).astype(np.float32)) for _ in range(2))
    cache = FusedKVCache.from_packed(packed, "reference")
    cache.update_and_fetch(keys, values)
    mask = mx.arange(20)[None, None, None] >= mx.array([0, 6])[None, :, None, None]
    cache.attend(mx.ones((2, 2, 1, 64)), 0.125, mask)
    assert cache.steps == {"a mask per head": 1}


def test_a_model_with_attention_sinks_falls_back() -> None:
    """mlx-lm's quantized route refuses attention sinks: the probe finds out, and the plain path is kept."""
    args = gpt_oss.ModelArgs(
        num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1, vocab_size=32, hidden_size=64,
        intermediate_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = gpt_oss.Model(args)
    built = KVCacheBuilder.build(model, CONFIGS["4 bits"])
    caches, reasons = fuse(model, built, backend="reference")
    assert not any(isinstance(cache, FusedKVCache) for cache in caches)
    assert reasons[0] == "a sliding window"
    assert "attention sinks" in reasons[1]


def test_the_probe_leaves_no_trace(llama_model: Any) -> None:
    """Caches are empty after a build, and their observer was told of nothing."""
    observer = DistortionObserver()
    config = KVCacheConfig(
        method="turboquant_mse", code_bits=4, distortion_observer=observer, fused="on", fused_backend="reference"
    )
    caches = KVCacheBuilder.build(llama_model, config)
    assert all(cache.empty() and cache.offset == 0 and not cache.steps for cache in caches)
    assert {cache.attention for cache in caches} == {"fused, not used yet"}
    assert len(observer.report().rows) == 0
    llama_model(prompt(4), cache=caches)
    assert len(observer.report().rows) > 0


def test_the_probe_asks_no_outlier_observer(llama_model: Any) -> None:
    """Beside layers that keep outliers, the others are fused, and the observer has seen no token."""
    observer = KeyNormObserver()
    outliers = KVCacheConfig(method="turboquant_mse", code_bits=4, outlier_observer=observer)
    (first, *_), (_, *rest) = (KVCacheBuilder.build(llama_model, c) for c in (outliers, CONFIGS["4 bits"]))
    _, reasons = fuse(llama_model, [first, *rest], backend="reference")
    assert reasons == ["tokens at another width", "fused", "fused"]
    assert not observer.report().layers


def test_a_fused_cache_saves_as_a_packed_one(llama_model: Any, tmp_path: Any) -> None:
    """Bytes and state are the packed cache's; what is loaded continues with the plain path's logits."""
    config, tokens = CONFIGS["K3V2, sinks, window"], prompt(40)
    caches, _ = fuse(llama_model, KVCacheBuilder.build(llama_model, config), backend="reference")
    plain = KVCacheBuilder.build(llama_model, config)
    for kept in (caches, plain):
        llama_model(tokens, cache=kept)
    assert [cache.nbytes for cache in caches] == [cache.nbytes for cache in plain]
    save_prompt_cache(tmp_path / "cache.safetensors", caches)
    loaded = load_prompt_cache(tmp_path / "cache.safetensors")
    following = mx.array([[5]])
    np.testing.assert_array_equal(
        np.array(llama_model(following, cache=loaded)), np.array(llama_model(following, cache=plain))
    )


def test_a_loaded_cache_is_fused_with_its_model(
    llama_model: Any, gemma_model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """load_prompt_cache decides as the builder does where it is given the model, and says that it was not given one."""
    monkeypatch.setattr(persistence, "fuse", functools.partial(fuse, backend="reference"))
    path, tokens, following = tmp_path / "cache.safetensors", prompt(40), mx.array([[5]])
    plain = KVCacheBuilder.build(llama_model, CONFIGS["4 bits"])
    llama_model(tokens, cache=plain)
    save_prompt_cache(path, plain)
    assert {cache.attention for cache in load_prompt_cache(path)} == {"plain (loaded without its model)"}
    loaded = load_prompt_cache(path, model=llama_model)
    expected, got = (np.array(llama_model(following, cache=caches)) for caches in (plain, loaded))
    assert {cache.attention for cache in loaded} == {"fused 1"}
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(np.std(expected)))  # as in the first test above
    sliding = KVCacheBuilder.build(gemma_model, CONFIGS["4 bits"])
    gemma_model(tokens, cache=sliding)
    save_prompt_cache(path, sliding)
    said = [cache.attention for cache in load_prompt_cache(path, model=gemma_model)]
    assert said == ["plain (a sliding window)"] * 2 + ["fused, not used yet", "plain (a sliding window)"]


@without_metal
def test_a_loaded_cache_says_that_there_is_no_metal(llama_model: Any, tmp_path: Any) -> None:
    """With the model the reason is the machine's."""
    save_prompt_cache(tmp_path / "c.safetensors", KVCacheBuilder.build(llama_model, CONFIGS["4 bits"]))
    loaded = load_prompt_cache(tmp_path / "c.safetensors", model=llama_model)
    assert {cache.attention for cache in loaded} == {"plain (no Metal device)"}


def test_without_the_route_a_fused_cache_fails_loudly(llama_model: Any) -> None:
    """No silent change of path: mlx-lm's own function cannot read a handle."""
    caches, _ = fuse(llama_model, KVCacheBuilder.build(llama_model, CONFIGS["4 bits"]), backend="reference")
    remove_route()
    with pytest.raises(TypeError, match="Handle"):
        llama_model(prompt(4), cache=caches)


def test_other_caches_are_left_alone(llama_model: Any) -> None:
    """mlx-lm's own caches are no packed caches."""
    caches = make_prompt_cache(llama_model)
    assert fuse(llama_model, caches, backend="reference")[1] == ["held by KVCache"] * 3
    assert {type(cache) for cache in caches} == {KVCache}
    copied = copy.deepcopy(caches)
    assert len(copied) == 3


class AttentionBesideAState:
    """Layer 0 has attention in a ``CacheList``, layer 1 by itself."""

    layers = (None, None)

    def make_cache(self) -> list[Any]:
        cache_list: Any = CacheList
        return [cache_list(ArraysCache(1), KVCache()), KVCache()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        x = mx.ones((1, 2, tokens.shape[1], 64))
        cache[0][1].update_and_fetch(x, x)
        keys, values = cache[1].update_and_fetch(x, x)
        out: mx.array = mlx_lm_base.scaled_dot_product_attention(x, keys, values, cache[1], scale=1.0, mask=None)
        return out


def test_the_probe_reports_nothing_of_attention_in_a_list() -> None:
    """The cache in a ``CacheList`` is probed without its observer too, and says why it is plain."""
    model, observer = AttentionBesideAState(), DistortionObserver()
    config = KVCacheConfig(
        method="turboquant_mse", code_bits=4, distortion_observer=observer, fused="on", fused_backend="reference"
    )
    listed, alone = KVCacheBuilder.build(model, config)
    assert listed[1].attention == "plain (held by CacheList)"
    assert alone.attention == "fused, not used yet"
    assert not observer.report().rows


def test_a_batch_says_that_it_is_plain(llama_model: Any, tmp_path: Any) -> None:
    """Sequences of their own lengths are decoded, loaded with or without the model."""
    built = KVCacheBuilder.build(llama_model, CONFIGS["4 bits"])
    save_prompt_cache(tmp_path / "c.safetensors", [PackedKVCache.merge([cache, cache]) for cache in built])
    for model in (None, llama_model):
        loaded = load_prompt_cache(tmp_path / "c.safetensors", model=model)
        assert {cache.attention for cache in loaded} == {"plain (sequences of different lengths)"}


def test_caches_that_are_not_as_many_as_the_models_are_refused(llama_model: Any) -> None:
    """One layer's cache too few is an error with both numbers."""
    with pytest.raises(ValueError, match="caches has 2 entries for a model of 3 layers"):
        fuse(llama_model, KVCacheBuilder.build(llama_model, CONFIGS["4 bits"])[:2], backend="reference")


def words_held(caches: list[Any]) -> list[np.ndarray]:
    return [
        np.array(side.coded.arrays[0][:, :, : side.coded.blocks])
        for cache in caches
        for side in (cache.storage.keys, cache.storage.values)
    ]


@needs_compiler
def test_the_default_model_decodes_through_the_kernel() -> None:
    """SmolLM2-135M's real weights: each step agrees in its token with the plain path from the same stored state, and
    in its logits to 1e-4 of their spread (fp32 rounding through 30 layers measured 8e-5 at most) wherever both
    stored the same codes: a rounding error may push the new token's code over a boundary in either path."""
    from veloxbench.inputs.models import load_model, resolve_model

    model, tokenizer = load_model(resolve_model("smollm2-135m"))
    tokens = mx.array([tokenizer.encode("The key-value cache of a language model holds, for every token it has read,")])
    config = KVCacheConfig(method="turboquant_mse", code_bits=4, fused="on", fused_backend="emulator")
    caches = KVCacheBuilder.build(model, config)
    assert {type(cache) for cache in caches} == {FusedKVCache}
    ours = model(tokens, cache=caches)[:, -1]
    same_codes = 0
    for _ in range(8):
        following = mx.argmax(ours, axis=-1)[:, None]
        plain = [PackedKVCache.from_state(copy.deepcopy(cache.state)) for cache in caches]
        theirs = model(following, cache=plain)[:, -1]
        ours = model(following, cache=caches)[:, -1]
        assert int(mx.argmax(ours)) == int(mx.argmax(theirs))
        if all(np.array_equal(a, b) for a, b in zip(words_held(caches), words_held(plain), strict=True)):
            same_codes += 1
            assert float(mx.max(mx.abs(ours - theirs))) < 1e-4 * float(mx.std(theirs))
    assert same_codes >= 4
    assert {cache.attention for cache in caches} == {"fused 8, plain 1 (several new tokens)"}
