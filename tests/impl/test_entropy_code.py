"""The entropy code: integers come back, in the bytes that the formula says, near their entropy; damage is an error."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from code_inputs import coded_bits, symbols, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from veloxquant_kernels.rans_decode import rans_decode_reference
from veloxquant_kernels.rans_format import DamagedBlock
from veloxquant_mlx.codes import entropy, native
from veloxquant_mlx.codes.entropy import (
    INACTIVE,
    EntropyBlocks,
    EntropyTables,
    TableFamily,
    coded_nbytes,
    decode_blocks,
    encode_blocks,
    encode_reference,
)
from veloxquant_mlx.codes.fit import fit_tables, integer_frequencies

FORMS = [(1, 12), (4, 12), (4, 14), (1, 15)]
"""Contexts, precision."""

forms = pytest.mark.parametrize(("n_contexts", "precision"), FORMS)


def plain_tables(q):
    """Tables fitted to symbols whose coefficients are all alike: more classes would fit their noise."""
    _, (own,) = fit_tables([q], n_contexts=1, n_classes=4, n_tables=4)
    return own


# ---- round trip ----------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize(("n_tokens", "block_tokens"), [(1, 32), (5, 1), (33, 32), (70, 64), (300, 256), (64, 7)])
def test_any_symbols_come_back(n_contexts, precision, n_tokens, block_tokens):
    """Every int32 has a code, in blocks of any length, with and without contexts and plain bits."""
    own = tables(n_contexts=n_contexts, precision=precision)
    q = symbols(n_tokens, own)
    blocks = encode_blocks(q, own, block_tokens)
    assert blocks.tokens.tolist() == [min(block_tokens, n_tokens - i) for i in range(0, n_tokens, block_tokens)]
    np.testing.assert_array_equal(decode_blocks(blocks, own), q)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_tokens=st.integers(1, 80),
    block_tokens=st.integers(1, 256),
    d=st.integers(1, 20),
    spread=st.sampled_from([0.0, 0.3, 5.0, 1e3, 1e9]),
    form=st.sampled_from(FORMS),
)
def test_drawn_symbols_come_back_in_the_bytes_of_the_formula(seed, n_tokens, block_tokens, d, spread, form):
    """Drawn shapes and sizes, all zero up to all escapes."""
    own = tables(d, seed, n_contexts=form[0], precision=form[1])
    q = np.random.default_rng(seed).standard_normal((n_tokens, d)) * spread
    q = (np.clip(np.rint(q), -(2**31), 2**31 - 1) * own.active).astype(np.int32)
    blocks = encode_blocks(q, own, block_tokens)
    np.testing.assert_array_equal(decode_blocks(blocks, own), q)
    assert coded_nbytes(q, own, block_tokens) == blocks.nbytes


@forms
def test_compiled_and_numpy_write_the_same_words(n_contexts, precision, compiler):
    """The native encoder and decoder are the NumPy definitions, word for word."""
    own = tables(n_contexts=n_contexts, precision=precision)
    for n_tokens, block_tokens in ((40, 32), (270, 256), (9, 4)):
        q = symbols(n_tokens, own)
        assert native.library() is not None
        blocks, defined = encode_blocks(q, own, block_tokens), encode_reference(q, own, block_tokens)
        np.testing.assert_array_equal(blocks.words, defined.words)
        np.testing.assert_array_equal(blocks.lengths, defined.lengths)
        planes, status = rans_decode_reference(blocks.words, blocks.starts, blocks.first_tokens, own.tables)
        assert not status.any()
        np.testing.assert_array_equal(planes.T, q)


def test_a_record_by_hand():
    """One token, one coefficient, symbol 1 of frequencies 1, 2, 1: the state 2**16 becomes 2**16/2 * 4 + 0 + 1."""
    family = TableFamily([[0, 1, 3, 3, 4]], [[0]], [256], np.zeros(256), 2)
    blocks = encode_blocks([[0]], EntropyTables(family, [0]))
    state = (2**16 // 2) * 4 + 0 + 1
    assert blocks.words.tolist() == [0, state & 0xFFFF, state >> 16]
    assert blocks.nbytes == 2 * 3 + 4


# ---- blocks --------------------------------------------------------------------------------------


def test_blocks_decode_alone_and_join():
    """A range of blocks is a range of tokens; blocks of different lengths follow one another; dropped ones are gone."""
    own = tables()
    q = symbols(100, own)
    blocks = encode_blocks(q[:64], own, 32).append(encode_blocks(q[64:], own, 16))
    assert blocks.tokens.tolist() == [32, 32, 16, 16, 4]
    np.testing.assert_array_equal(decode_blocks(blocks, own, 1, 3), q[32:80])
    np.testing.assert_array_equal(decode_blocks(blocks, own, -1), q[96:])
    rest = blocks.take(1, -1)
    np.testing.assert_array_equal(decode_blocks(rest, own), q[32:96])
    assert rest.nbytes < blocks.nbytes
    merged = encode_blocks(decode_blocks(blocks, own), own, 256)
    np.testing.assert_array_equal(decode_blocks(merged, own), q)
    assert merged.nbytes < blocks.nbytes - 4 * 4  # four lengths, and the states of four blocks


def test_no_tokens():
    """Nothing costs nothing."""
    own = tables()
    empty = encode_blocks(np.zeros((0, 40), int), own)
    assert (empty.nbytes, empty.n_tokens, coded_nbytes(np.zeros((0, 40), int), own)) == (0, 0, 0)
    assert decode_blocks(empty, own).shape == (0, 40)
    assert EntropyBlocks.empty().append(empty).n_blocks == 0


def test_coefficients_that_are_not_coded_cost_nothing():
    """Twice as many coefficients, the new ones always zero: the same words."""
    own = tables(20)
    q = symbols(64, own)
    padded = np.concatenate([q, np.zeros_like(q)], axis=1)
    wide = EntropyTables(
        own.family, np.concatenate([own.classes, np.full(20, INACTIVE)]), np.concatenate([own.shifts, np.zeros(20)])
    )
    np.testing.assert_array_equal(encode_blocks(padded, wide).words, encode_blocks(q, own).words)
    np.testing.assert_array_equal(decode_blocks(encode_blocks(padded, wide), wide), padded)


# ---- rate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [0.3, 1.0, 3.0, 40.0])
def test_gaussian_integers_cost_their_entropy(deviation):
    """Rounded N(0, s²): within .01 bit of the entropy that their own probabilities have, plus what a block must hold.

    What a block holds beside: a word, its length, and 24 of the 32 bits of each lane's state on average.
    """
    rng = np.random.default_rng(1)
    q = np.rint(rng.standard_normal((4096, 96)) * deviation).astype(np.int32)
    half = int(np.abs(q).max())
    p = np.bincount((q + half).ravel()) / q.size
    exact = float(-np.sum(p[p > 0] * np.log2(p[p > 0])))
    own = plain_tables(q[:1024])
    measured = 8 * encode_blocks(q, own, 256).nbytes / q.size
    overhead = (16 + 32 + 32 * 24) / (256 * 96)
    assert exact - 0.001 < coded_bits(q, own) / q.size < exact + 0.01
    assert measured == pytest.approx(exact + overhead, abs=0.01)


def test_entropy_coded_uniform_quantizer_of_a_gaussian():
    """2 bits by entropy-coded scalar quantization leave .0889 of a Gaussian's variance (field notes, table of ECSQ)."""
    rng = np.random.default_rng(2)
    y = rng.standard_normal((8192, 64)).astype(np.float32)
    step = 1.0127  # rounding to this step has an entropy of 2 bits
    q = np.rint(y / step).astype(np.int32)
    own = plain_tables(q[:4096])
    centroids = {k: float(y[q == k].mean()) for k in range(-4, 5)}
    error = np.mean([np.square(y[q == k] - c).sum() / y.size * 9 for k, c in centroids.items()])
    rate = coded_bits(q, own) / q.size
    shannon_gap = rate + 0.5 * np.log2(error)
    assert shannon_gap == pytest.approx(2 + 0.5 * np.log2(0.0889), abs=0.015)


