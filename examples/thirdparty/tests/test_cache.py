"""What the cache promises by itself, without a model."""

import mlx.core as mx
import numpy as np
from rowscale.cache import RowScaleCache


def test_no_value_moves_by_more_than_half_a_step():
    """A row's step is its largest magnitude / 127; fp16 rounds scale and product by 2^-11 of 127 steps each."""
    x = mx.random.normal((1, 2, 5, 64), key=mx.random.key(0)).astype(mx.float16)
    keys, _ = RowScaleCache().update_and_fetch(x, x)
    step = np.abs(np.array(x)).max(axis=-1, keepdims=True).astype(float) / 127
    assert np.all(np.abs(np.array(keys).astype(float) - np.array(x)) <= (0.5 + 2 * 127 / 2048) * step)
