"""The packed tokens of one layer: store, decode, take back, save, count."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models import base as mlx_lm_base

from veloxquant_mlx.cache.outliers import OutlierTokens
from veloxquant_mlx.cache.spec import LayerSpec
from veloxquant_mlx.cache.storage import HeldArray, OnEncoded, Side, check_count
from veloxquant_mlx.methods import Role
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver, KeyNormTracker
from veloxquant_mlx.quantizers.base import Quantizer, half


def causal_mask(n_new: int, offset: int, window_size: int | None, left_padding: mx.array | None = None) -> mx.array:
    """mlx-lm's boolean causal mask, ``[n_new, offset + n_new]``, with a batch axis where there is padding."""
    mask: mx.array = mlx_lm_base.create_causal_mask(n_new, offset, window_size=window_size, left_padding=left_padding)
    return mask


def fetch_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype that attention reads: the caller's on a GPU, fp32 on CPU, where only fp32 products are fast."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu, 0) else dtype


def bits_in_use(held_arrays: Sequence[HeldArray]) -> Fraction:
    """Bits of the slots in use."""
    in_use = (Fraction(held.array.nbytes * held.used_slots * 8, held.slots) for held in held_arrays)
    return sum(in_use, Fraction(0))


class TokenStore(ABC):
    """What one sequence and a batch of sequences answer alike: what is held, and what it costs."""

    state: Any
    """Arrays and scalars from which :meth:`from_state` restores the cache, without its observers."""

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """The cache that has this :attr:`state`.

        Raises:
            ValueError: outliers are kept and the norms beside which they are judged are missing.
        """
        made = cls.__new__(cls)
        made.state = tuple(state)
        return made

    @abstractmethod
    def empty(self) -> bool:
        """Whether nothing was ever stored."""

    @abstractmethod
    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Everything attention may read, decoded, in the dtype that was last stored."""

    @abstractmethod
    def held_arrays(self) -> list[HeldArray]:
        """Every array that is held for tokens."""

    @abstractmethod
    def values_held(self) -> int:
        """Stored values: batch x heads x tokens x (key_dim + value_dim), padding not counted."""

    @property
    def keys(self) -> mx.array | None:
        """The decoded keys, None when empty."""
        return None if self.empty() else self.keys_and_values()[0]

    @property
    def values(self) -> mx.array | None:
        """The decoded values, None when empty."""
        return None if self.empty() else self.keys_and_values()[1]

    @keys.setter
    def keys(self, keys: mx.array | None) -> None:
        self._assign("keys", keys)

    @values.setter
    def values(self, values: mx.array | None) -> None:
        self._assign("values", values)

    def _assign(self, role: Role, x: mx.array | None) -> None:
        """What models do that assign one side: keep what is held where ``x`` is equal to it, else code ``x`` anew.

        Evaluates ``x``, and with it whatever ``mx.depends`` has tied to it.

        Raises:
            ValueError: another shape than that in which the side is read.
        """
        held: mx.array | None = getattr(self, role)
        if x is None and held is None:
            return
        if x is None or held is None or x.shape != held.shape:
            shapes = [None if array is None else tuple(array.shape) for array in (held, x)]
            raise ValueError(
                f"{role} can be assigned in the shape in which they are read, {shapes[0]}, got {shapes[1]}"
            )
        if not mx.array_equal(x, held, equal_nan=True).item():
            self._replace(role, x)

    @abstractmethod
    def _replace(self, role: Role, x: mx.array) -> None:
        """Hold ``x``, of the shape that :meth:`keys_and_values` gives, on one side."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens."""
        return sum(held.array.nbytes for held in self.held_arrays())

    def bits_per_value(self) -> Fraction:
        """Bits in use per stored key or value, from the arrays held.

        Raises:
            ValueError: the cache holds no token.
        """
        values = self.values_held()
        if not values:
            raise ValueError("a cache without tokens has no bits per value")
        return bits_in_use(self.held_arrays()) / values


