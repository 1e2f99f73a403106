"""Facts that seeded edits of the sources (tests/mutate_sources.py) showed no other check to hold."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gaussian

from veloxquant_kernels.codebook import nearest_codes
from veloxquant_mlx.allocators.sensitivity import calibration_sequences
from veloxquant_mlx.cache.base import KVCacheConfig, PackedKVCache
from veloxquant_mlx.cache.storage import STEP
from veloxquant_mlx.observers.key_norm import KeyNormObserver, KeyNormTracker, Tail
from veloxquant_mlx.quantizers.lloyd_max import sphere_codebook
from veloxquant_mlx.quantizers.turboquant_prod import cosine_similarity


@pytest.mark.parametrize("method", ["turboquant_mse", "kivi"])
def test_a_sliding_layer_frees_once_a_step_is_dead_and_not_before(method: str) -> None:
    """Tokens behind the window are freed, when others come, once 256 of them fill whole blocks: of 1 token, or 32."""
    window = 64
    config = KVCacheConfig(method=method, code_bits=4, window=0)
    cache = PackedKVCache(config.layer_spec(0, None, None, window))
    block = cache.spec.keys.block_tokens
    x = mx.array(gaussian((1, 1, 32, 64), 0)).astype(mx.float16)
    held = 0
    for _ in range(40):
        if (held - window) // block * block >= STEP:
            held -= (held - window) // block * block
        cache.update_and_fetch(x, x)
        held += 32
        assert cache.storage.keys.tokens == held


def test_a_zero_vector_is_like_another_zero_vector_only() -> None:
    """Cosine 1 between zeros; 0 between a zero vector and one that has a zero coordinate among others."""
    zero, unit = mx.zeros((1, 4)), mx.array([[1.0, 0.0, 0.0, 0.0]])
    assert cosine_similarity(zero, zero).item() == 1.0
    assert cosine_similarity(zero, unit).item() == 0.0
    assert cosine_similarity(unit, zero).item() == 0.0


@pytest.mark.parametrize(("num_samples", "seq_len"), [(0, 32), (-1, 32), (4, 1), (4, 0)])
def test_each_size_of_a_calibration_is_checked_by_itself(num_samples: int, seq_len: int) -> None:
    """No sequences, or sequences of one token, are refused with both figures, whatever the other figure is."""
    with pytest.raises(ValueError, match=f"num_samples={num_samples} and seq_len={seq_len} must be at least 1 and 2"):
        calibration_sequences(None, ["a text"], num_samples=num_samples, seq_len=seq_len)


@pytest.mark.parametrize("levels", [4, 16, 64])
@pytest.mark.parametrize("repeats", [1, 1 << 17])
def test_a_value_on_a_boundary_takes_the_lower_code_on_every_path(levels: int, repeats: int) -> None:
    """The code is the number of boundaries below a value: few values, a chain of comparisons and the grid agree."""
    codebook = sphere_codebook(64, levels)
    edges = codebook.boundaries.astype(np.float32)
    values = np.tile(edges, max(1, repeats // len(edges) * 4))
    codes = np.array(nearest_codes(mx.array(values), codebook))
    assert np.array_equal(codes, np.tile(np.arange(levels - 1), len(values) // len(edges)))


def test_outlier_bits_without_an_observer_are_refused() -> None:
    """Nothing would flag tokens: the width would be ignored without a word."""
    with pytest.raises(ValueError, match="outlier_bits needs an outlier_observer"):
        KVCacheConfig(method="turboquant_mse", outlier_bits=8)


@pytest.mark.parametrize("threshold", [0.1, 1.0, 3.0])
def test_any_threshold_above_zero_is_one(threshold: float) -> None:
    """A norm half a standard deviation from the mean may be called an outlier; one at zero or below it may not."""
    assert KeyNormObserver(outlier_threshold=threshold).outlier_threshold == threshold
    with pytest.raises(ValueError, match="above 0, got 0"):
        KeyNormObserver(outlier_threshold=0.0)


def test_an_observer_attached_to_a_loaded_cache_has_its_whole_window() -> None:
    """A cache saved after 20 tokens and loaded goes on to 64 norms, not to the 20 that were saved."""
    observer = KeyNormObserver(window_size=64)
    keys = mx.array(gaussian((1, 1, 20, 8), 0))
    saved = observer.tracker(0)
    saved.flag(keys)
    loaded = KeyNormTracker(None, 0)
    loaded.load_norms(saved.norms())
    loaded.attach(observer)
    for tracker in (saved, loaded):
        for _ in range(3):
            tracker.flag(keys)
    norms = loaded.norms()
    assert norms is not None
    assert norms.shape == (1, 64)
    assert np.array_equal(np.array(norms), np.array(saved.norms()))


@pytest.mark.parametrize("tail", ["high", "low", "both"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_norms_hold_no_outlier(tail: Tail, value: float) -> None:
    """Without any deviation no norm lies beyond a bound, and zeros, which lie on both, are no outliers either."""
    keys = value * mx.concatenate([mx.ones((1, 1, 60, 1)), mx.zeros((1, 1, 60, 7))], axis=-1)
    observer = KeyNormObserver(tail=tail)
    assert not observer.tracker(0).flag(keys).any()
