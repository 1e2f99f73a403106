"""Feeding: what is scored, through which storage, and that attention reads it."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from veloxbench.errors import UsageError
from veloxbench.measure.protocol import Chunked, Decode, feed
from veloxbench.measure.quality import rows_per_step
from veloxbench.methods.cache_under_test import CacheUnderTest


@pytest.fixture(scope="module")
def model():
    from veloxbench.inputs.models import load_model, resolve_model

    return load_model(resolve_model("smollm2-135m"), n_layers=4)[0]


def _tokens(sequences: int, length: int):
    return np.random.default_rng(0).integers(0, 49152, (sequences, length)).astype(np.int32)


def _logits(model, caches, tokens, protocol):
    steps = [step for step in feed(model, caches, tokens, protocol) if step is not None]
    targets = np.concatenate([step.targets for step in steps], axis=1)
    return np.concatenate([np.array(step.logits) for step in steps], axis=1), targets


def _caches(model, make):
    return [CacheUnderTest(make()) for _ in model.layers]


def test_chunked_in_fp16_equals_one_whole_pass(model):
    """Chunks through the fp16 cache give the logits of one whole pass on fp16 keys and values.

    Products of other sizes round otherwise, and a few keys and values then round to the other neighbour in fp16: a
    share p of them, which moves logits by sqrt(12 p) of what rounding all of them to fp16 does. It is measured too.
    """
    tokens = _tokens(2, 65)
    whole_pass, chunks = (Chunked(2, 64, chunk=chunk, score_from=16) for chunk in (64, 16))
    chunked, targets = _logits(model, _caches(model, KVCache), tokens, chunks)
    whole, _ = _logits(model, _caches(model, KVCache), tokens, whole_pass)
    unrounded, _ = _logits(model, [KVCache() for _ in model.layers], tokens, whole_pass)
    rounding = np.std(whole - unrounded)
    assert 0 < rounding < 0.01  # logits are up to 47
    assert np.std(chunked - whole) < rounding / 4
    assert (targets == tokens[:, 17:]).all()


def test_decode_equals_chunks_of_one(model):
    """Decode after a prefix is the chunked protocol with C = 1 from there on, whatever the cache."""
    tokens = _tokens(2, 41)

    def caches():
        return _caches(model, lambda: QuantizedKVCache(group_size=64, bits=4))

    one_by_one, targets = _logits(model, caches(), tokens, Decode(2, prefix=32, steps=8, prefill_chunk=1))
    chunked, _ = _logits(model, caches(), tokens, Chunked(2, 40, chunk=1, score_from=32))
    np.testing.assert_array_equal(one_by_one, chunked)
    assert (targets == tokens[:, 33:]).all()


def test_attention_reads_the_storage_of_its_own_chunk(model):
    """The first chunk already differs from fp16: its keys and values pass through storage before it attends."""
    tokens = _tokens(1, 33)
    protocol = Chunked(1, 32, chunk=32, score_from=0)
    fp16, _ = _logits(model, _caches(model, KVCache), tokens, protocol)
    two_bit, _ = _logits(model, _caches(model, lambda: QuantizedKVCache(group_size=64, bits=2)), tokens, protocol)
    assert np.abs(fp16 - two_bit).max() > 0.1


def test_every_cache_stores_what_an_fp16_cast_leaves(model):
    """Keys and values reach the inner cache as fp16, the fp16 arm's too."""
    caches = _caches(model, KVCache)
    list(feed(model, caches, _tokens(1, 9), Chunked(1, 8, chunk=8, score_from=0)))
    assert {cache.inner.keys.dtype for cache in caches} == {mx.float16}


@pytest.mark.parametrize(
    ("protocol", "rows"),
    [(Chunked(3, 70, chunk=32, score_from=40), [72, 18]), (Decode(2, prefix=8, steps=3), [2, 2, 2])],
)
def test_only_scored_positions_are_kept(model, protocol, rows):
    """Rows per pass are sequences x scored positions, and feed yields exactly these."""
    assert rows_per_step(protocol, protocol.sequences) == rows
    tokens = _tokens(protocol.sequences, protocol.n_tokens + 1)
    steps = list(feed(model, _caches(model, KVCache), tokens, protocol))
    assert [s.logits.shape[0] * s.logits.shape[1] for s in steps if s is not None] == rows


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Chunked(0, 64), "sequences is 0"),
        (lambda: Chunked(1, 64, score_from=64), "score_from 64"),
        (lambda: Decode(1, prefix=0, steps=4), "prefix is 0"),
    ],
)
def test_impossible_sizes_are_refused(build, sentence):
    """Sizes that score nothing are usage errors that name the size."""
    with pytest.raises(UsageError, match=sentence):
        build()
