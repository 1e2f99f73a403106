"""What a cache asks of the storage of one layer's tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, Protocol, Self

import mlx.core as mx

from veloxquant_mlx.cache.storage import HeldArray, State
from veloxquant_mlx.methods import Role
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver


class LayerStore(ABC):
    """Keys and values of one layer, for one sequence or for several in lockstep; positions are the cache's to know.

    Attributes:
        can_keep_decoded: whether ``keep_decoded`` may be set.
        keep_decoded: whether decoded tokens stay beside the coded ones, to save the time of decoding them at every
            step. What attention reads is the same. They are no part of what is held, so only a measurement of quality
            may ask for it, before anything is stored.
    """

    can_keep_decoded: ClassVar[bool] = False
    keep_decoded: bool = False

    def decoded_arrays(self) -> list[mx.array]:
        """What ``keep_decoded`` keeps."""
        return []

    @abstractmethod
    def append(self, keys: mx.array, values: mx.array, offset: int) -> None:
        """Store ``[B, H, L, D]`` fp16 of the positions ``offset`` and behind."""

    def idle(self, offset: int) -> None:  # noqa: B027  (most storages have nothing to do)
        """A step that brings other sequences of a batch tokens and this one none."""

    @abstractmethod
    def fetch(self, offset: int, tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Decode the last ``tokens`` tokens before ``offset`` to ``[B, H, tokens, D]``."""

    @abstractmethod
    def replace(self, role: Role, x: mx.array) -> None:
        """Hold ``x``, fp16 of the shape that was fetched last, as all keys or all values.

        Raises:
            ValueError: the storage does not hold its sides apart.
        """

    @abstractmethod
    def check(self, where: str, offset: int, size: int) -> None:
        """Raise ValueError, begun with ``where``, unless the counts of a loaded state are those of its arrays.

        Args:
            where: what is looked at.
            offset: tokens that were ever stored.
            size: tokens that attention can read.
        """

    @abstractmethod
    def trim(self, n: int, offset: int) -> None:
        """Forget the last ``n`` tokens; ``offset`` are left."""

    @abstractmethod
    def begin_step(self, offset: int) -> None:
        """Tokens are about to come: free what a sliding window has left behind, in steps."""

    @abstractmethod
    def rows(self, index: slice) -> Self:
        """A copy of some sequences of the batch, with the same observers."""

    @abstractmethod
    def shapes(self) -> list[tuple[int, int, int]]:
        """``(B, H, D)`` of keys and of values; empty when nothing was ever stored."""

    @abstractmethod
    def tokens_held(self) -> tuple[int, int]:
        """Tokens of which keys, and of which values, are stored, those that a sliding window left behind included."""

    @abstractmethod
    def held_arrays(self, size: int) -> list[HeldArray]:
        """Every array that is held for tokens, of which attention can read ``size``."""

    @abstractmethod
    def static_arrays(self) -> list[mx.array]:
        """Tables in use that do not grow with tokens; some may be there twice."""

    @abstractmethod
    def values_held(self, size: int) -> int:
        """Stored values: batch x heads x tokens x (key_dim + value_dim) of ``size`` tokens."""

    @abstractmethod
    def formula_nbytes(self, size: int) -> Fraction:
        """Bytes in use by the codes' own formulas."""

    @abstractmethod
    def state(self) -> State:
        """Arrays and scalars for :meth:`load_state`."""

    @abstractmethod
    def load_state(self, state: Sequence[Any], offset: int) -> None:
        """Take what :meth:`state` gave, of a cache with ``offset`` tokens."""

    def attach_outlier_observer(self, observer: KeyNormObserver) -> None:
        """Let an observer flag the tokens to come.

        Raises:
            ValueError: the storage keeps no outliers.
        """
        raise ValueError("the layer keeps no outlier tokens that an outlier_observer could flag")


class StorageSpec(Protocol):
    """How one layer is stored: makes its storage, and is written into saved caches."""

    @property
    def layer(self) -> int:
        """Index of the layer."""

    @property
    def max_size(self) -> int | None:
        """Sliding window in tokens, None for full attention."""

    def new_store(
        self, outlier_observer: KeyNormObserver | None, distortion_observer: DistortionObserver | None
    ) -> LayerStore:
        """An empty storage."""

    def to_json(self) -> str:
        """As JSON text, for ``spec_from_json``."""
