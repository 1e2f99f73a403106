"""Keys and values of one layer as entropy-coded coefficients of one vector a token.

Tokens lie in time order as ``[fp16 sinks | old | … | young]``. A token is coded at the smallest step when it comes, and
coded anew at larger ones as it ages, from its own decoded version: never from the original, which is gone. What has
aged is decided before new tokens are stored, so a chunk's tokens are all young while the chunk reads them. All layers
age alike, and a layer that is predicted from one below is handed that one's decoded vectors within the step.

Each age is coded in blocks that decode alone. Old tokens lie in blocks cut at every 256th position; behind the last
such cut there is one block up to the last 32nd position and one for the rest, which alone changes as tokens age.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Final, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_mlx.cache.storage import HeldArray, State
from veloxquant_mlx.cache.store import LayerStore
from veloxquant_mlx.codes.entropy import EntropyBlocks, coded_nbytes, decode_blocks, encode_blocks
from veloxquant_mlx.codes.layer import LayerCode, viewed
from veloxquant_mlx.methods import Role
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.transforms.klt import CachedShape

CALIBRATIONS: Final = "veloxquant_mlx.calibration.fisher_klt"
"""Where a saved cache's calibration is found: by name, for that module builds caches of this one's specs."""

LARGE_BLOCK: Final = 256
"""Tokens of a block of old tokens: the format's most, at which the lanes' states cost least."""
SMALL_BLOCK: Final = 32
"""Positions at which what is not a large block yet is cut: the most that is coded anew in a step of one token."""

Symbols = NDArray[np.int32]


@dataclass(frozen=True)
class Part:
    """A block: tokens ``[first, last)`` of one age."""

    tier: int
    first: int
    last: int


def cut_into_blocks(start: int, ends: Sequence[int], stop: int) -> list[Part]:
    """The blocks of tokens ``[start, stop)``: those up to ``ends[0]`` are of tier 0, the oldest, and so on."""
    parts = []
    for tier, (first, last) in enumerate(zip([start, *ends], [*ends, stop], strict=True)):
        if tier == 0:
            cuts = {cut for cut in range(0, last, LARGE_BLOCK) if cut > first}
            small = last // SMALL_BLOCK * SMALL_BLOCK
            cuts |= {small} if first < small < last else set()
        else:
            cuts = set(range(first + LARGE_BLOCK, last, LARGE_BLOCK))
        edges = [first, *sorted(cuts), last]
        parts += [Part(tier, a, b) for a, b in itertools.pairwise(edges) if b > a]
    return parts


@dataclass(frozen=True, eq=False)
class Handed:
    """What one layer has decoded in a step, for a layer above.

    Attributes:
        offset: tokens before the step.
        stop: tokens after it.
        first: position of the first vector.
        decoded: ``[B, stop − first, N]``, centred, as it is coded after the step.
        before: ``[B, offset − first, N]``, as it was coded before.
    """

    offset: int
    stop: int
    first: int
    decoded: mx.array
    before: mx.array


class Handoff(threading.local):
    """Where layers leave what they have decoded for the layers that are predicted from them, until these take it.

    Caches that were made together have one, with their copies. Sequences of a batch pass through the layers in the same
    order, so whoever reads takes the oldest entry. What nobody took, because a pass was broken off, is forgotten when
    its layer steps again, in these caches or in copies of them. Every thread has entries of its own.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Handed]] = {}

    def forget(self, readers: Iterable[int]) -> None:
        """A step begins for the layer below these readers: what waits for them is of another."""
        for reader in readers:
            self._waiting.pop(reader, None)

    def give(self, readers: Iterable[int], handed: Handed) -> None:
        """Leave an entry for each reader."""
        for reader in readers:
            self._waiting.setdefault(reader, deque()).append(handed)

    def take(self, reader: int, source: int, offset: int, stop: int, n_batch: int) -> Handed:
        """The entry of this step.

        Raises:
            RuntimeError: there is none.
        """
        waiting = self._waiting.get(reader)
        handed = waiting.popleft() if waiting else None
        if handed is None or (handed.offset, handed.stop, handed.decoded.shape[0]) != (offset, stop, n_batch):
            raise RuntimeError(
                f"layer {reader} is predicted from layer {source}, which decoded nothing for tokens {offset} to "
                f"{stop}: caches of one calibration must be updated layer by layer, all from the same token on"
            )
        return handed

    def __deepcopy__(self, memo: dict[int, Any]) -> Handoff:
        """Itself: copies of a cache meet in the same place."""
        return self


