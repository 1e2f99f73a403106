"""What a cache holds, and that nothing it holds can stay uncounted."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import lfm2
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from veloxbench.errors import EngagementError
from veloxbench.measure import account
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.methods.cache_under_test import CacheUnderTest
from veloxquant_mlx.cache.packed import LayerSpec, PackedKVCache
from veloxquant_mlx.quantizers.per_head import PerHead
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_prod import TurboQuantProdAdaptive


def _filled(inner, tokens: int, head_dim: int = 64) -> CacheUnderTest:
    cache = CacheUnderTest(inner)
    x = mx.array(np.random.default_rng(0).standard_normal((2, 3, tokens, head_dim)).astype(np.float32))
    mx.eval(cache.update_and_fetch(x, x))
    return cache


@pytest.mark.parametrize("tokens", [1, 255, 256, 257])
def test_fp16_reads_exactly_sixteen_bits_at_any_fill(tokens):
    """Used bytes follow the tokens, allocated bytes the buffer's steps of 256."""
    [layer] = account.engagement([_filled(KVCache(), tokens)], [True], KVCache)
    assert account.bits_per_value([layer]) == 16.0
    assert account.allocated_bits_per_value([layer]) == 16.0 * -(-tokens // 256) * 256 / tokens


def test_affine_costs_its_scales_and_biases():
    """Four bits in groups of 64 with fp16 scale and bias are 4.5 bits per value (field's own formula)."""
    [layer] = account.engagement([_filled(QuantizedKVCache(group_size=64, bits=4), 100)], [True], QuantizedKVCache)
    assert account.bits_per_value([layer]) == 4.5
    assert (layer.key_bits, layer.value_bits) == (4.0, 4.0)
    assert layer.stored_dtypes == ["float16", "uint32"]


def test_heads_of_different_widths_report_their_mean():
    """Keys at 2, 4 and 3 bits and values at 1, 1 and 2 engage at 3 and 4/3 bits; a width per block has no figure."""
    heads = [tuple(TurboQuantMSE(bits) for bits in widths) for widths in ((2, 4, 3), (1, 1, 2))]
    cache = PackedKVCache(LayerSpec(PerHead(heads[0]), PerHead(heads[1])))
    [layer] = account.engagement([_filled(cache, 10)], [True], PackedKVCache)
    assert (layer.key_bits, layer.value_bits) == (3.0, 4 / 3)
    adaptive = PackedKVCache(LayerSpec(TurboQuantProdAdaptive(), TurboQuantMSE(2)))
    assert account.code_bits(adaptive) == (None, 2.0)


def test_a_rotating_cache_counts_what_it_still_holds():
    """After 40 tokens a window of 16 holds 16 (mlx-lm's own size)."""
    cache = _filled(RotatingKVCache(max_size=16), 8)
    for _ in range(32):
        cache.update_and_fetch(mx.zeros((2, 3, 1, 64)), mx.zeros((2, 3, 1, 64)))
    [layer] = account.engagement([cache], [True], RotatingKVCache)
    assert layer.tokens == 16
    assert account.bits_per_value([layer]) == 16.0


def test_a_hidden_copy_is_found():
    """A cache whose own account leaves an array out is an error that names the array."""

    class Hiding(KVCache):
        def held_arrays(self):
            return [SimpleNamespace(name="keys", array=self.keys, used_slots=self.offset, slots=self.keys.shape[2])]

        def static_arrays(self):
            return []

    with pytest.raises(EngagementError, match="values"):
        account.engagement([_filled(Hiding(), 10)], [True], Hiding)


def test_a_claimed_layer_in_another_class_is_an_error():
    """fp16 where the method claims quantized storage is an error, not a result."""
    with pytest.raises(EngagementError, match="layer 0 is held by KVCache"):
        account.engagement([_filled(KVCache(), 10)], [True], QuantizedKVCache)


def test_a_claimed_layer_that_stored_nothing_is_an_error():
    """A cache that no token reached did not take part."""
    with pytest.raises(EngagementError, match="with 0 tokens"):
        account.engagement([CacheUnderTest(KVCache())], [True], KVCache)


def test_the_adapter_keeps_mlx_lms_choice_of_attention():
    """``bits`` and ``group_size`` show through for a quantized cache, and are absent for a plain one."""
    quantized = _filled(QuantizedKVCache(group_size=32, bits=8), 4)
    assert (quantized.bits, quantized.group_size) == (8, 32)
    plain = _filled(KVCache(), 4)
    assert not hasattr(plain, "bits")
    queries = mx.ones((2, 3, 1, 64))
    stored = quantized.inner.keys_and_values()
    out = scaled_dot_product_attention(queries, *stored, cache=quantized, scale=1.0, mask=None)
    reference = scaled_dot_product_attention(queries, *plain.inner.keys_and_values(), cache=plain, scale=1.0, mask=None)
    np.testing.assert_allclose(np.array(out), np.array(reference), atol=0.05)  # half a step of 8 bits, amplified


def test_a_hybrid_model_reads_and_writes_its_other_states():
    """A convolution layer keeps ``cache[0]``: in fp16, where the cast changes nothing, logits are those without us."""
    sizes = {
        "model_type": "lfm2", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "norm_eps": 1e-5, "conv_bias": False,
        "conv_L_cache": 3, "block_dim": 32, "block_ff_dim": 32, "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1],
    }  # fmt: skip
    mx.random.seed(0)
    model = lfm2.Model(lfm2.ModelArgs.from_dict(sizes))
    model.set_dtype(mx.float16)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 17)).astype(np.int32)
    protocol = Chunked(2, 16, chunk=4, score_from=4)
    bare, wrapped = make_prompt_cache(model), [CacheUnderTest(cache) for cache in make_prompt_cache(model)]
    for theirs, ours in zip(feed(model, bare, tokens, protocol), feed(model, wrapped, tokens, protocol), strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            np.testing.assert_array_equal(np.array(theirs.logits), np.array(ours.logits))
    convolution, attention = account.engagement(wrapped, [False, True], KVCache)
    assert (convolution.cache_class, convolution.n_values) == ("ArraysCache", 0)
    assert (attention.tokens, account.bits_per_value([attention])) == (16, 16.0)
