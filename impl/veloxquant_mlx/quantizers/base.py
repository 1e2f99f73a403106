"""What every quantizer is: a small frozen dataclass that turns vectors into packed arrays and back."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from veloxquant_mlx.registry import Registry

QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")
"""Quantizer classes by their ``name``, so that a saved cache can name the ones it needs."""


class ArraySpec(NamedTuple):
    """One packed array of a quantizer: ``[B, H, blocks, width]`` of ``dtype``."""

    name: str
    width: int
    dtype: mx.Dtype

    @property
    def bits(self) -> int:
        """Bits per block and head."""
        return self.width * self.dtype.size * 8


class Codes(NamedTuple):
    """Encoded vectors: packed arrays ``[B, H, blocks, width]`` in the order of the quantizer's layout.

    Axis 2 counts blocks of ``block_tokens`` tokens (1 for per-token quantizers), so that a storage can slice and
    concatenate without knowing what the arrays mean.
    """

    arrays: tuple[mx.array, ...]
    head_dim: int

    def map(self, function: Callable[[mx.array], mx.array]) -> Codes:
        """The same codes with ``function`` applied to every array."""
        return Codes(tuple(function(array) for array in self.arrays), self.head_dim)


@dataclass(frozen=True)
class Quantizer(ABC):
    """Encode, decode and the exact cost of what is kept.

    Subclasses are frozen dataclasses whose fields are JSON values, other quantizers, or tuples of these; equal fields
    give equal codes.
    """

    name: ClassVar[str]

    @property
    def block_tokens(self) -> int:
        """Tokens that are encoded together; a cache keeps an incomplete block in fp16."""
        return 1

    @abstractmethod
    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """The packed arrays of one block of one head, in the order of :attr:`Codes.arrays`."""

    @abstractmethod
    def encode(self, x: mx.array) -> Codes:
        """Encode ``x`` of shape ``[B, H, T, D]``, T a multiple of :attr:`block_tokens`."""

    @abstractmethod
    def decode(self, codes: Codes, dtype: mx.Dtype = mx.float16) -> mx.array:
        """Decode to ``[B, H, T, D]`` of ``dtype``."""

    def static_arrays(self, head_dim: int) -> tuple[mx.array, ...]:
        """Tables that do not grow with tokens: codebooks, rotations, calibrated scales."""
        return ()

    def bits_per_value(self, head_dim: int) -> Fraction:
        """Exact cost of a stored value in bits: codes with word padding, scales, norms."""
        return Fraction(sum(spec.bits for spec in self.layout(head_dim)), self.block_tokens * head_dim)

    def check_tokens(self, x: mx.array) -> None:
        """Raise ValueError unless ``x`` is ``[B, H, T, D]`` with whole blocks of tokens."""
        if x.ndim != 4:
            raise ValueError(f"{self.name}: x must be [B, H, T, D], got shape {tuple(x.shape)}")
        if x.shape[2] % self.block_tokens:
            raise ValueError(f"{self.name}: tokens come in blocks of {self.block_tokens}, got T={x.shape[2]}")

    def spec(self) -> dict[str, Any]:
        """A JSON value from which :func:`quantizer_from_spec` rebuilds this quantizer."""
        fields = {field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"quantizer": self.name, **fields}


def _to_json(value: object) -> Any:
    if isinstance(value, Quantizer):
        return value.spec()
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: object) -> Any:
    if isinstance(value, Mapping):
        return quantizer_from_spec(value)
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    return value


def quantizer_from_spec(spec: Mapping[str, Any]) -> Quantizer:
    """The inverse of :meth:`Quantizer.spec`."""
    fields = {key: _from_json(value) for key, value in spec.items() if key != "quantizer"}
    return QUANTIZERS[spec["quantizer"]](**fields)
