"""Observers see what the caches store, and outlier tokens are kept at their own width."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import ALL_METHODS, gaussian
from mlx_lm.models.cache import CacheList

from veloxquant_mlx.cache.base import (
    KVCacheBuilder,
    KVCacheConfig,
    PackedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.quantizers.lloyd_max import SphereMarginal, lloyd_max
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

OUTLIERS = [70, 130, 131]


def keys_with_outliers(n: int = 200, factor: float = 5.0, n_batch: int = 1) -> mx.array:
    """Gaussian keys of two heads whose tokens 70, 130 and 131 are ``factor`` times as long."""
    keys = gaussian((n_batch, 2, n, 64), seed=1)
    keys[:, :, OUTLIERS] *= np.float32(factor)
    return mx.array(keys).astype(mx.float16)


def outlier_config(method: str, observer: KeyNormObserver, **fields: Any) -> KVCacheConfig:
    options = {**ALL_METHODS[method], **fields}
    return KVCacheConfig(method=method, outlier_observer=observer, outlier_bits=8, **options)


def strict() -> KeyNormObserver:
    """Five deviations: 200 Gaussian tokens do not reach that by chance (5.7e-7 each)."""
    return KeyNormObserver(outlier_threshold=5.0, window_size=256)


@pytest.mark.parametrize("chunks", [[200], [1] * 200, [64, 64, 64, 8], [71, 59, 70]])
def test_three_injected_tokens_are_exactly_the_outliers(chunks: list[int]) -> None:
    """However the tokens arrive, tokens 70, 130 and 131 are flagged and no other."""
    tracker = strict().tracker(0)
    keys = keys_with_outliers()
    flags, start = [], 0
    for chunk in chunks:
        flags.append(tracker.flag(keys[:, :, start : start + chunk]))
        start += chunk
    assert np.flatnonzero(np.concatenate(flags, axis=1)[0]).tolist() == OUTLIERS


@pytest.mark.parametrize("method", ALL_METHODS)
def test_flagged_tokens_are_kept_at_outlier_bits(llama_model: Any, method: str) -> None:
    """In a cache of any method the three outliers decode with 8-bit error, the rest as without observer."""
    observer = strict()
    cache = KVCacheBuilder.build(llama_model, outlier_config(method, observer, window=0))[0]
    plain = KVCacheBuilder.build(llama_model, KVCacheConfig(method=method, **{**ALL_METHODS[method], "window": 0}))[0]
    keys, values = keys_with_outliers(), mx.array(gaussian((1, 2, 200, 64), seed=2)).astype(mx.float16)
    got = cache.update_and_fetch(keys, values)
    without = plain.update_and_fetch(keys, values)
    held = {h.name: h for h in cache.held_arrays()}
    assert np.array(held["outliers.positions"].array)[0, 0, :3].tolist() == [[0, t] for t in OUTLIERS]
    assert held["outliers.positions"].used_slots == 3
    others = np.setdiff1d(np.arange(200), OUTLIERS)
    for x, fetched, base in zip((keys, values), got, without, strict=True):
        error = np.array(fetched - x)[:, :, OUTLIERS]
        size = np.array(x.astype(mx.float32))[:, :, OUTLIERS]
        assert np.sum(error**2) / np.sum(size**2) < 4e-4  # Prod, the coarsest 8-bit code here, leaves 2.5e-4
        np.testing.assert_array_equal(np.array(fetched)[:, :, others], np.array(base)[:, :, others])
    extra = cache.formula_nbytes() - plain.formula_nbytes()
    widths = [q.bits_per_value(64) for q in (cache.spec.outlier_keys, cache.spec.outlier_values)]
    assert extra == 3 * 8 + 3 * 2 * 64 * sum(widths) / 8
    in_use = sum(h.array.nbytes * h.used_slots / h.slots for h in cache.held_arrays())
    assert in_use == cache.formula_nbytes()


def test_the_report_counts_per_layer() -> None:
    """One observer for three layers keeps their statistics apart and reports counts, fractions and norms."""
    observer = strict()
    keys = keys_with_outliers()
    for layer in range(3):
        observer.tracker(layer).flag(keys * (layer + 1))
    report = observer.report()
    assert [row.outlier_count for row in report.layers] == [3, 3, 3]
    assert report.outlier_count == 9
    assert report.outlier_fraction == 9 / 600
    norms = np.sqrt(np.sum(np.array(keys.astype(mx.float32)) ** 2, axis=(0, 1, 3)))[OUTLIERS]
    assert report.layers[1].mean_outlier_norm == pytest.approx(2 * norms.mean(), rel=1e-3)
    assert report.mean_outlier_norm == pytest.approx(2 * norms.mean(), rel=1e-3)
    assert report.table().count("\n") == 4


@pytest.mark.parametrize(("tail", "expected"), [("high", [70]), ("low", [90]), ("both", [70, 90])])
def test_both_tails_can_be_chosen(tail: Any, expected: list[int]) -> None:
    """A long and a short token are flagged by the tail that is asked for."""
    keys = gaussian((1, 2, 120, 64), seed=3)
    keys[:, :, 70] *= 5
    keys[:, :, 90] *= 0.01
    observer = KeyNormObserver(outlier_threshold=5.0, tail=tail)
    assert np.flatnonzero(observer.tracker(0).flag(mx.array(keys))[0]).tolist() == expected


@pytest.mark.parametrize("window_size", [16, 50, 256])
def test_statistics_roll_with_the_window(window_size: int) -> None:
    """Flags follow the definition, 2 deviations from the mean of the last window_size clipped norms."""
    keys = gaussian((1, 1, 400, 64), seed=4)
    keys[:, :, 100:] *= 2
    flags = KeyNormObserver(outlier_threshold=2.0, window_size=window_size).tracker(0).flag(mx.array(keys))[0]
    window: list[float] = []
    for norm, flag in zip(np.linalg.norm(keys[0, 0].astype(np.float64), axis=-1), flags, strict=True):
        entry = norm
        if len(window) >= 16:
            mean, reach = np.mean(window[-window_size:]), 2 * np.std(window[-window_size:])
            assert flag == (norm > mean + reach)
            entry = np.clip(norm, mean - reach, mean + reach)
        window.append(float(entry))
    assert flags[100]
    assert not flags[250:].all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outlier_threshold": 0}, "outlier_threshold must be above 0, got 0"),
        ({"window_size": 4}, "window_size must be at least 16, got 4"),
        ({"tail": "left"}, "tail must be 'high', 'low' or 'both', got 'left'"),
    ],
)
def test_observer_arguments_are_checked(fields: dict[str, Any], message: str) -> None:
    """Every argument outside its range is an error that names it."""
    with pytest.raises(ValueError, match=message):
        KeyNormObserver(**fields)


def test_outlier_bits_and_observer_go_together() -> None:
    """outlier_bits without an observer is an error; an observer alone means 8 bits."""
    with pytest.raises(ValueError, match="outlier_bits needs an outlier_observer"):
        KVCacheConfig(method="turboquant_mse", outlier_bits=8)
    assert KVCacheConfig(method="turboquant_mse", outlier_observer=strict()).outlier_bits == 8


def test_outliers_survive_trim_save_rows_and_batches(tmp_path: Path, llama_model: Any) -> None:
    """Trimming forgets the last outlier; a copy, a row, a merged batch and a loaded file decode the same."""
    cache = KVCacheBuilder.build(llama_model, outlier_config("turboquant_mse", strict()))[0]
    keys = keys_with_outliers(n_batch=2)
    cache.update_and_fetch(keys, keys)
    cache.trim(69)
    kept = {h.name: h for h in cache.held_arrays()}["outliers.positions"]
    assert kept.used_slots == 4  # tokens 70 and 130 of two sequences
    expected = cache.fetch(131, mx.float32)[0]
    row = cache.rows(slice(1, 2))
    assert mx.array_equal(row.fetch(131, mx.float32)[0], expected[1:])
    batch = PackedKVCache.merge([row, cache.rows(slice(0, 1))])
    assert mx.array_equal(batch.extract(1).fetch(131, mx.float32)[0], expected[:1])
    save_prompt_cache(tmp_path / "c.safetensors", [cache])
    (loaded,) = load_prompt_cache(tmp_path / "c.safetensors")
    assert mx.array_equal(loaded.fetch(131, mx.float32)[0], expected)
    assert copy.deepcopy(cache).outlier_observer is cache.outlier_observer


def test_rows_of_a_batch_keep_their_own_statistics(llama_model: Any) -> None:
    """A row taken out of a lockstep batch, and rows merged, go on and flag as the batch does."""
    keys = keys_with_outliers(n_batch=2)
    keys[1] *= 4  # statistics of the other row would flag every token
    cache = KVCacheBuilder.build(llama_model, outlier_config("turboquant_mse", strict()))[0]
    cache.update_and_fetch(keys[:, :, :100], keys[:, :, :100])
    rows = [cache.rows(slice(i, i + 1)) for i in range(2)]
    batch = PackedKVCache.merge(rows)
    expected, _ = cache.update_and_fetch(keys[:, :, 100:], keys[:, :, 100:])
    merged, _ = batch.update_and_fetch(keys[:, :, 100:], keys[:, :, 100:])
    # a product of another shape adds its 64 terms in another order: half an ulp (2^-24) a term at most, some cancel
    tolerance = 2**-21 * float(mx.abs(expected).max())
    np.testing.assert_allclose(np.array(merged), np.array(expected), rtol=0, atol=tolerance)
    for i, row in enumerate(rows):
        got, _ = row.update_and_fetch(keys[i : i + 1, :, 100:], keys[i : i + 1, :, 100:])
        np.testing.assert_allclose(np.array(got), np.array(expected[i : i + 1]), rtol=0, atol=tolerance)
        assert row.storage._outliers._held_positions()[:, 1].tolist() == OUTLIERS


@pytest.mark.parametrize("saved_after", [10, 100])
@pytest.mark.parametrize("batched", [False, True])
def test_a_loaded_cache_flags_like_the_one_that_was_saved(
    tmp_path: Path, llama_model: Any, saved_after: int, batched: bool
) -> None:
    """With an observer reattached, before or after the warm-up, the same tokens are kept at 8 bits, and only those."""
    caches = KVCacheBuilder.build(llama_model, outlier_config("turboquant_mse", strict()))[:2]
    keys = keys_with_outliers()
    for cache in caches:
        cache.update_and_fetch(keys[:, :, :saved_after], keys[:, :, :saved_after])
    saved = [PackedKVCache.merge([cache]) for cache in caches] if batched else caches
    save_prompt_cache(tmp_path / "c.safetensors", [saved[0], CacheList(saved[1])])
    observer = strict()
    first, second = load_prompt_cache(tmp_path / "c.safetensors", outlier_observer=observer)
    for loaded, cache in zip((first, second[0]), caches, strict=True):
        got = loaded.update_and_fetch(keys[:, :, saved_after:], keys[:, :, saved_after:])
        expected = cache.update_and_fetch(keys[:, :, saved_after:], keys[:, :, saved_after:])
        assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        assert loaded.nbytes == cache.nbytes
    flagged = sum(token >= saved_after for token in OUTLIERS)
    assert [row.outlier_count for row in observer.report().layers] == [flagged] * 2


def test_a_loaded_cache_never_stops_flagging_silently(tmp_path: Path, llama_model: Any) -> None:
    """Loaded without an observer, outliers can be read, and an update says what is missing and stores nothing."""
    cache = KVCacheBuilder.build(llama_model, outlier_config("turboquant_mse", strict()))[0]
    keys = keys_with_outliers()
    cache.update_and_fetch(keys, keys)
    save_prompt_cache(tmp_path / "c.safetensors", [cache])
    (loaded,) = load_prompt_cache(tmp_path / "c.safetensors")
    with pytest.raises(RuntimeError, match="layer 0 keeps outlier tokens, and no outlier_observer flags them"):
        loaded.update_and_fetch(keys, keys)
    assert mx.array_equal(loaded.fetch(200, mx.float32)[0], cache.fetch(200, mx.float32)[0])
    save_prompt_cache(tmp_path / "again.safetensors", [loaded])
    (again,) = load_prompt_cache(tmp_path / "again.safetensors", outlier_observer=strict())
    more = keys_with_outliers()
    assert mx.array_equal(again.update_and_fetch(more, more)[0], cache.update_and_fetch(more, more)[0])


@pytest.mark.parametrize("batched", [False, True])
def test_outliers_saved_without_their_norms_are_refused(tmp_path: Path, llama_model: Any, batched: bool) -> None:
    """As the first files were: the warm-up would begin anew without a word. An empty cache has no norms to miss."""
    cache = KVCacheBuilder.build(llama_model, outlier_config("turboquant_mse", strict()))[0]
    without = PackedKVCache.from_state(cache.state)
    assert without.offset == 0
    cache.update_and_fetch(keys_with_outliers(), keys_with_outliers())
    cache.storage._tracker.load_norms(None)
    save_prompt_cache(tmp_path / "old.safetensors", [PackedKVCache.merge([cache]) if batched else cache])
    with pytest.raises(
        ValueError, match="layer 0 keeps outlier tokens, but its state of 200 tokens lacks the key norms"
    ):
        load_prompt_cache(tmp_path / "old.safetensors", outlier_observer=strict())


def test_an_observer_for_a_file_without_outliers_is_refused(tmp_path: Path, llama_model: Any) -> None:
    """It would be ignored: the error names the argument and the file."""
    save_prompt_cache(tmp_path / "c.safetensors", KVCacheBuilder.build(llama_model, KVCacheConfig("turboquant_mse")))
    with pytest.raises(ValueError, match=r"outlier_observer was given, but no layer of .*c\.safetensors keeps"):
        load_prompt_cache(tmp_path / "c.safetensors", outlier_observer=strict())


@pytest.mark.parametrize("method", ["kivi", "turboquant_prod_adaptive"])
def test_outliers_of_a_block_that_a_trim_cuts_keep_their_width(llama_model: Any, method: str) -> None:
    """Taken back to the fp16 tail, a flagged token decodes as before to fp16 rounding, and so it does coded again."""
    cache = KVCacheBuilder.build(llama_model, outlier_config(method, strict(), window=0))[0]
    keys = keys_with_outliers()
    before, _ = cache.update_and_fetch(keys, keys)
    cache.trim(200 - 132)  # into the block of tokens 128 to 135
    assert cache.storage.keys.coded.tokens == 128
    after, _ = cache.fetch(132, mx.float32)
    np.testing.assert_allclose(np.array(after), np.array(before)[:, :, :132], rtol=2**-11, atol=2**-24)
    again, _ = cache.update_and_fetch(keys[:, :, 132:], keys[:, :, 132:])
    np.testing.assert_array_equal(np.array(again)[:, :, OUTLIERS], np.array(before)[:, :, OUTLIERS])


def test_sliding_layers_forget_old_outliers(gemma_model: Any) -> None:
    """On a sliding-window layer, outliers that left the window are dropped, those inside are still exact to 8 bits."""
    cache = KVCacheBuilder.build(gemma_model, outlier_config("turboquant_mse", strict(), code_bits=1))[0]
    keys = gaussian((1, 1, 600, 64), seed=1)
    keys[:, :, [70, 590]] *= 5
    x = mx.array(keys)
    for start in range(0, 600, 20):
        got, _ = cache.update_and_fetch(x[:, :, start : start + 20], x[:, :, start : start + 20])
    positions = {h.name: h for h in cache.held_arrays()}["outliers.positions"]
    assert np.array(positions.array)[0, 0, : positions.used_slots, 1].tolist() == [590]
    assert got.shape[2] == 35
    error = np.sum((np.array(got) - keys[:, :, 565:]) ** 2, axis=(0, 1, 3)) / np.sum(
        keys[:, :, 565:] ** 2, axis=(0, 1, 3)
    )
    assert np.flatnonzero(error < 1e-3).tolist() == [25]


def test_the_last_outlier_may_leave_the_window(gemma_model: Any) -> None:
    """A sliding layer whose only outlier left costs what one without observer costs, and can keep another later."""
    cache = KVCacheBuilder.build(gemma_model, outlier_config("turboquant_mse", strict(), code_bits=1))[0]
    keys = gaussian((1, 1, 400, 64), seed=1)
    keys[:, :, [70, 390]] *= 5
    x = mx.array(keys)
    cache.update_and_fetch(x[:, :, :300], x[:, :, :300])
    cache.begin_step()  # as the next update begins
    assert {h.name for h in cache.held_arrays()} == {"keys.codes", "keys.norms", "values.codes", "values.norms"}
    assert cache.bits_per_value() == 1 + 16 / 64
    cache.update_and_fetch(x[:, :, 300:], x[:, :, 300:])
    positions = {h.name: h for h in cache.held_arrays()}["outliers.positions"]
    assert np.array(positions.array)[0, 0, : positions.used_slots].tolist() == [[0, 390]]


def test_distortion_is_reported_per_layer_beside_theory(llama_model: Any) -> None:
    """Every layer's keys and values appear with all their vectors and errors within 3% of Lloyd–Max."""
    observer = DistortionObserver()
    config = KVCacheConfig(
        method="ratequant", bit_allocation={"layer_0": 1, "layer_1": 2, "layer_2": 4}, distortion_observer=observer
    )
    for layer, cache in enumerate(KVCacheBuilder.build(llama_model, config)):
        for start in range(0, 600, 200):
            x = mx.array(gaussian((1, 2, 200, 64), seed=10 * layer + start))
            cache.update_and_fetch(x, 3 * x)
    rows = observer.report().rows
    assert [(row.layer, row.role, row.code_bits) for row in rows] == [
        (layer, role, bits) for layer, bits in enumerate((1, 2, 4)) for role in ("keys", "values")
    ]
    for row in rows:
        expected = lloyd_max(SphereMarginal(64), 1 << row.code_bits).distortion
        assert row.n_vectors == 1200
        assert row.expected_mse == pytest.approx(expected)
        assert row.relative_mse == pytest.approx(expected, rel=0.03)
        assert row.gain == pytest.approx(1 - expected, rel=0.03)
        assert row.cosine == pytest.approx(np.sqrt(1 - expected), rel=0.01)
        assert row.inner_product_mse == pytest.approx(expected, rel=0.15)  # 8 queries
    assert observer.report().table().count("\n") == 7