class PackedSequence(TokenStore):
    """Packed keys and values of one layer for one sequence, or for several in lockstep.

    Keys and values enter as fp16 (finite values beyond its range as its ends) and leave decoded; nothing decoded is
    kept.

    Args:
        spec: how to store.
        outlier_observer: flags tokens for ``spec.outlier_keys`` and ``spec.outlier_values``; a cache whose spec has
            these stores nothing without one (:meth:`attach_outlier_observer`).
        distortion_observer: is told of everything that is encoded.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        outlier_observer: KeyNormObserver | None = None,
        distortion_observer: DistortionObserver | None = None,
    ) -> None:
        self.spec = spec
        self.offset = 0
        self.outlier_observer = outlier_observer
        self.distortion_observer = distortion_observer
        self.dtype_name = "float16"
        self._beyond = 0  # tokens before a sliding window that the last pass read
        self._keys, self._values = (
            Side(quantizer, sinks=spec.sinks, window=spec.window, on_encoded=self._reporter(role))
            for quantizer, role in ((spec.keys, "keys"), (spec.values, "values"))
        )
        self._tracker: KeyNormTracker | None = None
        self._outliers: OutlierTokens | None = None
        if spec.outlier_keys is not None and spec.outlier_values is not None:
            self._tracker = KeyNormTracker(outlier_observer, spec.layer)
            reporters = self._reporter("outlier_keys"), self._reporter("outlier_values")
            self._outliers = OutlierTokens(spec.outlier_keys, spec.outlier_values, reporters)

    @property
    def max_size(self) -> int | None:
        """The layer's sliding window in tokens, None for full attention; mlx-lm's ``RotatingKVCache`` names it so."""
        return self.spec.max_size

    def _reporter(self, role: str) -> OnEncoded | None:
        observer, layer = self.distortion_observer, self.spec.layer  # a copy shares the function: it must not hold self
        if observer is None:
            return None

        def on_encoded(x: mx.array, decoded: mx.array, used: Quantizer) -> None:
            observer.observe(x, decoded, quantizer=used, layer=layer, role=role)

        return on_encoded

    def attach_outlier_observer(self, observer: KeyNormObserver) -> None:
        """Let ``observer`` flag the tokens to come, as in a cache restored from its state.

        The norms before them are part of the state (rounded to fp32), so flags go on as if the cache had never been
        saved; the observer's report counts from here on.

        Raises:
            ValueError: the spec has no width for outliers.
        """
        if self._tracker is None:
            raise ValueError(f"layer {self.spec.layer} keeps no outlier tokens that an outlier_observer could flag")
        self.outlier_observer = observer
        self._tracker.attach(observer)

    def store(self, keys: mx.array, values: mx.array) -> None:
        """Append ``[B, H, L, D]``.

        Raises:
            RuntimeError: outliers are kept and there is no observer to flag them.
        """
        self.dtype_name = str(keys.dtype).removeprefix("mlx.core.")
        keys, values = half(keys), half(values)
        if self._tracker is not None and self._outliers is not None:
            self._outliers.add(self._tracker.flag(keys), self.offset, keys, values)
        self._keys.append(keys)
        self._values.append(values)
        self.offset += keys.shape[2]

    def fetch(self, tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Decode the last ``tokens`` tokens to ``[B, H, tokens, D]``."""
        fetched = []
        for side, kept in self._sides():
            skip = side.tokens - tokens
            x = side.fetch(dtype, skip)
            if self._outliers is not None and kept is not None:
                start, stop = side.coded_range
                x = self._outliers.overlay(x, kept, self.offset - tokens, start - skip, stop - skip)
            fetched.append(x)
        return fetched[0], fetched[1]

    def _sides(self) -> list[tuple[Side, Any]]:
        kept = self._outliers
        return [(self._keys, kept and kept.keys), (self._values, kept and kept.values)]

    def drop_old(self) -> None:
        """Free what a sliding window has left behind, in steps: before tokens come, for the layers that share these
        keys and values read them after.
        """
        if self.spec.max_size is None:
            return
        for side, _ in self._sides():
            side.drop_front(self.spec.max_size)
        if self._outliers is not None:
            self._outliers.drop_before(self.offset - self.spec.max_size)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Everything that attention has read, decoded, in the dtype that was last stored.

        On a sliding-window layer that is more than :meth:`size` after a pass of several tokens.
        """
        return self.fetch(self.size() + self._beyond, getattr(mx, self.dtype_name))

    def _replace(self, role: Role, x: mx.array) -> None:
        if self._outliers is not None:
            raise ValueError(f"{role} cannot be assigned where outlier tokens are kept (layer {self.spec.layer})")
        old = self._keys if role == "keys" else self._values
        side = Side(old.quantizer, sinks=old.sinks, window=old.window, on_encoded=old.on_encoded)
        side.append(half(x))
        setattr(self, f"_{role}", side)

    def size(self) -> int:
        """Tokens that attention can read."""
        return self.offset if self.spec.max_size is None else min(self.offset, self.spec.max_size)

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return self._keys.shape is None

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back: always, but for a sliding window that has dropped some."""
        return self.spec.max_size is None or self.offset < self.spec.max_size

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        self._beyond = 0
        for side, kept in self._sides():
            cut = side.trim(n)
            if cut and side.tail is not None and self._outliers is not None and kept is not None:
                side.tail = self._outliers.overlay(side.tail, kept, self.offset - cut, 0, cut)
        if self._outliers is not None:
            self._outliers.truncate(self.offset)
        return n

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars from which :meth:`from_state` restores the cache (not its observers).

        The norms beside which outliers are judged are among them.
        """
        keys, values = self._keys.state(), self._values.state()
        outliers = [] if self._outliers is None else self._outliers.state()
        norms = None if self._tracker is None else self._tracker.norms()
        if norms is not None:
            outliers.append(norms)
        counts = (len(keys), len(values), self.offset, self.dtype_name)
        return *keys, *values, *outliers, *counts, self.spec.to_json()

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        *arrays, n_keys, n_values, offset, dtype_name, spec = state
        if getattr(self, "spec", None) != LayerSpec.from_json(spec):
            PackedSequence.__init__(self, LayerSpec.from_json(spec))
        self.offset = offset
        self.dtype_name = dtype_name
        self._beyond = 0
        self._keys.load_state(arrays[:n_keys])
        self._values.load_state(arrays[n_keys : n_keys + n_values])
        if self._outliers is not None and self._tracker is not None:
            outliers = arrays[n_keys + n_values :]
            norms = outliers.pop() if isinstance(outliers[-1], mx.array) else None
            if norms is None and offset:
                raise ValueError(
                    f"layer {self.spec.layer} keeps outlier tokens, but its state of {offset} tokens lacks the key "
                    "norms that the next ones are judged by: an earlier version saved it; fill the cache anew"
                )
            self._tracker.load_norms(norms)
            self._outliers.load_state(outliers)
        self._check_state()

    def _check_state(self) -> None:
        """Raise ValueError unless the counts of a state are those of its arrays."""
        where = f"the state of layer {self.spec.layer}"
        check_count(f"{where}: offset", self.offset)
        if self.dtype_name not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"{where}: dtype must be float16, bfloat16 or float32, got {self.dtype_name!r}")
        for side, role in ((self._keys, "keys"), (self._values, "values")):
            side.check(f"{where}: {role}")
            if not self.size() <= side.tokens <= self.offset or (self.max_size is None and side.tokens < self.offset):
                raise ValueError(f"{where}: offset is {self.offset}, but {side.tokens} tokens of {role} are held")
        if len({side.shape and side.shape[0] for side, _ in self._sides()}) > 1:
            raise ValueError(f"{where}: keys and values are of different numbers of sequences")
        if self._outliers is not None:
            self._outliers.check(f"{where}: outliers", self._keys.shape, self.offset)

    def rows(self, index: slice) -> Self:
        """A cache of some sequences of a lockstep batch, with the same observers."""
        part = copy.copy(self)
        part._keys, part._values = copy.deepcopy(self._keys), copy.deepcopy(self._values)
        part._outliers, part._tracker = copy.deepcopy(self._outliers), copy.deepcopy(self._tracker)
        part._keys.rows(index)
        part._values.rows(index)
        if part._outliers is not None:
            part._outliers.rows(index)
        if part._tracker is not None:
            part._tracker.rows(index)
        return part

    @property
    def n_batch(self) -> int:
        """Sequences in lockstep; 1 when empty."""
        return 1 if self._keys.shape is None else self._keys.shape[0]

    def shapes(self) -> list[tuple[int, int, int]]:
        """``(B, H, D)`` of keys and values; empty when nothing was ever stored."""
        return [side.shape for side, _ in self._sides() if side.shape is not None]

    def _skip(self, side: Side) -> int:
        return side.tokens - self.size()

    def held_arrays(self) -> list[HeldArray]:
        """Every array that is held for tokens."""
        held = self._keys.held_arrays("keys", self._skip(self._keys))
        held += self._values.held_arrays("values", self._skip(self._values))
        return held if self._outliers is None else held + self._outliers.held_arrays()

    def static_arrays(self) -> list[mx.array]:
        """Codebooks, rotations and calibrations in use: not growing with tokens."""
        arrays = self._keys.coded.static_arrays() + self._values.coded.static_arrays()
        if self._outliers is not None:
            arrays += self._outliers.static_arrays()
        return list({id(array): array for array in arrays}.values())

    def tokens_held(self) -> tuple[int, int]:
        """Tokens of which keys, and of which values, are stored; what a sliding window left behind is not counted."""
        keys, values = (min(side.tokens, self.max_size or side.tokens) for side, _ in self._sides())
        return keys, values

    def values_held(self) -> int:
        """Stored values: batch x heads x tokens x (key_dim + value_dim)."""
        return sum(side.values_held(self._skip(side)) for side, _ in self._sides())

    def formula_nbytes(self) -> Fraction:
        """Bytes in use from token counts and the quantizers' formulas alone, no array asked."""
        total = sum((side.formula_bytes(self._skip(side)) for side, _ in self._sides()), Fraction(0))
        if self._outliers is not None and self._keys.shape is not None:
            total += self._outliers.formula_bytes(self._keys.shape[1])
        return total
