"""How much the loss minds an error in a layer's keys and values once they are old: Fisher matrices.

F = E[g gᵀ], g the gradient of the summed loss with respect to one token's vector of keys (before their rotation) and
values. Recent tokens are held finer and most of a token's gradient comes from the next few tokens, so what the coarse
code must know is the gradient through *later* queries: a prefix is cached, δ = 0 is added to its vectors, and the loss
of the tokens that follow is differentiated by δ, which leaves out how the prefix reads itself. Its last ``gap`` tokens
are left out as well, so every query counted stands at least ``gap`` tokens after the vector.

Half of the labels are the text's own, half are drawn from the model (the true Fisher matrix; Kunstner et al. 2019).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.losses import cross_entropy
from mlx_lm.models.cache import RotatingKVCache, create_attention_mask
from numpy.typing import NDArray

from veloxquant_mlx.hook import own_caches
from veloxquant_mlx.probes import ProbeCache, probed_caches
from veloxquant_mlx.transforms.klt import joined
from veloxquant_mlx.transforms.rope import LayerRopes

SINKS: Final = 4
"""First tokens, which caches keep exactly; most of all squared gradient is on them."""

OnSequence = Callable[[], None]


class PrefixCache(ProbeCache):
    """Keys and values of a prefix with δ added to them before their rotation, followed by what a pass brings.

    Args:
        prefix: keys and values ``[1, H, P, D]`` as they were cached.
        ropes: of the layer.
        errors: δ of keys and values, ``[1, H, P, D]``; absent: none.
    """

    def __init__(
        self, prefix: tuple[mx.array, mx.array], ropes: LayerRopes, errors: tuple[mx.array, mx.array] | None
    ) -> None:
        super().__init__()
        self.offset = self.prefix_tokens = prefix[0].shape[2]
        self.prefix = prefix
        if errors is not None:
            turned = ropes.keys.rotate(errors[0]), ropes.values.rotate(errors[1])  # linear: R(k + δ) = R k + R δ
            self.prefix = prefix[0] + turned[0].astype(prefix[0].dtype), prefix[1] + turned[1].astype(prefix[1].dtype)
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The prefix and one pass behind it."""
        fetched = (mx.concatenate([self.prefix[0], keys], axis=2), mx.concatenate([self.prefix[1], values], axis=2))
        self.offset = fetched[0].shape[2]
        self.keys, self.values = self._fetched = fetched
        return fetched

    def make_mask(self, n_tokens: int, **options: Any) -> Any:
        """The causal (and windowed) mask of ``n_tokens`` behind the prefix."""
        settings = {"return_array": False, "window_size": None, **options}
        return create_attention_mask(n_tokens, offset=self.prefix_tokens, **settings)


