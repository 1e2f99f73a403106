"""The fixed code: its layout, its books, its widths; the compiled path is the NumPy definition bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veloxquant_mlx.codes import native
from veloxquant_mlx.codes.fixed import (
    BOOK_SIZE,
    MAX_WIDTH,
    FixedCode,
    allocate_widths,
    fit_books,
    fit_fixed,
    lloyd,
)

LLOYD_MAX = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}
"""Distortion of Lloyd–Max quantizers of N(0, 1) (Max 1960)."""


@pytest.fixture(scope="module")
def books():
    """Two shapes: Gaussian and Laplacian."""
    rng = np.random.default_rng(0)
    return fit_books([rng.standard_normal(1 << 18), rng.laplace(scale=0.5**0.5, size=1 << 18)])


def spread_code(books, d=50, seed=1):
    rng = np.random.default_rng(seed)
    return FixedCode(rng.integers(0, 9, d), rng.uniform(0.1, 3, d), rng.integers(0, 2, d), books)


@pytest.mark.parametrize("width", LLOYD_MAX)
def test_fitted_books_are_lloyd_max(books, width):
    """A book fitted to Gaussian samples leaves the optimal distortion, within its sampling error."""
    y = np.random.default_rng(9).standard_normal((20000, 8)).astype(np.float32)
    code = FixedCode(np.full(8, width), np.ones(8), np.zeros(8), books)
    error = np.square(code.decode(code.encode(y)) - y).mean()
    assert error == pytest.approx(
        LLOYD_MAX[width], rel=0.02
    )  # 160,000 samples: 1% at 4 bits, whose tail cells are rare


def test_the_layout_by_hand():
    """Widths 3, 0, 8, 1: code 5 in bits 0..2, 200 in bits 3..10, 1 in bit 11."""
    books = np.zeros((1, BOOK_SIZE), np.float32)
    for width in range(1, 9):
        books[0, 2**width - 2 : 2 ** (width + 1) - 2] = np.arange(2**width)
    code = FixedCode([3, 0, 8, 1], [1, 1, 2, 1], np.zeros(4), books)
    words = code.encode([[5.2, 9, 400.1, 0.9]])
    assert words.tolist() == [[5 | 200 << 3 | 1 << 11]]
    assert code.decode(words).tolist() == [[5, 0, 400, 1]]
    assert (code.n_words, code.bits_per_value) == (1, Fraction(32, 4))
    assert code.nbytes == 4 * (1 + 4 + 1)


@settings(max_examples=40, deadline=None)
@given(widths=st.lists(st.integers(0, 8), min_size=1, max_size=40), n_tokens=st.integers(0, 5), seed=st.integers(0, 99))
def test_compiled_and_numpy_agree(books, widths, n_tokens, seed):
    """Words and values are those of the NumPy definition, at every mix of widths, and values are code points."""
    rng = np.random.default_rng(seed)
    d = len(widths)
    code = FixedCode(widths, rng.uniform(0.01, 100, d), rng.integers(0, 2, d), books)
    y = (rng.standard_normal((n_tokens, d)) * code.scales).astype(np.float32)
    words = code.encode(y)
    assert words.shape == (n_tokens, -(-sum(widths) // 32))
    np.testing.assert_array_equal(words, code._encode_reference(y))
    values = code.decode(words)
    np.testing.assert_array_equal(values, code._decode_reference(words))
    np.testing.assert_array_equal(code.encode(values), words)


def test_ties_and_extremes_go_where_numpy_says(books, compiler):
    """Values on the edges between levels, and the largest that fp32 has."""
    assert native.library() is not None
    for width in range(1, 9):
        level = books[1, 2**width - 2 : 2 ** (width + 1) - 2]
        edges = (level[1:] + level[:-1]) * np.float32(0.5)
        y = np.concatenate([edges, np.nextafter(edges, np.float32(-9)), [3e38, -3e38, 0]]).astype(np.float32)[:, None]
        code = FixedCode([width], [1], [1], books)
        np.testing.assert_array_equal(code.encode(y), code._encode_reference(y))


def test_any_tokens_decode_alone(books):
    """Rows of words are tokens: any of them, in any order."""
    code = spread_code(books)
    y = np.random.default_rng(2).standard_normal((30, 50)).astype(np.float32)
    words = code.encode(y)
    np.testing.assert_array_equal(code.decode(words[[7, 3, 29]]), code.decode(words)[[7, 3, 29]])


# ---- widths --------------------------------------------------------------------------------------


def test_widths_follow_reverse_water_filling():
    """Losses s 4^-b: coefficients whose variances differ by 4^k get widths that differ by k (Cover & Thomas 10.3.3)."""
    variances = 4.0 ** np.array([3, 3, 2, 2, 1, 1, 0, 0] * 16)
    losses = variances[:, None] * 4.0 ** -np.arange(9)
    (widths,) = allocate_widths([losses], 4.5)
    np.testing.assert_array_equal(widths, np.tile([6, 6, 5, 5, 4, 4, 3, 3], 16))


def test_every_layer_fills_whole_words_and_the_budget():
    """Random convex losses: each layer's widths fill whole words; all words of the budget are spent, none more."""
    rng = np.random.default_rng(3)
    losses = [rng.lognormal(0, 3, (96, 1)) * rng.uniform(2, 4, (96, 1)) ** -np.arange(9) for _ in range(5)]
    for target in (0.0, 0.7, 2.0, 3.1, 8.0):
        widths = allocate_widths(losses, target)
        assert all(own.sum() % 32 == 0 and own.max() <= MAX_WIDTH for own in widths)
        assert sum(int(own.sum()) for own in widths) == int(target * 5 * 96) // 32 * 32


