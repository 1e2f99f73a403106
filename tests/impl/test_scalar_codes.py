"""Nearest-centroid coding: three ways of counting boundaries, one meaning."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gaussian

from veloxquant_kernels.codebook import BROADCAST_LIMIT, decode_words, nearest_codes
from veloxquant_kernels.packing import pack_codes
from veloxquant_mlx.quantizers.lloyd_max import sphere_codebook


@pytest.mark.parametrize("n_values", [100, 300_000])
@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16, 32, 64, 128, 256])
def test_codes_count_the_boundaries_below(levels: int, n_values: int) -> None:
    """Few values, many values and many levels take different routes; all equal np.searchsorted."""
    book = sphere_codebook(64, levels)
    edges = book.boundaries.astype(np.float32)
    y = np.concatenate([gaussian((n_values,), levels), edges, np.nextafter(edges, np.float32(9)), [-50.0, 50.0]])
    y = y.astype(np.float32)
    assert (y.size * len(edges) > BROADCAST_LIMIT) == (n_values > 100)
    expected = np.searchsorted(edges, y, side="left")
    np.testing.assert_array_equal(np.array(nearest_codes(mx.array(y), book)), expected)


@pytest.mark.parametrize("head_dim", [48, 64, 80, 100])
@pytest.mark.parametrize("code_bits", range(1, 9))
def test_table_decoding_is_the_centroid_of_each_code(code_bits: int, head_dim: int) -> None:
    """Decoding several codes per lookup equals indexing the centroids in NumPy."""
    book = sphere_codebook(head_dim, 1 << code_bits)
    codes = np.random.default_rng(0).integers(0, 1 << code_bits, (3, 4, head_dim)).astype(np.uint8)
    got = decode_words(pack_codes(mx.array(codes), code_bits), book, code_bits, head_dim)
    np.testing.assert_array_equal(np.array(got), book.centroids.astype(np.float32)[codes])
