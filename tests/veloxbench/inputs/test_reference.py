"""The cached reference: what rounding it costs, what it takes on disk, when it is not kept, and that it is verified."""

from concurrent.futures import ThreadPoolExecutor

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


# What is kept is verified.

STEPS = [3, 1, 4]


def _three_steps():
    from veloxbench.measure.protocol import ScoredLogits

    random = np.random.default_rng(1)
    for i, n in enumerate(STEPS):
        yield ScoredLogits(
            i, mx.array(random.standard_normal((1, n, 50)).astype(np.float32)), np.ones((1, n), np.int32)
        )


def _copies(rows):
    return [[np.array(getattr(row, name)) for name in ("log_probs", "normaliser", "nll", "top1")] for row in rows]


@pytest.fixture
def kept(pool, tmp_path):
    """A cache with one reference of three steps, what it holds, and a function that reads it and counts computing."""
    cache = ReferenceCache(tmp_path / "reference")
    cache.folder.mkdir()
    truth = _copies(cache.write("key", _three_steps(), 8, 50, pool))
    computed = []

    def compute():
        computed.append(cache.has("key"))
        return cache.write("key", _three_steps(), 8, 50, pool)

    def read():
        return _copies(cache.read("key", STEPS, compute))

    return cache, truth, read, computed


def _same(one, other):
    pairs = [pair for ours, theirs in zip(one, other, strict=True) for pair in zip(ours, theirs, strict=True)]
    return all(np.array_equal(*pair) for pair in pairs)


def test_a_whole_reference_is_read_and_not_computed(kept):
    """The control: what was written comes back."""
    _, truth, read, computed = kept
    assert _same(read(), truth)
    assert computed == []


@pytest.mark.parametrize("file", ["log_probs.f16", "figures"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_is_computed_again_from_its_step_on(kept, file, place):
    """Every row is right, whether the damage is in the first step or the last; afterwards the cache is whole again."""
    cache, truth, read, computed = kept
    path = cache.folder / "key" / file
    content = bytearray(path.read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    path.write_bytes(content)
    assert _same(read(), truth)
    assert computed == [False]
    assert _same(read(), truth)
    assert len(computed) == 1


@pytest.mark.parametrize("file", ["log_probs.f16", "figures", "checksums.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "zeros", "a folder"])
def test_a_damaged_file_of_a_reference_is_computed_again(kept, file, damage):
    """Gone, empty, cut, zeroed, or no file at all."""
    cache, truth, read, computed = kept
    path = cache.folder / "key" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "zeros": bytes(len(content))}[damage])
    assert _same(read(), truth)
    assert computed == [False]
    assert _same(read(), truth)


@pytest.mark.parametrize("text", ["[]", "1", "{}", '{"shape": [8, 50]}', '{"shape": 3, "checksums": []}', "[" * 9000])
def test_checksums_of_another_shape_are_damage(kept, text):
    """A note that is no list of checksums is no reference."""
    cache, truth, read, _ = kept
    (cache.folder / "key" / "checksums.json").write_text(text)
    assert _same(read(), truth)


def test_rows_of_another_reference_are_not_taken(kept, pool):
    """A folder under another key, whole in itself, does not hold that key's rows."""
    import shutil

    cache, truth, read, computed = kept
    list(cache.write("other", _fake_steps(8, 50), 8, 50, pool))
    shutil.rmtree(cache.folder / "key")
    (cache.folder / "other").rename(cache.folder / "key")
    assert _same(read(), truth)
    assert computed == [False]


def test_steps_of_another_protocol_are_not_taken(kept):
    """The same rows cut into other steps are other steps."""
    cache, _, _, _ = kept
    called = []
    list(cache.read("key", [8], lambda: called.append(True) or iter(())))
    assert called == [True]


def test_a_reference_of_an_earlier_version_is_cleared(kept, pool):
    """Without checksums it counts as nothing, and does not stay on the disk for ever."""
    cache, _, _, _ = kept
    old = cache.folder / "old"
    old.mkdir()
    (old / "meta.json").write_text('{"shape": [8, 50]}')
    (old / "log_probs.f16").write_bytes(bytes(800))
    assert not cache.has("old")
    list(cache.write("another", _fake_steps(8, 50), 8, 50, pool))
    assert not old.exists()


def test_two_readers_heal_at_once(kept):
    """Both read right rows from one damaged reference, and a whole one is left."""
    cache, truth, read, _ = kept
    path = cache.folder / "key" / "log_probs.f16"
    path.write_bytes(bytes(len(path.read_bytes())))
    with ThreadPoolExecutor(2) as readers:
        assert all(_same(rows, truth) for rows in readers.map(lambda _: read(), range(2)))
    assert cache.has("key")
    assert [place.name for place in cache.folder.iterdir()] == ["key"]


def test_what_another_process_healed_is_not_removed(kept):
    """A reader of the damaged files does not take away the whole ones that replaced them meanwhile."""
    cache, truth, read, computed = kept
    damaged = cache.read("key", STEPS, lambda: iter(()))
    path = cache.folder / "key" / "figures"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    next(damaged)  # it has the damaged files open
    assert _same(read(), truth)  # another one heals them
    list(damaged)
    assert cache.has("key")
    assert len(computed) == 1


def test_a_full_disk_keeps_nothing_and_loses_nothing(pool, tmp_path, monkeypatch):
    """The rows are computed to the end; no reference that is not whole is left."""
    from veloxbench.measure import reference

    def full(file, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "_write", full)
    cache = ReferenceCache(tmp_path)
    assert sum(len(rows.nll) for rows in cache.write("key", _three_steps(), 8, 50, pool)) == 8
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path):
    """The reference then runs in lockstep."""
    (tmp_path / "file").write_text("")
    assert not ReferenceCache(tmp_path / "file" / "reference").fits(8, 100)
