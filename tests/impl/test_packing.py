"""The byte format, against NumPy's own bit packing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_kernels.codebook import table_group
from veloxquant_kernels.lookup import lookup, lookup_table
from veloxquant_kernels.packing import (
    pack_codes,
    pack_trits,
    packed_words,
    trit_bytes,
    unpack_codes,
    unpack_groups,
    unpack_trits,
)

LENGTHS = (1, 7, 31, 33, 48, 64, 80, 96, 128, 256)


def random_codes(levels: int, length: int) -> np.ndarray:
    return np.random.default_rng([levels, length]).integers(0, levels, (2, 3, 5, length)).astype(np.uint8)


def numpy_words(codes: np.ndarray, code_bits: int) -> np.ndarray:
    """The format's definition through np.packbits."""
    length = codes.shape[-1]
    bits = np.unpackbits(codes.reshape(-1, length, 1), axis=-1, count=code_bits, bitorder="little")
    row = bits.reshape(-1, length * code_bits)
    row = np.pad(row, ((0, 0), (0, packed_words(length, code_bits) * 32 - row.shape[1])))
    return np.packbits(row, axis=-1, bitorder="little").view("<u4").reshape(*codes.shape[:-1], -1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("code_bits", range(1, 9))
def test_words_are_little_endian_bit_fields(code_bits: int, length: int) -> None:
    """Code j occupies bits [j*b, (j+1)*b) of the row and the tail is zero, as np.packbits writes it."""
    codes = random_codes(1 << code_bits, length)
    words = pack_codes(mx.array(codes), code_bits)
    assert words.dtype == mx.uint32
    np.testing.assert_array_equal(np.array(words), numpy_words(codes, code_bits))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("code_bits", range(1, 9))
def test_unpacking_returns_the_codes(code_bits: int, length: int) -> None:
    """unpack_codes inverts the NumPy packer."""
    codes = random_codes(1 << code_bits, length)
    words = mx.array(numpy_words(codes, code_bits))
    np.testing.assert_array_equal(np.array(unpack_codes(words, code_bits, length)), codes)


@pytest.mark.parametrize("length", [48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("code_bits", range(1, 9))
def test_a_group_reads_as_one_integer(code_bits: int, length: int) -> None:
    """A group of g codes reads as sum(code_i << (i * code_bits))."""
    group = table_group(code_bits, length)
    assert group * code_bits <= 14
    codes = random_codes(1 << code_bits, length)
    weights = 1 << (np.arange(group) * code_bits)
    expected = codes.reshape(2, 3, 5, -1, group).astype(np.int64) @ weights
    words = mx.array(numpy_words(codes, code_bits))
    np.testing.assert_array_equal(np.array(unpack_groups(words, code_bits, length, group)), expected)


def test_packing_reads_a_strided_view() -> None:
    """A slice along the token axis packs and unpacks like its copy."""
    codes = random_codes(8, 48)
    whole = mx.array(codes)
    words = pack_codes(whole[:, :, 1:4], 3)
    np.testing.assert_array_equal(np.array(words), numpy_words(codes[:, :, 1:4], 3))
    part = mx.array(numpy_words(codes, 3))[:, :, 2:]
    np.testing.assert_array_equal(np.array(unpack_codes(part, 3, 48)), codes[:, :, 2:])


@pytest.mark.parametrize("code_bits", [0, 9, -1])
def test_a_width_outside_1_to_8_is_named(code_bits: int) -> None:
    """Widths outside 1..8 raise a ValueError that shows the width."""
    with pytest.raises(ValueError, match=f"1..8, got {code_bits}"):
        pack_codes(mx.zeros((1, 8), dtype=mx.uint8), code_bits)


def test_too_few_words_are_refused() -> None:
    """Unpacking 64 three-bit codes needs six words."""
    with pytest.raises(ValueError, match="fill 6"):
        unpack_codes(mx.zeros((1, 5), dtype=mx.uint32), 3, 64)


@pytest.mark.parametrize("length", LENGTHS)
def test_trits_are_base_three_digits(length: int) -> None:
    """A byte is the sum of trit_i * 3**i over five trits, and unpacking returns the trits."""
    trits = random_codes(3, length)
    padded = np.pad(trits, [(0, 0)] * 3 + [(0, -length % 5)]).reshape(2, 3, 5, -1, 5)
    data = pack_trits(mx.array(trits))
    assert data.dtype == mx.uint8
    assert data.shape[-1] == trit_bytes(length)
    np.testing.assert_array_equal(np.array(data), padded.astype(np.int64) @ 3 ** np.arange(5))
    np.testing.assert_array_equal(np.array(unpack_trits(data, length)), trits)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("columns", [1, 2, 5, 8])
def test_a_lookup_finds_the_rows_of_its_table(dtype, columns):
    """Whatever the dtype and the number of columns; pairs of fp32 travel as one complex64, which halves the gather."""
    rows = np.random.default_rng(0).integers(0, 200, (7, columns)).astype(dtype)
    index = np.array([[3, 0], [6, 6]], dtype=np.uint8)
    table = lookup_table(rows)
    found = lookup(table, mx.array(index))
    assert np.array_equal(np.array(found), rows[index])
    assert (table.dtype == mx.complex64) == (dtype == np.float32 and columns % 2 == 0)