def test_contexts_save_bits_where_tokens_differ_in_size():
    """Tokens of variance 1/16 and 4: knowing which, a symbol costs less; the contexts learn it from the token itself.

    The gain is bounded by the mutual information of symbol and size; contexts reach half of it at least.
    """
    rng = np.random.default_rng(3)
    size = rng.choice([0.25, 2.0], (4096, 1))
    q = np.rint(rng.standard_normal((4096, 128)) * size * 1.5).astype(np.int32)

    def entropy_of(x):
        p = np.bincount((x + 64).ravel()) / x.size
        return float(-np.sum(p[p > 0] * np.log2(p[p > 0])))

    bound = entropy_of(q) - np.mean([entropy_of(q[size[:, 0] == s]) for s in (0.25, 2.0)])
    costs = []
    for n_contexts in (1, 16):
        _, (own,) = fit_tables([q[:2048]], n_contexts=n_contexts)
        costs.append(coded_bits(q[2048:], own) / q[2048:].size)
    assert 0.5 * bound < costs[0] - costs[1] < bound + 0.01


def test_large_scales_store_low_bits_plainly():
    """Integers of deviation 3000 cost their differential entropy, log2(3000 sqrt(2 pi e)) bits, within .02."""
    q = np.rint(np.random.default_rng(4).standard_normal((2048, 32)) * 3000).astype(np.int32)
    own = plain_tables(q)
    assert own.shifts.min() > 0
    assert coded_bits(q, own) / q.size == pytest.approx(np.log2(3000 * np.sqrt(2 * np.pi * np.e)), abs=0.02)


