"""The packed tokens of one layer: store, decode, take back, save, count."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models import base as mlx_lm_base

from veloxquant_mlx.cache.spec import spec_from_json
from veloxquant_mlx.cache.storage import HeldArray, check_count
from veloxquant_mlx.cache.store import LayerStore
from veloxquant_mlx.methods import Role
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.quantizers.base import half


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

    @keys.setter
    def keys(self, keys: mx.array | None) -> None:
        self._assign("keys", keys)

    @property
    def values(self) -> mx.array | None:
        """The decoded values, None when empty."""
        return None if self.empty() else self.keys_and_values()[1]

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
    kept. What is held, and how, is the business of the storage that ``spec`` makes.

    Args:
        spec: how to store.
        outlier_observer: flags tokens for ``spec.outlier_keys`` and ``spec.outlier_values``; a cache whose spec has
            these stores nothing without one (:meth:`attach_outlier_observer`).
        distortion_observer: is told of everything that is encoded.
    """

    def __init__(
        self,
        spec: Any,
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
        self.storage: LayerStore = spec.new_store(outlier_observer, distortion_observer)

    @property
    def max_size(self) -> int | None:
        """The layer's sliding window in tokens, None for full attention; mlx-lm's ``RotatingKVCache`` names it so."""
        size: int | None = self.spec.max_size
        return size

    def attach_outlier_observer(self, observer: KeyNormObserver) -> None:
        """Let ``observer`` flag the tokens to come, as in a cache restored from its state.

        The norms before them are part of the state (rounded to fp32), so flags go on as if the cache had never been
        saved; the observer's report counts from here on.

        Raises:
            ValueError: the spec has no width for outliers.
        """
        self.storage.attach_outlier_observer(observer)
        self.outlier_observer = observer

    def store(self, keys: mx.array, values: mx.array) -> None:
        """Append ``[B, H, L, D]``.

        Raises:
            RuntimeError: outliers are kept and there is no observer to flag them.
        """
        self.dtype_name = str(keys.dtype).removeprefix("mlx.core.")
        self.storage.append(half(keys), half(values), self.offset)
        self.offset += keys.shape[2]

    def fetch(self, tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Decode the last ``tokens`` tokens to ``[B, H, tokens, D]``."""
        return self.storage.fetch(self.offset, tokens, dtype)

    def begin_step(self) -> None:
        """Tokens are about to come: free what a sliding window has left behind, in steps; not later, for the layers
        that share these keys and values read them after.
        """
        self.storage.begin_step(self.offset)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Everything that attention has read, decoded, in the dtype that was last stored.

        On a sliding-window layer that is more than :meth:`size` after a pass of several tokens.
        """
        return self.fetch(self.size() + self._beyond, getattr(mx, self.dtype_name))

    def _replace(self, role: Role, x: mx.array) -> None:
        self.storage.replace(role, half(x))

    def size(self) -> int:
        """Tokens that attention can read."""
        return self.offset if self.max_size is None else min(self.offset, self.max_size)

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return not self.storage.shapes()

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back: always, but for a sliding window that has dropped some."""
        return self.max_size is None or self.offset < self.max_size

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        self._beyond = 0
        self.storage.trim(n, self.offset)
        return n

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars from which :meth:`from_state` restores the cache (not its observers).

        The norms beside which outliers are judged are among them.
        """
        return *self.storage.state(), self.offset, self.dtype_name, self.spec.to_json()

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        *held, offset, dtype_name, text = state
        spec = spec_from_json(text)
        if getattr(self, "spec", None) != spec:
            PackedSequence.__init__(self, spec)
        self.offset = offset
        self.dtype_name = dtype_name
        self._beyond = 0
        where = f"the state of layer {self.spec.layer}"
        check_count(f"{where}: offset", offset)
        if dtype_name not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"{where}: dtype must be float16, bfloat16 or float32, got {dtype_name!r}")
        self.storage.load_state(held, offset)
        self.storage.check(where, offset, self.size())

    @property
    def keep_decoded(self) -> bool:
        """Whether decoded tokens stay beside the coded ones; false for a storage that decodes quickly enough.

        Setting it has no effect there.

        Raises:
            ValueError: it is set on a cache that holds tokens.
        """
        return self.storage.keep_decoded

    @keep_decoded.setter
    def keep_decoded(self, keep: bool) -> None:
        if not self.empty():
            raise ValueError("keep_decoded can only be set while the cache is empty")
        self.storage.keep_decoded = keep and self.storage.can_keep_decoded

    def decoded_arrays(self) -> list[mx.array]:
        """What :attr:`keep_decoded` keeps beside the tokens that are held."""
        return self.storage.decoded_arrays()

    def rows(self, index: slice) -> Self:
        """A cache of some sequences of a lockstep batch, with the same observers."""
        part = copy.copy(self)
        part.storage = self.storage.rows(index)
        return part

    @property
    def n_batch(self) -> int:
        """Sequences in lockstep; 1 when empty."""
        shapes = self.storage.shapes()
        return shapes[0][0] if shapes else 1

    def shapes(self) -> list[tuple[int, int, int]]:
        """``(B, H, D)`` of keys and values; empty when nothing was ever stored."""
        return self.storage.shapes()

    def held_arrays(self) -> list[HeldArray]:
        """Every array that is held for tokens."""
        return self.storage.held_arrays(self.size())

    def static_arrays(self) -> list[mx.array]:
        """Codebooks, rotations and calibrations in use: not growing with tokens."""
        return list({id(array): array for array in self.storage.static_arrays()}.values())

    def tokens_held(self) -> tuple[int, int]:
        """Tokens of which keys, and of which values, are stored; what a sliding window left behind is not counted."""
        keys, values = (min(tokens, self.max_size or tokens) for tokens in self.storage.tokens_held())
        return keys, values

    def values_held(self) -> int:
        """Stored values: batch x heads x tokens x (key_dim + value_dim)."""
        return self.storage.values_held(self.size())

    def formula_nbytes(self) -> Fraction:
        """Bytes in use by the codes' own formulas: token counts, and where the data decide, what they decided."""
        return self.storage.formula_nbytes(self.size())
