"""Gradient sensitivities through unedited mlx-lm models."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gemma3_of, lfm2_of, llama_of
from mlx.utils import tree_map

from veloxquant_mlx.allocators.ratequant import Sensitivities, calibrate_layer_sensitivities
from veloxquant_mlx.allocators.sensitivity import (
    HeadSensitivities,
    Provenance,
    bundled_texts,
    calibration_sequences,
    probe_layers,
    sequence_gradients,
    sequence_loss,
)

VOCABULARY = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


class ByteTokenizer:
    """Text to bytes modulo a small vocabulary, with or without a BOS of id 0."""

    def __init__(self, bos: bool = False):
        self.bos_token_id = 0 if bos else None

    def encode(self, text: str, *, verbose: bool = True) -> list[int]:
        return [0] * (self.bos_token_id is not None) + [1 + b % (VOCABULARY - 1) for b in text.encode()]


def randomised(model, seed=0, scale=0.25):
    """The model with Gaussian weights from NumPy, large enough that attention is not uniform."""
    rng = np.random.default_rng(seed)
    model.update(
        tree_map(
            lambda p: mx.array(rng.normal(0, scale, p.shape).astype(np.float32)) if p.ndim > 1 else p,
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model


def tiny_llama(seed=0):
    return randomised(llama_of(intermediate_size=48, **SIZES), seed)


def calibrate(model, **options):
    fields = {"num_samples": 3, "seq_len": 24, "kept_sequences": 3, "quiet": True}
    return calibrate_layer_sensitivities(model, ByteTokenizer(), **(fields | options))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def sensitivities(model):
    return calibrate(model)


def the(sensitivities, layer, kind):
    return next(h for h in sensitivities.heads if (h.layer, h.kind) == (layer, kind))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_gradients_agree_with_central_differences(model, layer, kind, rank):
    """dL/dx of the entries of largest and sixth largest gradient equals a difference quotient of the loss."""
    tokens = mx.array(calibration_sequences(ByteTokenizer(), bundled_texts(), num_samples=3, seq_len=24)[0])
    layers = probe_layers(model)
    _, seen = sequence_loss(model, tokens, None, layers)
    _, all_gradients = sequence_gradients(model, tokens, layers)
    gradients = np.array(all_gradients[2 * layer + (kind == "values")][0])
    position = np.unravel_index(np.argsort(-np.abs(gradients), axis=None)[rank], gradients.shape)
    h = 0.03

    def loss(step):
        deltas = [[np.zeros(k.shape, np.float32), np.zeros(v.shape, np.float32)] for k, v in seen]
        deltas[layer][kind == "values"][0][position] = step
        value, _ = sequence_loss(model, tokens, [(mx.array(k), mx.array(v)) for k, v in deltas], layers)
        return value.item()

    # Richardson's combination of steps h and 2h: truncation h^4, rounding about 4 ulp of the loss over h.
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    rounding = 4 * float(np.spacing(np.float32(loss(0.0)))) / h
    assert abs(gradients[position]) > 20 * rounding
    assert difference == pytest.approx(gradients[position].item(), rel=0.01, abs=rounding)


@pytest.fixture(scope="module")
def gradients(model):
    """Keys and values of each layer in turn, ``[1, H, T, D]`` of the first calibration sequence."""
    tokens = calibration_sequences(ByteTokenizer(), bundled_texts(), num_samples=3, seq_len=24)[0]
    _, result = sequence_gradients(model, mx.array(tokens), probe_layers(model))
    return [np.array(g, dtype=np.float64) for g in result]


def test_weights_are_the_mean_squared_gradient_per_token(sensitivities, gradients):
    """w = (1/T) sum over tokens of the squared norm of dL/dk (RateQuant, section 3)."""
    for head, gradient in zip(sensitivities.heads, gradients, strict=True):
        squares = (gradient[0] ** 2).sum(axis=-1)
        np.testing.assert_allclose(head.squared_gradients[0], squares, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(head.weights[0], squares.mean(axis=-1), rtol=1e-5)
        assert (head.weights > 0).all()


def test_key_gradients_of_a_head_sum_to_zero(gradients):
    """Softmax ignores one vector added to every key, so the gradients of a head's keys cancel over tokens."""
    for gradient in gradients[::2]:
        assert np.abs(gradient.sum(axis=2)).max() < 1e-4 * np.abs(gradient).sum(axis=2).max()


