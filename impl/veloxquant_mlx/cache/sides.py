"""Keys and values of one layer apart, each coded by a quantizer, with tokens kept at another width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Self

import mlx.core as mx

from veloxquant_mlx.cache.outliers import OutlierTokens
from veloxquant_mlx.cache.storage import HeldArray, OnEncoded, Side, State
from veloxquant_mlx.cache.store import LayerStore
from veloxquant_mlx.methods import Role
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver, KeyNormTracker
from veloxquant_mlx.quantizers.base import Quantizer


class SidesStore(LayerStore):
    """Keys and values as two :class:`Side` objects, and outliers beside them.

    Args:
        spec: the ``LayerSpec`` that says how to store.
        outlier_observer, distortion_observer: those of the cache that this one stores for.
    """

    def __init__(
        self, spec: Any, outlier_observer: KeyNormObserver | None, distortion_observer: DistortionObserver | None
    ) -> None:
        self.spec = spec
        self.distortion_observer = distortion_observer
        self.keys, self.values = (
            Side(quantizer, sinks=spec.sinks, window=spec.window, on_encoded=self._reporter(role))
            for quantizer, role in ((spec.keys, "keys"), (spec.values, "values"))
        )
        self._tracker: KeyNormTracker | None = None
        self._outliers: OutlierTokens | None = None
        if spec.outlier_keys is not None and spec.outlier_values is not None:
            self._tracker = KeyNormTracker(outlier_observer, spec.layer)
            reporters = self._reporter("outlier_keys"), self._reporter("outlier_values")
            self._outliers = OutlierTokens(spec.outlier_keys, spec.outlier_values, reporters)

    def _reporter(self, role: str) -> OnEncoded | None:
        observer, layer = self.distortion_observer, self.spec.layer  # a copy shares the function: it must not hold self
        if observer is None:
            return None

        def on_encoded(x: mx.array, decoded: mx.array, used: Quantizer) -> None:
            observer.observe(x, decoded, quantizer=used, layer=layer, role=role)

        return on_encoded

    def attach_outlier_observer(self, observer: KeyNormObserver) -> None:
        """Let ``observer`` flag the tokens to come, beside the norms of those that came.

        Raises:
            ValueError: the spec has no width for outliers.
        """
        if self._tracker is None:
            raise ValueError(f"layer {self.spec.layer} keeps no outlier tokens that an outlier_observer could flag")
        self._tracker.attach(observer)

    def append(self, keys: mx.array, values: mx.array, offset: int) -> None:
        """Store ``[B, H, L, D]`` fp16.

        Raises:
            RuntimeError: outliers are kept and there is no observer to flag them.
        """
        if self._tracker is not None and self._outliers is not None:
            self._outliers.add(self._tracker.flag(keys), offset, keys, values)
        self.keys.append(keys)
        self.values.append(values)

    def fetch(self, offset: int, tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Decode the last ``tokens`` tokens to ``[B, H, tokens, D]``."""
        fetched = []
        for side, kept in self._sides():
            skip = side.tokens - tokens
            x = side.fetch(dtype, skip)
            if self._outliers is not None and kept is not None:
                start, stop = side.coded_range
                x = self._outliers.overlay(x, kept, offset - tokens, start - skip, stop - skip)
            fetched.append(x)
        return fetched[0], fetched[1]

    def _sides(self) -> list[tuple[Side, Any]]:
        kept = self._outliers
        return [(self.keys, kept and kept.keys), (self.values, kept and kept.values)]

    def replace(self, role: Role, x: mx.array) -> None:
        """Code ``x`` anew as all keys or all values.

        Raises:
            ValueError: outlier tokens are kept.
        """
        if self._outliers is not None:
            raise ValueError(f"{role} cannot be assigned where outlier tokens are kept (layer {self.spec.layer})")
        old: Side = getattr(self, role)
        side = Side(old.quantizer, sinks=old.sinks, window=old.window, on_encoded=old.on_encoded)
        side.append(x)
        setattr(self, role, side)

    def check(self, where: str, offset: int, size: int) -> None:
        """Raise ValueError unless the counts of a loaded state are those of its arrays."""
        for side, role in ((self.keys, "keys"), (self.values, "values")):
            side.check(f"{where}: {role}")
            if not size <= side.tokens <= offset or (self.spec.max_size is None and side.tokens < offset):
                raise ValueError(f"{where}: offset is {offset}, but {side.tokens} tokens of {role} are held")
        if len({side.shape and side.shape[0] for side, _ in self._sides()}) > 1:
            raise ValueError(f"{where}: keys and values are of different numbers of sequences")
        if self._outliers is not None:
            self._outliers.check(f"{where}: outliers", self.keys.shape, offset)

    def begin_step(self, offset: int) -> None:
        """Free what a sliding window has left behind, in steps."""
        if self.spec.max_size is None:
            return
        for side, _ in self._sides():
            side.drop_front(self.spec.max_size)
        if self._outliers is not None:
            self._outliers.drop_before(offset - self.spec.max_size)

    def trim(self, n: int, offset: int) -> None:
        """Forget the last ``n`` tokens."""
        for side, kept in self._sides():
            cut = side.trim(n)
            if cut and side.tail is not None and self._outliers is not None and kept is not None:
                side.tail = self._outliers.overlay(side.tail, kept, offset - cut, 0, cut)
        if self._outliers is not None:
            self._outliers.truncate(offset)

    def rows(self, index: slice) -> Self:
        """A copy of some sequences of the batch, with the same observers."""
        part = copy.copy(self)
        part.keys, part.values = copy.deepcopy(self.keys), copy.deepcopy(self.values)
        part._outliers, part._tracker = copy.deepcopy(self._outliers), copy.deepcopy(self._tracker)
        for held in (part.keys, part.values, part._outliers, part._tracker):
            if held is not None:
                held.rows(index)
        return part

    def shapes(self) -> list[tuple[int, int, int]]:
        """``(B, H, D)`` of keys and values; empty when nothing was ever stored."""
        return [side.shape for side, _ in self._sides() if side.shape is not None]

    def tokens_held(self) -> tuple[int, int]:
        """Tokens of keys, and of values."""
        return self.keys.tokens, self.values.tokens

    def held_arrays(self, size: int) -> list[HeldArray]:
        """Every array that is held for tokens."""
        held = self.keys.held_arrays("keys", self.keys.tokens - size)
        held += self.values.held_arrays("values", self.values.tokens - size)
        return held if self._outliers is None else held + self._outliers.held_arrays()

    def static_arrays(self) -> list[mx.array]:
        """Codebooks, rotations and calibrations in use."""
        arrays = self.keys.coded.static_arrays() + self.values.coded.static_arrays()
        return arrays if self._outliers is None else arrays + self._outliers.static_arrays()

    def values_held(self, size: int) -> int:
        """Stored values of the last ``size`` tokens."""
        return sum(side.values_held(side.tokens - size) for side, _ in self._sides())

    def formula_nbytes(self, size: int) -> Fraction:
        """Bytes in use from token counts and the quantizers' formulas alone, no array asked."""
        total = sum((side.formula_bytes(side.tokens - size) for side, _ in self._sides()), Fraction(0))
        if self._outliers is not None and self.keys.shape is not None:
            total += self._outliers.formula_bytes(self.keys.shape[1])
        return total

    def state(self) -> State:
        """Keys, values, outliers with the norms beside which they are judged, counts."""
        keys, values = self.keys.state(), self.values.state()
        outliers = [] if self._outliers is None else self._outliers.state()
        norms = None if self._tracker is None else self._tracker.norms()
        if norms is not None:
            outliers.append(norms)
        return [*keys, *values, *outliers, len(keys), len(values)]

    def load_state(self, state: Sequence[Any], offset: int) -> None:
        """Take what :meth:`state` gave.

        Raises:
            ValueError: outliers are kept and the norms beside which they are judged are missing.
        """
        *arrays, n_keys, n_values = state
        self.keys.load_state(arrays[:n_keys])
        self.values.load_state(arrays[n_keys : n_keys + n_values])
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