@dataclass(frozen=True)
class CodedSpec:
    """How one layer is stored.

    Attributes:
        calibration_sha256: hash of the calibration that made the code.
        path: where it lies; None where it was never saved.
        layer: index of the layer.
        sinks: first tokens kept in fp16 (0 on sliding-window layers).
        ages: for each tier but the oldest, the oldest first: tokens younger than this are coded more finely.
        max_size: sliding window of the layer in tokens, None for full attention.
        code: the layer's code.
        handoff: where the layers meet.
    """

    calibration_sha256: str
    path: str | None
    layer: int
    sinks: int
    ages: tuple[int, ...]
    max_size: int | None
    code: LayerCode = field(compare=False, repr=False)
    handoff: Handoff = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.ages) + 1 != len(self.code.tiers) or list(self.ages) != sorted(set(self.ages), reverse=True):
            raise ValueError(f"ages must fall, one for each of {len(self.code.tiers) - 1} finer tiers, got {self.ages}")
        if self.max_size is not None and self.sinks:
            raise ValueError(f"sinks must be 0 on a sliding-window layer, got {self.sinks}")

    def new_store(
        self, outlier_observer: KeyNormObserver | None = None, distortion_observer: DistortionObserver | None = None
    ) -> CodedStore:
        """An empty storage.

        Raises:
            ValueError: an observer was given; this code has no widths that one could steer.
        """
        if outlier_observer is not None or distortion_observer is not None:
            raise ValueError("entropy-coded caches take neither an outlier_observer nor a distortion_observer")
        return CodedStore(self)

    def to_json(self) -> str:
        """As JSON text, for saved caches: the calibration by hash and path, not its tables."""
        names = ("calibration_sha256", "path", "layer", "sinks", "ages", "max_size")
        return json.dumps({name: getattr(self, name) for name in names})

    @staticmethod
    def from_json(text: str) -> CodedSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: the calibration cannot be had.
        """
        fields = json.loads(text)
        calibrations = importlib.import_module(CALIBRATIONS)
        found = calibrations.find_calibration(fields["calibration_sha256"], fields["path"])
        spec: CodedSpec = found.spec(fields["layer"], fields["max_size"])
        if (spec.sinks, list(spec.ages)) != (fields["sinks"], fields["ages"]):
            raise ValueError(f"layer {spec.layer} was saved with other sinks or ages than its calibration has")
        return spec

    def __deepcopy__(self, memo: dict[int, Any]) -> CodedSpec:
        """Itself: it never changes, and its tables are large."""
        return self


class CodedStore(LayerStore):
    """Storage of one layer as ``spec`` says."""

    can_keep_decoded: ClassVar[bool] = True

    def __init__(self, spec: CodedSpec) -> None:
        self.spec = spec
        self._shape: CachedShape | None = None
        self._n_batch = 0
        self._start = self._stop = 0
        self._ends: list[int] = [0] * len(spec.ages)
        self._sink: tuple[mx.array, mx.array] | None = None
        self._words: list[mx.array] = []
        self._lengths: list[mx.array] = []
        self._fetched: tuple[int, mx.array, mx.array] | None = None  # first position, keys, values: until they are read

    # ---- what is held ----------------------------------------------------------------------------

    @property
    def _parts(self) -> list[Part]:
        return cut_into_blocks(self._start, self._ends, self._stop)

    def _blocks(self, row: int) -> EntropyBlocks:
        return EntropyBlocks(viewed(self._words[row]), viewed(self._lengths[row]))

    def _symbols(self, first: int, last: int) -> Symbols:
        """``[B, last − first, n]`` of coded tokens."""
        n = self.spec.code.transform.n_coefficients
        if last <= first:
            return np.zeros((self._n_batch, 0, n), np.int32)
        parts = self._parts
        used = [i for i, part in enumerate(parts) if part.last > first and part.first < last]
        begin = parts[used[0]].first
        rows = []
        for row in range(self._n_batch):
            blocks, pieces = self._blocks(row), []
            for tier in range(len(self._ends) + 1):
                own = [i for i in used if parts[i].tier == tier]
                if own:
                    pieces.append(decode_blocks(blocks, self.spec.code.tiers[tier].tables, own[0], own[-1] + 1))
            rows.append(np.concatenate(pieces)[first - begin : last - begin])
        return np.stack(rows)

    def _tier_of(self, first: int, last: int, ends: Sequence[int]) -> NDArray[np.int64]:
        return np.searchsorted(np.asarray(ends, dtype=np.int64), np.arange(first, last), side="right").astype(np.int64)

    def _values(self, symbols: Symbols, tiers: NDArray[np.int64]) -> NDArray[np.float32]:
        """What symbols stand for, each token at its tier."""
        values = np.empty(symbols.shape, np.float32)
        for tier, code in enumerate(self.spec.code.tiers):
            own = np.flatnonzero(tiers == tier)
            if len(own):
                values[:, own] = code.zone.values(symbols[:, own])
        return values

    def _rewrite(self, start: int, ends: Sequence[int], stop: int, first: int, symbols: Symbols | None) -> None:
        """Hold ``[start, stop)`` with these ends; ``symbols`` are those from ``first`` on, None where none is new."""
        old, new = self._parts, cut_into_blocks(start, ends, stop)
        places = {part: i for i, part in enumerate(old)}
        stale = [part for part in new if part not in places or (symbols is not None and part.last > first)]
        known = None
        if stale:
            begin, behind = stale[0].first, stale[-1].last
            held = self._symbols(begin, min(behind, first if symbols is not None else self._stop))
            known = held if symbols is None else np.concatenate([held, symbols[:, max(0, begin - first) :]], axis=1)
        words, lengths = [], []
        for row in range(self._n_batch):
            blocks, made = self._blocks(row), []
            for part in new:
                if part in stale:
                    assert known is not None
                    own = np.ascontiguousarray(known[row, part.first - begin : part.last - begin])
                    tables = self.spec.code.tiers[part.tier].tables
                    made.append(encode_blocks(own, tables, part.last - part.first))
                else:
                    made.append(blocks.take(places[part], places[part] + 1))
            joined = np.concatenate([each.words for each in made]) if made else np.zeros(0, np.uint16)
            words.append(mx.array(joined))
            lengths.append(mx.array(np.array([len(each.words) for each in made], np.uint32)))
        self._words, self._lengths = words, lengths
        self._start, self._ends, self._stop = start, list(ends), stop

    # ---- a step ----------------------------------------------------------------------------------

    def append(self, keys: mx.array, values: mx.array, offset: int) -> None:
        """Age what is held, then store ``[B, H, L, D]`` fp16 at the smallest step."""
        code, transform = self.spec.code, self.spec.code.transform
        x = transform.vectors(keys, values, offset)
        if self._shape is None:
            self._shape, self._n_batch = transform.shape, x.shape[0]
            empty = mx.zeros(0, dtype=mx.uint16), mx.zeros(0, dtype=mx.uint32)
            self._words, self._lengths = [empty[0]] * self._n_batch, [empty[1]] * self._n_batch
        stop, source = offset + x.shape[1], transform.below
        handed = None
        if source is not None:
            handed = self.spec.handoff.take(self.spec.layer, source, offset, stop, self._n_batch)
        room = max(0, self.spec.sinks - offset)
        if room:
            self._add_sinks(keys[:, :, :room], values[:, :, :room], offset)
            x = x[:, room:]
        if not self._words[0].size:
            self._start = self._stop = max(offset, self.spec.sinks)
            self._ends = [self._start] * len(self._ends)
        first = self._ends[0] if self._ends else self._stop
        ends = [
            max(end, self._start, min(self._stop, offset - age + 1))
            for end, age in zip(self._ends, self.spec.ages, strict=True)
        ]
        old_symbols = self._symbols(first, self._stop)
        old_tiers = self._tier_of(first, self._stop, self._ends)
        y = self._values(old_symbols, old_tiers)
        was = y
        tiers = self._tier_of(first, self._stop, ends)
        moved = np.flatnonzero(tiers != old_tiers)
        symbols = old_symbols
        if len(moved):
            y, symbols = y.copy(), symbols.copy()
            y[:, moved] += self._change_of_forecast(handed, first + moved)
            for tier in range(len(ends) + 1):
                own = moved[tiers[moved] == tier]
                if len(own):
                    symbols[:, own] = code.tiers[tier].quantize(y[:, own])
                    y[:, own] = code.tiers[tier].zone.values(symbols[:, own])
        if x.shape[1]:
            new = np.array(transform.encode(x, self._below(handed, stop - x.shape[1], stop)))
            new_symbols = code.tiers[-1].quantize(new)
            symbols = np.concatenate([symbols, new_symbols], axis=1)
            y = np.concatenate([y, code.tiers[-1].zone.values(new_symbols)], axis=1)
        coded_stop = max(self._start, stop) if x.shape[1] else self._stop
        decoded_first = first
        if not self.keep_decoded:
            decoded_first = self._start
            old = self._symbols(self._start, first)
            y = np.concatenate([code.tiers[0].zone.values(old), y], axis=1)
        decoded = self._transformed(y, self._below(handed, decoded_first, decoded_first + y.shape[1]))
        if code.readers:
            self._hand_on(decoded, decoded_first, was, first, handed, offset, stop)
        if x.shape[1] or len(moved):
            self._rewrite(self._start, ends, coded_stop, first, symbols)
        self._keep(decoded, decoded_first)

    def idle(self, offset: int) -> None:
        """A step that brings other sequences of a batch tokens and this one none."""
        if self._shape is None:
            return
        handed = None
        if self.spec.code.transform.below is not None:
            source = self.spec.code.transform.below
            handed = self.spec.handoff.take(self.spec.layer, source, offset, offset, self._n_batch)
        first = self._stop if self.keep_decoded else self._start
        symbols = self._symbols(first, self._stop)
        y = self._values(symbols, self._tier_of(first, self._stop, self._ends))
        decoded = self._transformed(y, self._below(handed, first, self._stop))
        if self.spec.code.readers:
            self._hand_on(decoded, first, y[:, :0], self._stop, handed, offset, offset)
        self._keep(decoded, first)

    def _transformed(self, y: NDArray[np.float32], below: mx.array | None) -> mx.array:
        """Centred vectors of coefficients, evaluated."""
        transform = self.spec.code.transform
        if not y.shape[1]:
            return mx.zeros((self._n_batch, 0, transform.shape.size))
        decoded = transform.decode(mx.array(y), below)
        mx.eval(decoded)
        return decoded

    def _add_sinks(self, keys: mx.array, values: mx.array, offset: int) -> None:
        new = (keys, values)
        if self._sink is not None and offset:
            new = tuple(mx.concatenate([held, x], axis=2) for held, x in zip(self._sink, new, strict=True))  # type: ignore[assignment]
        self._sink = (mx.contiguous(new[0]), mx.contiguous(new[1]))
        mx.eval(self._sink)

    def _below(self, handed: Handed | None, first: int, last: int) -> mx.array | None:
        if handed is None:
            return None
        if first < handed.first:
            raise RuntimeError(f"layer {self.spec.layer} needs tokens from {first} on and was handed {handed.first} on")
        return handed.decoded[:, first - handed.first : last - handed.first]

    def _change_of_forecast(self, handed: Handed | None, positions: NDArray[np.int64]) -> NDArray[np.float32] | float:
        """What the coefficients of tokens gain because the layer below is coded anew: ``[B, moved, n]``."""
        if handed is None:
            return 0.0
        at = mx.array(positions - handed.first)
        gone = mx.take(handed.before, at, axis=1) - mx.take(handed.decoded, at, axis=1)
        transform = self.spec.code.transform
        # encode(x, below) is linear: with x = mean and below = −e it gives the coefficients of the forecast of e
        zeros = mx.broadcast_to(transform.mean, (*gone.shape[:2], transform.mean.size))
        return np.array(transform.encode(zeros, -gone), dtype=np.float32)

    def _hand_on(
        self,
        decoded: mx.array,
        decoded_first: int,
        was: NDArray[np.float32],
        first: int,
        handed: Handed | None,
        offset: int,
        stop: int,
    ) -> None:
        """Leave the centred vectors, sinks included where they are in reach, for the layers above."""
        transform = self.spec.code.transform
        below = None
        if handed is not None:
            below = handed.before[:, first - handed.first : first - handed.first + was.shape[1]]
        before = self._transformed(was, below)
        before = mx.concatenate([decoded[:, : first - decoded_first], before], axis=1)
        at = decoded_first
        if self._sink is not None and decoded_first <= self.spec.sinks:
            sinks = transform.vectors(*self._sink, 0) - transform.mean
            decoded = mx.concatenate([sinks, decoded], axis=1)
            before = mx.concatenate([sinks[:, : min(offset, sinks.shape[1])], before], axis=1)
            at = 0
        mx.eval(decoded, before)
        self.spec.handoff.give(self.spec.code.readers, Handed(offset, stop, at, decoded, before))

    def _keep(self, decoded: mx.array, first: int) -> None:
        """What attention reads, until :meth:`fetch` takes it."""
        transform = self.spec.code.transform
        if decoded.shape[1]:
            keys, values = transform.keys_and_values(decoded, first)
        else:
            keys, values = (mx.zeros((n_batch, heads, 0, dim)) for n_batch, heads, dim in self.shapes())
        if self._fetched is not None and self.keep_decoded:
            start, old_keys, old_values = self._fetched
            keys, values = (
                mx.concatenate([old[:, :, : first - start], new], axis=2)
                for old, new in ((old_keys, keys), (old_values, values))
            )
            first = start
        mx.eval(keys, values)
        self._fetched = (first, keys, values)

    def fetch(self, offset: int, tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Decode the last ``tokens`` tokens to ``[B, H, tokens, D]``.

        Raises:
            RuntimeError: the layer is predicted from another, and is read outside of a step.
        """
        if self._fetched is None:
            self._decode_alone()
        assert self._fetched is not None
        start, keys, values = self._fetched
        if not self.keep_decoded:
            self._fetched = None
        first = offset - tokens
        fetched = []
        for side, sink in zip((keys, values), self._sink or (None, None), strict=True):
            whole = side if first <= start else side[:, :, first - start :]
            if sink is not None and first < sink.shape[2]:
                whole = mx.concatenate([sink[:, :, first:].astype(whole.dtype), whole], axis=2)
            fetched.append(whole[:, :, :tokens].astype(dtype))
        return fetched[0], fetched[1]

    def _decode_alone(self) -> None:
        transform = self.spec.code.transform
        if transform.below is not None:
            raise RuntimeError(
                f"layer {self.spec.layer} is predicted from layer {transform.below}: it can be read in a step only, "
                "or with veloxquant_mlx.calibration.fisher_klt.decoded_caches"
            )
        self.decode(None)

    def decode(self, below: mx.array | None) -> mx.array:
        """Decode everything coded, for the next :meth:`fetch`.

        Args:
            below: centred vectors of the layer below for the same coded tokens, where the layer is predicted.

        Returns:
            This layer's, ``[B, T, N]``.
        """
        symbols = self._symbols(self._start, self._stop)
        y = self._values(symbols, self._tier_of(self._start, self._stop, self._ends))
        decoded = self._transformed(y, below)
        self._fetched = None
        self._keep(decoded, self._start)
        return decoded

    @property
    def start(self) -> int:
        """Position of the first coded token."""
        return self._start

    @property
    def stop(self) -> int:
        """Position behind the last one."""
        return self._stop

    def with_sinks(self, decoded: mx.array) -> tuple[int, mx.array]:
        """Position of the first centred vector, and ``decoded`` with those of the sinks before it."""
        if self._sink is None:
            return self._start, decoded
        transform = self.spec.code.transform
        return 0, mx.concatenate([transform.vectors(*self._sink, 0) - transform.mean, decoded], axis=1)

    def decoded_arrays(self) -> list[mx.array]:
        """What :attr:`keep_decoded` keeps."""
        return [] if self._fetched is None else list(self._fetched[1:])

    def replace(self, role: Role, x: mx.array) -> None:
        """Refused: keys and values are coded as one vector.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{role} cannot be assigned where they are coded with the other side (layer {self.spec.layer})"
        )

    def check(self, where: str, offset: int, size: int) -> None:
        """Raise ValueError unless the counts of a loaded state are those of its arrays."""
        counts = [self._start, *self._ends, self._stop]
        held = self.tokens_held()[0]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in counts) or counts != sorted(counts):
            raise ValueError(f"{where}: the positions of its blocks must be integers that rise, got {counts}")
        if self._shape is not None and (self._stop > max(offset, self._start) or not size <= held <= offset):
            raise ValueError(f"{where}: offset is {offset}, but {held} tokens are held")
        if not len(self._words) == len(self._lengths) == self._n_batch:
            raise ValueError(f"{where}: {self._n_batch} sequences, but words of {len(self._words)}")
        if any(lengths.size != len(self._parts) for lengths in self._lengths):
            raise ValueError(f"{where}: {len(self._parts)} blocks, but lengths of {[x.size for x in self._lengths]}")

    # ---- all else --------------------------------------------------------------------------------

    def trim(self, n: int, offset: int) -> None:
        """Forget the last ``n`` tokens; those left stay as coarse as they are."""
        if self._shape is None:
            return
        stop = max(self._start, min(self._stop, offset))
        if stop < self._stop:
            self._rewrite(self._start, [min(end, stop) for end in self._ends], stop, stop, None)
        if self._sink is not None and offset < self._sink[0].shape[2]:
            kept = tuple(mx.contiguous(side[:, :, :offset]) for side in self._sink)
            self._sink = (kept[0], kept[1]) if offset else None
        if self._fetched is not None:
            start, keys, values = self._fetched
            kept = tuple(mx.contiguous(side[:, :, : max(0, offset - start)]) for side in (keys, values))
            self._fetched = (start, kept[0], kept[1])

    def begin_step(self, offset: int) -> None:
        """Forget what a broken-off step left, and free tokens before a sliding window up to the last multiple of 32."""
        self.spec.handoff.forget(self.spec.code.readers)
        if self.spec.max_size is None:
            return
        start = (offset - self.spec.max_size) // SMALL_BLOCK * SMALL_BLOCK
        if start <= self._start:
            return
        self._rewrite(start, [max(end, start) for end in self._ends], self._stop, self._stop, None)
        if self._fetched is not None:
            first, keys, values = self._fetched
            kept = tuple(mx.contiguous(side[:, :, start - first :]) for side in (keys, values))
            self._fetched = (start, kept[0], kept[1])

    def rows(self, index: slice) -> Self:
        """A copy of some sequences of the batch."""
        part = copy.copy(self)
        part._words, part._lengths = self._words[index], self._lengths[index]
        part._n_batch = len(part._words)
        part._ends = list(self._ends)
        if self._sink is not None:
            part._sink = (mx.contiguous(self._sink[0][index]), mx.contiguous(self._sink[1][index]))
        if self._fetched is not None:
            first, keys, values = self._fetched
            part._fetched = (first, mx.contiguous(keys[index]), mx.contiguous(values[index]))
        return part

    def shapes(self) -> list[tuple[int, int, int]]:
        """``(B, H, D)`` of keys and values; empty when nothing was ever stored."""
        if self._shape is None:
            return []
        shape = self._shape
        return [
            (self._n_batch, shape.n_kv_heads, shape.key_dim),
            (self._n_batch, shape.n_value_heads, shape.value_dim),
        ]

    def _n_sinks(self) -> int:
        return 0 if self._sink is None else int(self._sink[0].shape[2])

    def tokens_held(self) -> tuple[int, int]:
        """Tokens of keys, and of values."""
        tokens = self._n_sinks() + self._stop - self._start
        return tokens, tokens

    def held_arrays(self, size: int) -> list[HeldArray]:
        """Sinks, and each sequence's words and lengths of blocks; nothing lies in reserve."""
        held = []
        if self._sink is not None:
            n = self._n_sinks()
            held = [HeldArray(f"{s}.sinks", x, n, n) for s, x in zip(("keys", "values"), self._sink, strict=True)]
        for row, arrays in enumerate(zip(self._words, self._lengths, strict=True)):
            held += [HeldArray(f"{row}.{name}", a, 1, 1) for name, a in zip(("words", "lengths"), arrays, strict=True)]
        return held

    def static_arrays(self) -> list[mx.array]:
        """Every table of the layer."""
        return self.spec.code.static_arrays()

    def values_held(self, size: int) -> int:
        """Stored values of the last ``size`` tokens."""
        return 0 if self._shape is None else self._n_batch * self._shape.size * size

    def formula_nbytes(self, size: int) -> Fraction:
        """Sinks by their count, blocks by the length that the symbols in them have under the tables."""
        if self._shape is None:
            return Fraction(0)
        total = 2 * self._n_batch * self._n_sinks() * self._shape.size
        symbols = self._symbols(self._start, self._stop)
        for part in self._parts:
            for row in range(self._n_batch):
                own = np.ascontiguousarray(symbols[row, part.first - self._start : part.last - self._start])
                total += coded_nbytes(own, self.spec.code.tiers[part.tier].tables, part.last - part.first)
        return Fraction(total)

    def state(self) -> State:
        """Each sequence's words and lengths, sinks, then counts."""
        pairs = [array for pair in zip(self._words, self._lengths, strict=True) for array in pair]
        counts = [self._n_batch, self._start, *self._ends, self._stop]
        return [*pairs, *(self._sink or (None, None)), *counts]

    def load_state(self, state: Sequence[Any], offset: int) -> None:
        """Take what :meth:`state` gave."""
        n_counts = 3 + len(self._ends)
        self._n_batch, self._start, *self._ends, self._stop = state[len(state) - n_counts :]
        *pairs, keys, values = state[: len(state) - n_counts]
        self._words, self._lengths = list(pairs[::2]), list(pairs[1::2])
        self._sink = None if keys is None else (keys, values)
        self._shape = self.spec.code.transform.shape if self._n_batch else None
        self._fetched = None