def test_distortion_of_outlier_codes_is_reported(llama_model: Any) -> None:
    """Of 200 tokens the three flagged ones appear again at 8 bits, with the error of 8 bits."""
    observer = DistortionObserver()
    config = outlier_config("turboquant_mse", strict(), code_bits=2, distortion_observer=observer)
    cache = KVCacheBuilder.build(llama_model, config)[0]
    keys = keys_with_outliers()
    cache.update_and_fetch(keys[:, :, :100], keys[:, :, :100])
    copy.deepcopy(cache).update_and_fetch(keys[:, :, 100:], keys[:, :, 100:])
    rows = {row.role: row for row in observer.report().rows}
    assert {role: (row.layer, row.code_bits, row.n_vectors) for role, row in rows.items()} == {
        "keys": (0, 2, 400), "outlier_keys": (0, 8, 6), "outlier_values": (0, 8, 6), "values": (0, 2, 400)
    }  # fmt: skip
    assert rows["outlier_keys"].relative_mse < 4e-4  # as in test_flagged_tokens_are_kept_at_outlier_bits
    assert rows["keys"].relative_mse > 0.1  # D(2) = .117


def test_a_copy_does_not_keep_the_original_alive(llama_model: Any) -> None:
    """With a distortion observer too, a cache that was copied and dropped is freed."""
    config = outlier_config("turboquant_mse", strict(), distortion_observer=DistortionObserver())
    cache = PackedKVCache(
        config.layer_spec(0, 2, 2, None),
        outlier_observer=config.outlier_observer,
        distortion_observer=config.distortion_observer,
    )
    twin, original = copy.deepcopy(cache), weakref.ref(cache)
    del cache
    gc.collect()
    assert original() is None
    assert twin.empty()


def test_an_observer_changes_nothing(llama_model: Any) -> None:
    """Logits with a distortion observer equal those without, bit for bit."""
    ids = mx.array(np.random.default_rng(0).integers(0, 128, (1, 40)))
    logits = []
    for observer in (None, DistortionObserver()):
        config = KVCacheConfig(method="kivi", window=8, group_size=8, distortion_observer=observer)
        logits.append(llama_model(ids, cache=KVCacheBuilder.build(llama_model, config)))
    assert mx.array_equal(*logits)


def test_cosine_of_a_perfect_code_is_one() -> None:
    """Observing x against itself gives cosine 1, error 0, gain 1."""
    observer = DistortionObserver()
    x = mx.array(gaussian((1, 2, 10, 64)))
    observer.observe(x, x, quantizer=TurboQuantMSE(4))
    (row,) = observer.report().rows
    assert (row.cosine, row.relative_mse, row.gain) == (pytest.approx(1), 0, pytest.approx(1))