# ---- tables --------------------------------------------------------------------------------------


def test_integer_frequencies_by_hand():
    """Sixteenths of 1/2, 1/4, 1/8 and 1/8; what is below half a slot goes to the escape, the last symbol."""
    p = np.array([0.5, 0.25, 0.125, 0.125])
    assert integer_frequencies(p, 4).tolist() == [0, 8, 12, 14, 16]
    assert integer_frequencies(np.array([0.01, 0.49, 0.47, 0.03]), 4).tolist() == [0, 0, 8, 15, 16]


def test_tables_survive_their_arrays():
    """to_arrays and from_arrays are inverse; nbytes is their sum."""
    own = tables()
    arrays = own.family.to_arrays()
    again = TableFamily.from_arrays(arrays)
    q = symbols(50, own)
    same = EntropyTables(again, own.classes, own.shifts)
    np.testing.assert_array_equal(encode_blocks(q, same).words, encode_blocks(q, own).words)
    assert own.family.nbytes == sum(np.asarray(array).nbytes for array in arrays.values())
    assert own.nbytes == 3 * 40
    with pytest.raises(ValueError, match="'weights'"):
        TableFamily.from_arrays({name: array for name, array in arrays.items() if name != "weights"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cumulative": np.array([[0, 1, 3, 3, 5]])}, "from 0 to 4"),
        ({"cumulative": np.array([[0, 3, 1, 3, 4]])}, "ascend"),
        ({"cumulative": np.array([[0, 1, 3, 4, 4]])}, "escape"),
        ({"cumulative": np.array([[0, 1, 3, 4]])}, "even n_symbols"),
        ({"class_tables": np.array([[1]])}, "below 1"),
        ({"weights": np.array([1, 2])}, "one for each class"),
        ({"contexts": np.ones(256)}, "contexts below 1"),
        ({"contexts": np.zeros(3)}, r"\[256\]"),
        ({"precision": 16}, "precision"),
    ],
)
def test_tables_outside_of_the_format_are_refused(change, message):
    """Each part of a family is checked when it is made."""
    parts = {
        "cumulative": np.array([[0, 1, 3, 3, 4]]),
        "class_tables": np.array([[0]]),
        "weights": np.array([1]),
        "contexts": np.zeros(256),
        "precision": 2,
    }
    TableFamily(**parts)
    with pytest.raises(ValueError, match=message):
        TableFamily(**{**parts, **change})


def test_calls_outside_of_the_format_are_refused():
    """Shapes, dtypes, block lengths, classes, and numbers where none are coded."""
    own = tables()
    q = np.zeros((3, 40), int)
    with pytest.raises(ValueError, match=r"symbols must be \[T, 40\]"):
        encode_blocks(q[:, :39], own)
    with pytest.raises(TypeError, match="integers"):
        encode_blocks(q.astype(float), own)
    with pytest.raises(ValueError, match="32 bits"):
        encode_blocks(q + 2**31, own)
    with pytest.raises(ValueError, match="block_tokens"):
        encode_blocks(q, own, 257)
    q[1, 5] = 1
    with pytest.raises(ValueError, match=r"symbols\[:, 5\] must be zero"):
        encode_blocks(q, own)
    with pytest.raises(ValueError, match="classes must lie below 6"):
        EntropyTables(own.family, [6])
    with pytest.raises(ValueError, match=r"shifts must lie in 0\.\.16"):
        EntropyTables(own.family, [0], [17])
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_tables([np.zeros((4, 4), np.int32)])


