"""The default model with its real weights: mlx-lm's front doors, and the guide's calls."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from veloxbench.inputs.models import load_model, resolve_model
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.observers.key_norm import KeyNormObserver

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(resolve_model("smollm2-135m"))


def answer(loaded: tuple[Any, Any], caches: list[Any], text: str = PROMPT) -> str:
    model, tokenizer = loaded
    return str(mlx_lm.generate(model, tokenizer, prompt=text, max_tokens=8, prompt_cache=caches))


def test_eight_bits_answer_like_fp16(loaded: tuple[Any, Any]) -> None:
    """mlx_lm.generate gives the fp16 cache's answer from an 8-bit cache at half the bytes, held by every layer."""
    caches = KVCacheBuilder.build(loaded[0], KVCacheConfig(method="turboquant_mse", code_bits=8))
    assert answer(loaded, caches) == answer(loaded, make_prompt_cache(loaded[0]))
    assert len(caches) == 30
    assert all(isinstance(cache, PackedKVCache) and cache.bits_per_value() == 8.25 for cache in caches)


def test_streaming_and_a_second_turn_continue_the_cache(loaded: tuple[Any, Any]) -> None:
    """stream_generate through the same cache appends; both turns agree with the fp16 cache's."""
    model, tokenizer = loaded
    turns = []
    for caches in (
        KVCacheBuilder.build(model, KVCacheConfig(method="turboquant_mse", code_bits=8)),
        make_prompt_cache(model),
    ):
        texts = []
        for question in ("What is the capital of Italy?", "And of Spain?"):
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
            stream = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=6, prompt_cache=caches)
            texts.append("".join(part.text for part in stream))
        turns.append((texts, caches[0].size()))
    assert turns[0] == turns[1]


def test_batch_generation_answers_like_single_generation(loaded: tuple[Any, Any]) -> None:
    """mlx_lm.batch_generate with our caches per prompt answers as one prompt by itself would.

    A batch rounds otherwise, which may turn the choice between two tokens that are all but equal. Each token that the
    batch chose is therefore the best one of a single pass, or behind it by less than 8 bits themselves move a logit.
    """
    model, tokenizer = loaded
    prompts = [tokenizer.encode(text) for text in (PROMPT, "Water boils at one hundred degrees, and it")]
    config = KVCacheConfig(method="turboquant_mse", code_bits=8)
    response = mlx_lm.batch_generate(
        model,
        tokenizer,
        prompts,
        prompt_caches=[KVCacheBuilder.build(model, config) for _ in prompts],
        max_tokens=8,
        return_token_ids=True,
    )
    for prompt, chosen in zip(prompts, response.token_ids, strict=True):
        assert len(chosen) == 8
        fed = mx.array([prompt + chosen[:-1]])
        single, exact = (
            np.array(model(fed, cache=caches)[0, len(prompt) - 1 :])
            for caches in (KVCacheBuilder.build(model, config), make_prompt_cache(model))
        )
        behind = single.max(axis=-1) - single[np.arange(8), chosen]
        assert behind.max() < np.abs(single - exact).max() < 0.5  # logits are up to 36


def test_the_guides_mixed_allocation_names_layer_30(loaded: tuple[Any, Any]) -> None:
    """The guide's dict for 32 layers, run verbatim on this model of 30 layers, is an error that names layer_30."""
    bit_allocation = {f"layer_{i}": 1 for i in range(32)}
    for i in range(8, 17):
        bit_allocation[f"layer_{i}"] = 4
    config = KVCacheConfig(method="ratequant", bit_allocation=bit_allocation, value_bits=2)
    with pytest.raises(ValueError, match=r"'layer_30', 'layer_31', but the model has 30 layers"):
        KVCacheBuilder.build(loaded[0], config)


def test_the_guides_mixed_allocation_with_outliers(loaded: tuple[Any, Any]) -> None:
    """Scaled to the model's layers, the guide's second snippet runs, and its report has its three figures."""
    n_layers = len(loaded[0].layers)
    bit_allocation = {f"layer_{i}": 1 for i in range(n_layers)}
    for i in range(8, 17):
        bit_allocation[f"layer_{i}"] = 4
    mixed = KVCacheBuilder.build(
        loaded[0], KVCacheConfig(method="ratequant", bit_allocation=bit_allocation, value_bits=2)
    )
    answer(loaded, mixed)
    keys = [4 if 8 <= i < 17 else 1 for i in range(n_layers)]
    assert [float(cache.bits_per_value()) for cache in mixed] == [(k + 2) / 2 + 0.25 for k in keys]
    observer = KeyNormObserver(outlier_threshold=3.0, window_size=256)
    config = KVCacheConfig(method="ratequant", bit_allocation=bit_allocation, outlier_observer=observer, outlier_bits=8)
    caches = KVCacheBuilder.build(loaded[0], config)
    answer(loaded, caches, PROMPT * 8)
    report = observer.report()
    assert [row.layer for row in report.layers] == list(range(n_layers))
    assert all(row.token_count == cache.offset for row, cache in zip(report.layers, caches, strict=True))
    assert report.outlier_count == sum(row.outlier_count for row in report.layers)
    assert 0 <= report.outlier_fraction < 0.2
    if report.outlier_count:
        assert report.mean_outlier_norm > 0
    for cache in caches:
        in_use = sum(h.array.nbytes * h.used_slots / h.slots for h in cache.held_arrays())
        assert in_use == cache.formula_nbytes()