@dataclass(frozen=True)
class Split:
    """How a calibration sequence is cut.

    Attributes:
        prefix: tokens whose vectors are differentiated.
        suffix: tokens whose loss counts.
        gap: tokens between a vector and the first query that counts.
    """

    prefix: int = 512
    suffix: int = 512
    gap: int = 64

    def __post_init__(self) -> None:
        if self.suffix < 2 or self.gap < 0 or self.prefix - self.gap <= SINKS:
            raise ValueError(
                f"prefix={self.prefix} must exceed gap={self.gap} by more than {SINKS}, and suffix={self.suffix} be at "
                "least 2"
            )

    @property
    def tokens(self) -> int:
        """Of a sequence."""
        return self.prefix + self.suffix

    def rows(self, max_size: int | None) -> slice:
        """Tokens of the prefix whose gradients count, on a layer with a sliding window only those it still sees."""
        gap = self.gap if max_size is None else min(self.gap, max_size // 4)
        first = SINKS if max_size is None else max(SINKS, self.prefix - max_size + 1)
        return slice(min(first, self.prefix - gap - 1), self.prefix - gap)


DEFAULT_SPLIT: Final = Split()


def window_sizes(model: Module, layers: Sequence[int]) -> dict[int, int | None]:
    """The sliding window of each layer, None for full attention."""
    own = own_caches(model)
    parts = {layer: getattr(own[layer], "caches", [own[layer]]) for layer in layers}
    return {
        layer: next((part.max_size for part in inner if type(part) is RotatingKVCache), None)
        for layer, inner in parts.items()
    }


def fisher_matrices(
    model: Module,
    sequences: NDArray[np.int32],
    layers: Sequence[int],
    ropes: dict[int, LayerRopes],
    *,
    split: Split = DEFAULT_SPLIT,
    on_sequence: OnSequence | None = None,
) -> dict[int, NDArray[np.float64]]:
    """E[g gᵀ] of old tokens' vectors, per layer.

    Args:
        model: an mlx-lm model.
        sequences: ``[S, split.tokens]`` token ids.
        layers: caches to measure; memory grows with their N² and with ``prefix · N`` of each.
        ropes: of each of them.
        split: of the sequences.
        on_sequence: called after each.

    Returns:
        By layer, ``[N, N]`` fp64 in nats² per value².

    Raises:
        ValueError: sequences of another length, a gradient that is not finite, naming the layer.
    """
    if sequences.ndim != 2 or sequences.shape[1] != split.tokens:
        raise ValueError(f"sequences must be [S, {split.tokens}], got {list(sequences.shape)}")
    windows = window_sizes(model, layers)
    sums: dict[int, NDArray[np.float32]] = {}
    counts = dict.fromkeys(layers, 0)
    for number, ids in enumerate(sequences):
        for gradients in _prefix_gradients(model, ids, split, layers, ropes, seed=number):
            for layer, (of_keys, of_values) in zip(layers, gradients, strict=True):
                rows = split.rows(windows[layer])
                g = np.array(mx.concatenate([joined(of_keys), joined(of_values)], axis=-1)[0], dtype=np.float32)[rows]
                if not np.isfinite(g).all():
                    raise ValueError(f"gradients of layer {layer} must be finite: sequence {number} of the text")
                product = g.T @ g
                sums[layer] = sums[layer] + product if layer in sums else product
                counts[layer] += len(g)
        if on_sequence is not None:
            on_sequence()
    return {layer: sums[layer].astype(np.float64) / counts[layer] for layer in layers}


def _prefix_gradients(
    model: Module,
    ids: NDArray[np.int32],
    split: Split,
    layers: Sequence[int],
    ropes: dict[int, LayerRopes],
    seed: int,
) -> Iterator[list[tuple[mx.array, mx.array]]]:
    """Gradients of keys and values ``[1, H, P, D]`` of each layer, for the text's labels and for drawn ones."""
    watched = {layer: ProbeCache() for layer in ropes}
    filled = probed_caches(model, watched)
    mx.eval(model(mx.array(ids[None, : split.prefix]), cache=filled))
    held = {layer: probe.seen for layer, probe in watched.items() if probe.seen is not None}
    tokens = mx.array(ids[split.prefix : -1])

    def loss(errors: list[tuple[mx.array, mx.array]], labels: mx.array) -> tuple[mx.array, mx.array]:
        added = dict(zip(layers, errors, strict=True))
        parts = {layer: PrefixCache(pair, ropes[layer], added.get(layer)) for layer, pair in held.items()}
        logits = model(tokens[None], cache=replaced_parts(filled, parts))[0].astype(mx.float32)
        return cross_entropy(logits, labels, reduction="sum"), logits

    differentiate: Any = mx.value_and_grad(loss)
    # fp32 zeros: gradients arrive in fp32 even where the model computes in fp16.
    zeros = [tuple(mx.zeros(x.shape, dtype=mx.float32) for x in held[layer]) for layer in layers]
    (_, logits), gradients = differentiate(zeros, mx.array(ids[split.prefix + 1 :]))
    drawn = mx.random.categorical(logits, key=mx.random.key(seed))
    mx.eval(gradients, drawn)
    yield gradients
    _, gradients = differentiate(zeros, drawn)
    mx.eval(gradients)
    yield gradients


def replaced_parts(filled: Sequence[Any], parts: dict[int, PrefixCache]) -> list[Any]:
    """Copies of caches after a prefix, with other attention parts; states of other kinds go on from the prefix."""
    made: list[Any] = []
    for layer, cache in enumerate(filled):
        inner = getattr(cache, "caches", None)
        if layer not in parts:
            made.append(copy.deepcopy(cache))
        elif inner is None:
            made.append(parts[layer])
        else:
            swapped = [parts[layer] if isinstance(part, ProbeCache) else copy.deepcopy(part) for part in inner]
            made.append(type(cache)(*swapped))
    return made
