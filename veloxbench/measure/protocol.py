"""How tokens are fed through a cache: attention always reads what the cache stores.

Both protocols are generators: they hold one step's logits at a time, and a caller that interleaves two of
them (one per arm) holds one step's logits per arm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxbench.errors import UsageError
from veloxbench.methods.cache_under_test import arrays_of


@dataclass(frozen=True)
class Chunked:
    """Chunks of ``chunk`` tokens; every key and value of a chunk is stored before the chunk attends to it.

    One forward pass per chunk. Tokens at positions below ``score_from`` are read, not scored.
    """

    sequences: int
    length: int
    chunk: int = 64
    score_from: int = 64
    name: Literal["chunked"] = "chunked"

    def __post_init__(self) -> None:
        _positive(self, "sequences", "length", "chunk")
        if not 0 <= self.score_from < self.length:
            raise UsageError(f"chunked: score_from {self.score_from} must lie in 0..{self.length - 1}")

    @property
    def n_tokens(self) -> int:
        """Tokens fed per sequence."""
        return self.length

    @property
    def n_scored(self) -> int:
        """Positions scored per sequence."""
        return self.length - self.score_from

    def windows(self) -> Iterator[tuple[int, int]]:
        """``(start, stop)`` of each forward pass."""
        for start in range(0, self.length, self.chunk):
            yield start, min(start + self.chunk, self.length)


@dataclass(frozen=True)
class Decode:
    """A prefix is prefilled through the cache, then ``steps`` tokens are fed one at a time, teacher-forced.

    Only those steps are scored. The reference protocol: it is how a model generates.
    """

    sequences: int
    prefix: int
    steps: int
    prefill_chunk: int = 2048
    """mlx-lm's own prefill step."""
    name: Literal["decode"] = "decode"

    def __post_init__(self) -> None:
        _positive(self, "sequences", "prefix", "steps", "prefill_chunk")

    @property
    def n_tokens(self) -> int:
        """Tokens fed per sequence."""
        return self.prefix + self.steps

    @property
    def n_scored(self) -> int:
        """Positions scored per sequence."""
        return self.steps

    @property
    def score_from(self) -> int:
        """First scored position."""
        return self.prefix

    def windows(self) -> Iterator[tuple[int, int]]:
        """``(start, stop)`` of each forward pass."""
        for start in range(0, self.prefix, self.prefill_chunk):
            yield start, min(start + self.prefill_chunk, self.prefix)
        for start in range(self.prefix, self.prefix + self.steps):
            yield start, start + 1


Protocol = Chunked | Decode


def _positive(protocol: Chunked | Decode, *names: str) -> None:
    for name in names:
        value = getattr(protocol, name)
        if value < 1:
            raise UsageError(f"{protocol.name}: {name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class ScoredLogits:
    """Logits ``[S, n, V]`` of the positions ``first .. first + n - 1`` and the tokens ``[S, n]`` that followed."""

    first: int
    logits: mx.array
    targets: NDArray[np.int32]


def feed(
    model: Module, caches: Sequence[Any], tokens: NDArray[np.int32], protocol: Protocol
) -> Iterator[ScoredLogits | None]:
    """Feed ``tokens[:, :-1]`` through ``caches`` and yield each pass's scored logits, evaluated.

    Args:
        caches: one per layer, empty; they hold every token when the generator ends.
        tokens: ``[S, protocol.n_tokens + 1]``; the last one is only a target.
    Yields:
        One item per forward pass: its scored logits, or ``None`` where nothing of it is scored (the
        vocabulary projection is then never computed).
    """
    if tokens.shape[1] != protocol.n_tokens + 1:
        raise UsageError(f"{protocol.name} needs {protocol.n_tokens + 1} tokens a sequence, not {tokens.shape[1]}")
    for start, stop in protocol.windows():
        logits = model(mx.array(tokens[:, start:stop]), cache=caches)
        first = max(start, protocol.score_from)
        state = [arrays_of(cache) for cache in caches]
        if first >= stop:
            mx.eval(state)
            yield None
            continue
        scored = logits[:, first - start :]
        mx.eval(scored, state)
        yield ScoredLogits(first, scored, tokens[:, first + 1 : stop + 1])