def test_the_last_token_is_never_read_by_a_prediction(sensitivities):
    """T tokens give T - 1 predictions; the last key and value can influence none."""
    for head in sensitivities.heads:
        assert (head.squared_gradients[:, :, -1] == 0).all()


def test_kept_vectors_are_what_the_model_caches(model, sensitivities):
    """The sample equals the fp16 cast of mlx-lm's own cache after the same sequence."""
    from mlx_lm.models.cache import make_prompt_cache

    tokens = calibration_sequences(ByteTokenizer(), bundled_texts(), num_samples=3, seq_len=24)[1]
    cache = make_prompt_cache(model)
    model(mx.array(tokens)[None], cache=cache)
    for layer in range(3):
        for kind, stored in zip(("keys", "values"), cache[layer].keys_and_values(), strict=True):
            expected = np.array(stored[0].astype(mx.float16))
            np.testing.assert_array_equal(np.array(the(sensitivities, layer, kind).vectors[1]), expected)


def test_same_model_and_text_give_the_same_result(model, sensitivities):
    again = calibrate(model)
    assert again.provenance == sensitivities.provenance
    for a, b in zip(again.heads, sensitivities.heads, strict=True):
        np.testing.assert_array_equal(a.weights, b.weights)


def test_other_text_gives_other_weights_and_another_hash(model, sensitivities):
    other = calibrate(model, texts=["the quick brown fox jumps over the lazy dog. " * 20])
    assert other.provenance.text_sha256 != sensitivities.provenance.text_sha256
    assert other.provenance.model_sha256 == sensitivities.provenance.model_sha256
    for a, b in zip(other.heads, sensitivities.heads, strict=True):
        assert not np.allclose(a.weights.mean(axis=0), b.weights.mean(axis=0), rtol=1e-3)


def test_other_parameters_give_other_weights_and_another_hash(sensitivities):
    other = calibrate(tiny_llama(seed=1))
    assert other.provenance.text_sha256 == sensitivities.provenance.text_sha256
    assert other.provenance.model_sha256 != sensitivities.provenance.model_sha256
    for a, b in zip(other.heads, sensitivities.heads, strict=True):
        assert not np.allclose(a.weights.mean(axis=0), b.weights.mean(axis=0), rtol=1e-3)


def test_kept_sequences_are_spread_over_the_texts_and_come_first(model):
    """Of 4 sequences, keeping 2 puts the first and the third first."""
    result = calibrate(model, num_samples=4, kept_sequences=2)
    every = calibrate(model, num_samples=4, kept_sequences=4)
    for a, b in zip(result.heads, every.heads, strict=True):
        assert a.vectors.shape[0] == 2
        np.testing.assert_allclose(a.squared_gradients, b.squared_gradients[[0, 2, 1, 3]], rtol=1e-5)
        assert mx.array_equal(a.vectors, b.vectors[mx.array([0, 2])])


def test_more_kept_sequences_than_samples_is_an_error(model):
    with pytest.raises(ValueError, match=r"kept_sequences=4 must lie in 1\.\.num_samples=3"):
        calibrate(model, kept_sequences=4)


