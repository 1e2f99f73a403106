"""Keys and values as signed bytes, with one fp16 scale per token and head."""

import mlx.core as mx
from mlx_lm.models.cache import KVCache


class RowScaleCache(KVCache):
    """A cache of mlx-lm that keeps bytes in place of fp16, and gives fp16 to attention."""

    def __init__(self):
        super().__init__()
        self.keys = self.values = self.key_scales = self.value_scales = None

    def update_and_fetch(self, keys, values):
        """Store ``[B, H, T, D]`` keys and values; all that is held, decoded."""
        key_codes, key_scales = encode(keys)
        value_codes, value_scales = encode(values)
        self.keys, self.key_scales = self._grown(self.keys, key_codes), self._grown(self.key_scales, key_scales)
        self.values = self._grown(self.values, value_codes)
        self.value_scales = self._grown(self.value_scales, value_scales)
        self.offset += keys.shape[2]
        return decode(self.keys, self.key_scales), decode(self.values, self.value_scales)

    def _grown(self, held, new):
        return new if held is None else mx.concatenate([held[..., : self.offset, :], new], axis=2)

    @property
    def state(self):
        """What mlx-lm saves."""
        return self.keys, self.key_scales, self.values, self.value_scales, self.offset

    @state.setter
    def state(self, state):
        self.keys, self.key_scales, self.values, self.value_scales, self.offset = state


def encode(x):
    """Codes ``[B, H, T, D]`` int8 and scales ``[B, H, T, 1]`` fp16."""
    scales = mx.maximum(mx.max(mx.abs(x), axis=-1, keepdims=True) / 127, 6e-8).astype(mx.float16)
    return mx.round(x / scales).astype(mx.int8), scales


def decode(codes, scales):
    """What attention reads, fp16."""
    return codes.astype(mx.float16) * scales