def test_a_weighted_layer_gets_more():
    """The same losses, one layer four times as important: half an fourfold variance, one bit more per coefficient."""
    losses = np.tile(4.0 ** -np.arange(9), (64, 1))
    plain, dear = allocate_widths([losses, losses], 3.5, weights=[1, 4])
    assert (plain.tolist(), dear.tolist()) == ([3] * 64, [4] * 64)


def test_fitted_codes_meet_their_target_and_their_forecast():
    """Gaussian coefficients of falling variance at 2 bits: the error is the widths' Lloyd–Max sum within 5%."""
    rng = np.random.default_rng(4)
    scales = np.geomspace(4, 0.1, 64)
    y = (rng.standard_normal((8192, 64)) * scales).astype(np.float32)
    (code,) = fit_fixed([y[:4096]], 2.0, n_shapes=1)
    assert code.bits_per_value == 2
    error = np.square(code.decode(code.encode(y[4096:])) - y[4096:]).mean(axis=0)
    known = {0: 1.0, **LLOYD_MAX, 5: 0.00250, 6: 0.000646, 7: 0.000165, 8: 0.000042}
    expected = sum(known[int(b)] * s * s for b, s in zip(code.widths, scales, strict=True))
    assert error.sum() == pytest.approx(expected, rel=0.05)
    assert np.all(np.diff(code.widths.astype(int)) <= 1)  # sampling noise may swap neighbours, no more


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [9, 1]}, "widths must lie in 0..8"),
        ({"widths": [1]}, r"must be \[d\] each"),
        ({"scales": [1, 0]}, "scales must be finite and positive"),
        ({"scales": [1, float("nan")]}, "scales must be finite"),
        ({"shapes": [0, 2]}, "shapes must lie below 2"),
        ({"books": np.zeros((2, 3))}, "books must be finite"),
    ],
)
def test_codes_outside_of_the_format_are_refused(books, change, message):
    """Each array of a code is checked when it is made."""
    parts = {"widths": [1, 1], "scales": [1, 1], "shapes": [0, 1], "books": books}
    FixedCode(**parts)
    with pytest.raises(ValueError, match=message):
        FixedCode(**{**parts, **change})


def test_calls_outside_of_the_format_are_refused(books):
    """Shapes, NaN, targets, too few samples."""
    code = spread_code(books)
    y = np.zeros((2, 50), np.float32)
    with pytest.raises(ValueError, match=r"y must be \[T, 50\]"):
        code.encode(y[:, 1:])
    with pytest.raises(ValueError, match="words must be"):
        code.decode(np.zeros((2, code.n_words + 1), np.uint32))
    y[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"y\[1, 3\] = nan is not finite"):
        code.encode(y)
    with pytest.raises(ValueError, match="target_bits=9"):
        allocate_widths([np.ones((4, 9))], 9)
    with pytest.raises(ValueError, match="losses must be"):
        allocate_widths([np.ones((4, 8))], 1)
    with pytest.raises(ValueError, match="as many different samples"):
        lloyd([1.0, 1.0], 4)
    arrays = code.to_arrays()
    again = FixedCode.from_arrays(arrays, books)
    np.testing.assert_array_equal(again.widths, code.widths)
    with pytest.raises(ValueError, match="'scales'"):
        FixedCode.from_arrays({"widths": code.widths}, books)