# ---- damage --------------------------------------------------------------------------------------


def damaged(blocks, rng):
    """One of: a bit flipped, words cut off, a block's words drawn anew, a length moved."""
    words, lengths = blocks.words.copy(), blocks.lengths.copy()
    kind = rng.integers(4)
    if kind == 0:
        words[rng.integers(words.size)] ^= 1 << rng.integers(16)
    elif kind == 1:
        cut = int(rng.integers(1, lengths[-1]))
        words, lengths = words[:-cut], np.append(lengths[:-1], lengths[-1] - cut)
    elif kind == 2:
        words = np.where(np.arange(words.size) % 7 == 0, words, rng.integers(0, 2**16, words.size))
    else:
        lengths[0] -= 1
        lengths[-1] += 1
    return words, lengths


@forms
def test_damaged_blocks_are_refused_by_all_decoders(n_contexts, precision, compiler):
    """100 damages: an error, or (in words that still add up) symbols of the right shape; both decoders agree on which.

    A record has no checksum: a bit flipped among the plain bits of a number is another record. States that must end at
    2**16 notice everything else.
    """
    own = tables(12, n_contexts=n_contexts, precision=precision)
    blocks = encode_blocks(symbols(70, own), own, 32)
    rng, noticed = np.random.default_rng(5), 0
    for _ in range(100):
        try:
            wrong = EntropyBlocks(*damaged(blocks, rng))
            tokens = wrong.tokens
        except DamagedBlock:
            noticed += 1
            continue
        first = np.concatenate([[0], np.cumsum(tokens)])
        planes, status = rans_decode_reference(wrong.words, wrong.starts, first, own.tables)
        compiled, compiled_status = native.decode(native.library(), wrong.words, wrong.starts, first, own.tables)
        np.testing.assert_array_equal(compiled_status, status)
        intact = np.repeat(status == 0, tokens)
        np.testing.assert_array_equal(compiled[intact], planes.T[intact])
        if status.any():
            noticed += 1
            with pytest.raises(DamagedBlock, match="damaged"):
                decode_blocks(wrong, own)
    assert noticed >= 90


def test_lengths_that_do_not_fit_are_refused():
    """Lengths must add up to the words, and a record holds more than its header."""
    with pytest.raises(DamagedBlock, match="add up"):
        EntropyBlocks(np.zeros(8, np.uint16), [9])
    with pytest.raises(DamagedBlock, match="cannot hold a token"):
        EntropyBlocks(np.zeros(4, np.uint16), [1, 3])
    with pytest.raises(DamagedBlock, match="claims 301 tokens"):
        decode_blocks(EntropyBlocks(np.full(8, 300, np.uint16), [8]), tables())


# ---- without a compiler --------------------------------------------------------------------------


def test_without_a_compiler_numpy_runs_and_says_so(monkeypatch):
    """The same words, and one warning with the reason."""
    own = tables()
    q = symbols(40, own)
    expected = encode_blocks(q, own)
    monkeypatch.setattr(native, "_build", lambda: "no C++ compiler found")
    native._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler found"):
        words = encode_blocks(q, own).words
    np.testing.assert_array_equal(words, expected.words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode_blocks(expected, own), q)
        assert coded_nbytes(q, own) == expected.nbytes


def test_numpy_can_be_asked_for(monkeypatch):
    """VELOXQUANT_NATIVE=0 is a wish, not a lack: no warning."""
    monkeypatch.setenv(native.NATIVE_VARIABLE, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
    assert native.why_not_native() == "VELOXQUANT_NATIVE=0"


def test_words_travel_through_mlx():
    """What a cache holds as mx arrays decodes: uint16 and uint32 keep their bits."""
    own = tables()
    q = symbols(40, own)
    blocks = encode_blocks(q, own)
    again = EntropyBlocks(np.array(mx.array(blocks.words)), np.array(mx.array(blocks.lengths)))
    np.testing.assert_array_equal(decode_blocks(again, own), q)
    assert entropy.INACTIVE == 0xFFFF
