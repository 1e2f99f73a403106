"""Models with layers that are not plain attention: what can be packed is, the rest keeps mlx-lm's own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import lfm2_of, seeded
from mlx_lm.generate import generate_step
from mlx_lm.models import falcon_h1
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from veloxquant_mlx.cache.base import (
    KVCacheBuilder,
    KVCacheConfig,
    PackedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from veloxquant_mlx.cache.fused import fuse, fused_route

HALF_PRECISION = 4e-3
"""Relative error of logits when K and V are fp16 in an fp32 model."""


@pytest.fixture(scope="module")
def convolutional() -> Any:
    """An lfm2 with attention in layers 1 and 3 and short convolutions in 0 and 2."""
    blocks = {"block_dim": 96, "block_multiple_of": 32, "block_ff_dim": 192}
    model = lfm2_of(hidden_size=96, num_hidden_layers=4, num_attention_heads=6, full_attn_idxs=[1, 3], **blocks)
    return seeded(model, 3)


@pytest.fixture(scope="module")
def hybrid() -> Any:
    """A falcon_h1 of two layers with attention and a state space side by side."""
    args = falcon_h1.ModelArgs(
        hidden_size=96,
        intermediate_size=192,
        head_dim=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vocab_size=128,
        mamba_d_ssm=64,
        mamba_d_head=32,
        mamba_n_heads=2,
        mamba_d_state=16,
    )
    return seeded(falcon_h1.Model(args), 4)


def agrees(model: Any, config: KVCacheConfig) -> None:
    """Chunked logits with our caches equal mlx-lm's to half precision."""
    ids = mx.array(np.random.default_rng(0).integers(0, 128, (1, 30)))
    ours, theirs = KVCacheBuilder.build(model, config), make_prompt_cache(model)
    for start, stop in ((0, 20), (20, 29), (29, 30)):
        got, expected = (model(ids[:, start:stop], cache=cache) for cache in (ours, theirs))
        assert (mx.linalg.norm(got - expected) / mx.linalg.norm(expected)).item() < HALF_PRECISION


def test_convolution_layers_keep_their_own_cache(convolutional: Any, tmp_path: Path) -> None:
    """Attention layers are packed, convolutions keep ArraysCache; logits agree; both kinds save and load."""
    caches = KVCacheBuilder.build(convolutional, KVCacheConfig(method="turboquant_mse"))
    assert [type(cache) for cache in caches] == [ArraysCache, PackedKVCache, ArraysCache, PackedKVCache]
    agrees(convolutional, KVCacheConfig(method="turboquant_mse", window=100))
    prompt = mx.array(np.random.default_rng(0).integers(0, 128, 20))
    list(generate_step(prompt, convolutional, max_tokens=3, prompt_cache=caches))
    save_prompt_cache(tmp_path / "c.safetensors", caches)
    loaded = load_prompt_cache(tmp_path / "c.safetensors")
    ids = mx.array([[5, 6]])
    assert mx.array_equal(convolutional(ids, cache=loaded), convolutional(ids, cache=caches))


@pytest.mark.parametrize("n_batch", [1, 2])
def test_attention_beside_a_filled_convolution_is_fused(convolutional: Any, tmp_path: Path, n_batch: int) -> None:
    """Whether loaded caches can be fused does not depend on how many sequences a convolution's state is of."""
    caches = KVCacheBuilder.build(convolutional, KVCacheConfig(method="turboquant_mse"))
    convolutional(mx.array(np.random.default_rng(0).integers(0, 128, (n_batch, 20))), cache=caches)
    save_prompt_cache(tmp_path / "c.safetensors", caches)
    with fused_route():
        _, reasons = fuse(convolutional, load_prompt_cache(tmp_path / "c.safetensors"), backend="reference")
    assert reasons == ["held by ArraysCache", "fused"] * 2


def test_an_allocation_covers_the_layers_that_can_be_packed(convolutional: Any) -> None:
    """layer_1 and layer_3 suffice; naming a convolution is an error that names it."""
    config = KVCacheConfig(method="ratequant", bit_allocation={"layer_1": 2, "layer_3": 4})
    caches = KVCacheBuilder.build(convolutional, config)
    assert [caches[i].spec.keys.code_bits for i in (1, 3)] == [2, 4]
    wrong = KVCacheConfig(method="ratequant", bit_allocation={f"layer_{i}": 2 for i in range(4)})
    with pytest.raises(ValueError, match=r"'layer_0', 'layer_2', but the model has 4 layers .* 2 of which"):
        KVCacheBuilder.build(convolutional, wrong)


def test_attention_beside_a_state_space_is_packed(hybrid: Any, tmp_path: Path) -> None:
    """Inside a CacheList the attention cache is packed and the state stays; logits agree; it saves and loads."""
    caches = KVCacheBuilder.build(hybrid, KVCacheConfig(method="turboquant_mse"))
    for cache in caches:
        assert isinstance(cache, CacheList)
        assert [type(part) for part in cache.caches] == [ArraysCache, PackedKVCache]
    agrees(hybrid, KVCacheConfig(method="turboquant_mse", window=100))
    ids = mx.array([[5, 6, 7]])
    hybrid(ids, cache=caches)
    save_prompt_cache(tmp_path / "c.safetensors", caches)
    loaded = load_prompt_cache(tmp_path / "c.safetensors")
    assert mx.array_equal(hybrid(ids, cache=loaded), hybrid(ids, cache=caches))


def test_a_rotating_cache_that_keeps_its_first_tokens_stays(llama_model: Any) -> None:
    """A window that keeps leading tokens is not of the two kinds that can be packed: the model's own cache stays."""

    class Keeping:
        layers = llama_model.layers

        def make_cache(self) -> list[Any]:
            return [RotatingKVCache(max_size=16, keep=4), RotatingKVCache(max_size=16), KVCache()]

    built = KVCacheBuilder.build(Keeping(), KVCacheConfig(method="turboquant_mse"))
    assert [type(cache) for cache in built] == [RotatingKVCache, PackedKVCache, PackedKVCache]
