"""The cached reference: what rounding it costs, what it takes on disk, and when it is not kept."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from scipy.special import rel_entr, softmax

from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.measure import divergence, quality
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.measure.reference import ReferenceCache, lockstep
from veloxbench.methods.cache_under_test import CacheUnderTest

PROTOCOL = Chunked(2, 128, chunk=64, score_from=64)


@pytest.fixture(scope="module")
def real():
    """The default model whole, on real text: logits of the fp16 and the 8-bit arm."""
    from veloxbench.inputs.models import load_model, resolve_model

    model, tokenizer = load_model(resolve_model("smollm2-135m"))
    tokens = token_block(load_text("bundled"), tokenizer, n_sequences=2, length=129).tokens

    def steps(make):
        return feed(model, [CacheUnderTest(make()) for _ in model.layers], tokens, PROTOCOL)

    return steps


@pytest.fixture
def pool():
    with divergence.worker_pool() as pool:
        yield pool


def _eight_bit():
    return QuantizedKVCache(group_size=64, bits=8)


def test_rounding_the_reference_costs_less_than_one_percent_of_eight_bits(real, pool, tmp_path):
    """Mean KLD of mlx-lm's 8-bit arm through the fp16 cache is within 1% of the exact one in fp64."""
    reference = [s for s in real(KVCache) if s is not None]
    arm = [s for s in real(_eight_bit) if s is not None]
    exact, cached = [], []
    for ours, theirs in zip(reference, arm, strict=True):
        p, q = divergence.as_rows(ours.logits), divergence.as_rows(theirs.logits)
        exact.append(rel_entr(softmax(p.astype(np.float64), axis=1), softmax(q.astype(np.float64), axis=1)).sum(axis=1))
        targets = ours.targets.reshape(-1)
        rows = divergence.reference_rows(p, targets, np.empty(p.shape, np.float16), pool)
        cached.append(divergence.compare_rows(rows, q, targets, pool).kld_nats)
    exact_mean, cached_mean = np.concatenate(exact).mean(), np.concatenate(cached).mean()
    assert exact_mean > 1e-5, "the arm lost nothing: the test cannot fail"
    assert abs(cached_mean - exact_mean) < 0.01 * exact_mean


def test_kept_and_lockstep_references_are_the_same(real, pool, tmp_path):
    """What comes back from disk is bit for bit what a lockstep run computes, at the size announced."""
    cache = ReferenceCache(tmp_path)
    vocabulary = 49152
    assert cache.fits(128, vocabulary)
    written = [rows.nll.copy() for rows in cache.write("k", real(KVCache), 128, vocabulary, pool)]
    assert (tmp_path / "k" / "log_probs.f16").stat().st_size == cache.size(128, vocabulary) == 128 * 49152 * 2
    read = list(cache.read("k", quality.rows_per_step(PROTOCOL, 2), _never))
    again = list(lockstep(real(KVCache), pool))
    for one, other, nll in zip(read, again, written, strict=True):
        np.testing.assert_array_equal(one.log_probs, other.log_probs)
        np.testing.assert_array_equal(one.normaliser, other.normaliser)
        np.testing.assert_array_equal(one.nll, nll)
        np.testing.assert_array_equal(one.top1, other.top1)


def _fake_steps(n_rows: int, vocabulary: int):
    from veloxbench.measure.protocol import ScoredLogits

    logits = mx.array(np.random.default_rng(0).standard_normal((1, n_rows, vocabulary)).astype(np.float32))
    yield ScoredLogits(0, logits, np.zeros((1, n_rows), np.int32))


def _never():
    raise AssertionError("a whole reference was computed again")
    yield


def test_the_least_recently_used_goes_first(pool, tmp_path):
    """Above the cap the oldest reference goes; one that was read since stays."""
    import os

    cache = ReferenceCache(tmp_path, cap_bytes=2 * 8 * 100 * 2)
    for age, key in ((30, "a"), (20, "b")):
        list(cache.write(key, _fake_steps(8, 100), 8, 100, pool))
        then = (tmp_path / key).stat().st_mtime - age
        os.utime(tmp_path / key, (then, then))
    list(cache.read("a", [8], _never))
    list(cache.write("c", _fake_steps(8, 100), 8, 100, pool))
    assert sorted(place.name for place in tmp_path.iterdir()) == ["a", "c"]


def test_a_reference_above_the_cap_is_not_kept(tmp_path):
    """Then the reference runs in lockstep with each arm."""
    assert not ReferenceCache(tmp_path, cap_bytes=1000).fits(8, 100)


def test_a_killed_writers_remains_go_and_a_live_ones_count(pool, tmp_path):
    """After kill -9 the next reference has the whole cap; beside a live writer it has what that one leaves."""
    one = 8 * 100 * 2
    cache = ReferenceCache(tmp_path, cap_bytes=one)
    dead = tmp_path / ".partial-dead"
    dead.mkdir()
    (dead / "log_probs.f16").write_bytes(bytes(one))
    (dead / ".lock").touch()
    assert cache.fits(8, 100)
    assert not dead.exists()
    rows = cache.write("k", _fake_steps(8, 100), 8, 100, pool)
    next(rows)
    assert not cache.fits(8, 100)
    assert ReferenceCache(tmp_path, cap_bytes=2 * one).fits(8, 100)
    rows.close()
    assert cache.fits(8, 100)


def test_an_interrupted_write_leaves_nothing_that_looks_whole(pool, tmp_path):
    """A run that dies while the reference is computed finds no reference afterwards."""
    cache = ReferenceCache(tmp_path)
    rows = cache.write("k", _fake_steps(8, 100), 16, 100, pool)
    next(rows)
    rows.close()
    assert not cache.has("k")
    assert list(tmp_path.iterdir()) == []