def test_saved_sensitivities_load_unchanged(sensitivities, tmp_path):
    """All arrays come back bit for bit."""
    sensitivities.save(tmp_path / "s.safetensors")
    loaded = Sensitivities.load(tmp_path / "s.safetensors")
    assert loaded.provenance == sensitivities.provenance
    for a, b in zip(loaded.heads, sensitivities.heads, strict=True):
        assert (a.layer, a.kind, a.max_size) == (b.layer, b.kind, b.max_size)
        np.testing.assert_array_equal(a.squared_gradients, b.squared_gradients)
        assert mx.array_equal(a.vectors, b.vectors)
        assert mx.array_equal(a.gradients, b.gradients)


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_a_weight_that_is_no_weight_is_named(value):
    squares = np.ones((2, 2, 4))
    squares[1, 1, 2] = value
    head = HeadSensitivities(5, "values", squares, mx.zeros((2, 2, 4, 8)), mx.zeros((2, 2, 4, 8)))
    with pytest.raises(ValueError, match=rf"layer_5\.values\.head_1 .* got {value}"):
        Sensitivities((head,), Provenance("", "", 2, 4, "llama", 6))


def test_a_model_with_broken_parameters_is_an_error():
    """NaN in the second layer's key projection: no allocation from NaN gradients."""
    model = tiny_llama()
    model.layers[1].self_attn.k_proj.weight = model.layers[1].self_attn.k_proj.weight * float("nan")
    with pytest.raises(ValueError, match=r"layer_0\.keys\.head_0 .* got nan"):
        calibrate(model)


def test_sliding_window_layers_are_probed_with_their_own_mask():
    """gemma3 with a window of 8 on 24 tokens: the probed loss is that of the model with its own caches."""
    windows = {"sliding_window": 8, "sliding_window_pattern": 2}
    sizes = {**SIZES, "num_hidden_layers": 2}
    model = randomised(gemma3_of(intermediate_size=48, head_dim=16, **sizes, **windows))
    assert [head.max_size for head in calibrate(model).heads] == [8, 8, None, None]
    tokens = mx.array(calibration_sequences(ByteTokenizer(), bundled_texts(), num_samples=1, seq_len=24)[0])
    loss, _ = sequence_loss(model, tokens, None, probe_layers(model))
    logits = model(tokens[None], cache=model.make_cache())[0, :-1]
    expected = -sum((logits[t, int(tokens[t + 1])] - mx.logsumexp(logits[t])).item() for t in range(23))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_layers_without_keys_and_values_keep_their_own_cache():
    """lfm2 mixes convolutions and attention: only the attention layers are units, and the pass still runs."""
    blocks = {"block_dim": 32, "block_ff_dim": 48, "block_multiple_of": 8}
    model = lfm2_of(full_attn_idxs=[1], rope_theta=10000.0, **SIZES, **blocks)
    result = calibrate(randomised(model))
    assert result.layers == (1,)
    assert result.provenance.n_layers == 3
    assert all((head.weights > 0).all() for head in result.heads)


def test_sequences_are_spread_over_all_texts_and_start_with_the_bos():
    """Two documents of 100 bytes, BOS, 4 sequences of 21: two from each, BOS first, no document crossed."""
    sequences = calibration_sequences(ByteTokenizer(bos=True), ["a" * 100, "b" * 100], num_samples=4, seq_len=21)
    assert sequences.shape == (4, 21)
    assert (sequences[:, 0] == 0).all()
    assert [len(set(row[1:].tolist())) for row in sequences] == [1] * 4
    assert sequences[:2, 1].tolist() == [1 + ord("a") % 63] * 2
    assert sequences[2:, 1].tolist() == [1 + ord("b") % 63] * 2


def test_texts_too_short_say_how_many_sequences_they_hold():
    with pytest.raises(ValueError, match=r"num_samples=9: texts hold only 5 sequences of 20"):
        calibration_sequences(ByteTokenizer(), ["a" * 100, "b" * 10], num_samples=9, seq_len=20)


def test_one_string_in_place_of_documents_is_refused():
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        calibration_sequences(ByteTokenizer(), "a" * 100, num_samples=1, seq_len=20)


def test_the_bundled_text_is_small_and_has_nine_documents():
    """At most 60 kB in the wheel; every excerpt of some length."""
    texts = bundled_texts()
    assert len(texts) == 9
    assert 40_000 < sum(len(text.encode()) for text in texts) <= 60_000
    assert min(len(text) for text in texts) > 5_000
