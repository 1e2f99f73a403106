"""What every quantizer is: a small frozen dataclass that turns vectors into packed arrays and back."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import mlx.core as mx

from veloxquant_mlx.registry import Registry

QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer", "veloxquant_mlx.quantizers")
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


Arrays = tuple[mx.array, ...]

LARGEST_HALF: Final = 65504.0
"""The largest finite fp16."""


def saturated(x: mx.array) -> mx.array:
    """``x`` with finite values beyond fp16's range at its ends, in fp32; fp16, NaN and infinity as they are."""
    if x.dtype == mx.float16:
        return x
    x = x.astype(mx.float32)
    return mx.where(mx.isfinite(x), mx.clip(x, -LARGEST_HALF, LARGEST_HALF), x)


def half(x: mx.array) -> mx.array:
    """``x`` in fp16, finite where it was finite: bf16 and fp32 reach further, and their large values saturate."""
    return saturated(x).astype(mx.float16)


class Codes(NamedTuple):
    """Encoded vectors: packed arrays ``[B, H, blocks, width]`` in the order of the quantizer's layout.

    Axis 2 counts blocks of ``block_tokens`` tokens (1 for per-token quantizers), so that a storage can slice and
    concatenate without knowing what the arrays mean.

    Attributes:
        arrays: one array per entry of the layout.
        head_dim: length of the vectors.
        n_tokens: tokens encoded.
        static: what the quantizer calibrated on its first tokens, ``[B, H, 1, *]`` each; empty for most.
    """

    arrays: Arrays
    head_dim: int
    n_tokens: int
    static: Arrays = ()


class EncodingObserver(Protocol):
    """What is told of vectors that were encoded."""

    def observe(self, x: mx.array, decoded: mx.array, *, quantizer: Quantizer) -> None:
        """Take note of vectors ``[B, H, T, D]``, what they decode to, and by which quantizer."""


@dataclass(frozen=True)
class Quantizer(ABC):
    """Encode, decode and the exact cost of what is kept.

    Subclasses are frozen dataclasses whose compared fields are JSON values, other quantizers, or tuples of these; equal
    fields give equal codes.
    """

    name: ClassVar[str]

    @property
    def block_tokens(self) -> int:
        """Tokens that are encoded together; a cache keeps an incomplete block in fp16."""
        return 1

    @abstractmethod
    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """The packed arrays of one block of one head, in the order of :attr:`Codes.arrays`."""

    @property
    def calibration_tokens(self) -> int:
        """Tokens that a cache waits for (in fp16) to calibrate on, 0 for most."""
        return 0

    def slotted(self, n_static: int) -> tuple[int, ...]:
        """Which of a calibration's ``n_static`` arrays have a slot on axis 2 for every stretch of tokens."""
        return ()

    def calibrate(self, x: mx.array) -> Arrays:
        """What :attr:`Codes.static` holds, from the vectors ``[B, H, T, D]``."""
        return ()

    def follow(self, x: mx.array, static: Arrays) -> tuple[Arrays, list[int]]:
        """The calibration, with another slot for every stretch of ``x`` that its last slot does not fit.

        Args:
            x: vectors ``[B, H, T, D]`` that come after those of ``static``.
            static: a calibration.

        Returns:
            The calibration, and for each added slot the token of ``x`` from which it holds.
        """
        return static, []

    def encode(self, x: mx.array, static: Arrays | None = None) -> Codes:
        """Encode vectors.

        Args:
            x: ``[B, H, T, D]`` of any float dtype, T a multiple of :attr:`block_tokens` (or none). Finite values beyond
                fp16's range are coded as its ends.
            static: an earlier calibration, its slotted arrays with one slot or one per token; absent: :meth:`calibrate`
                on ``x``.

        Returns:
            Packed arrays.

        Raises:
            ValueError: another shape.
        """
        self.check_tokens(x)
        if not x.shape[2]:
            one = self.encode(mx.zeros((*x.shape[:2], self.block_tokens, x.shape[3])), static)
            return Codes(tuple(array[:, :, :0] for array in one.arrays), x.shape[-1], 0, one.static)
        x = saturated(x)
        static = self.calibrate(x) if static is None else static
        return Codes(self._encode(x, static), x.shape[-1], x.shape[2], static)

    def decode(self, codes: Codes, dtype: mx.Dtype = mx.float16) -> mx.array:
        """Decode to ``[B, H, T, D]`` of ``dtype``; what a code of finite values decodes to is finite in fp16 too."""
        if not codes.n_tokens:
            return mx.zeros((*self._lead(codes), 0, codes.head_dim), dtype=dtype)
        decoded = self._decode(codes)
        return half(decoded) if dtype == mx.float16 else decoded.astype(dtype)

    def _lead(self, codes: Codes) -> tuple[int, int]:
        """Sequences and heads."""
        n_batch, n_heads = (*codes.arrays, *codes.static)[-1].shape[:2]
        return n_batch, n_heads

    @abstractmethod
    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        """The packed arrays of checked vectors."""

    @abstractmethod
    def _decode(self, codes: Codes) -> mx.array:
        """``[B, H, T, D]`` fp32."""

    def static_arrays(self, head_dim: int) -> Arrays:
        """Tables that do not grow with tokens, shared by all caches: codebooks, rotations."""
        return ()

    def expected_distortion(self, head_dim: int) -> float | None:
        """Mean squared error over mean square of Gaussian input in theory; None where there is no theory."""
        return None

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
        fields = {
            field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self) if field.compare
        }
        return {"quantizer": self.name, **fields}


@dataclass(frozen=True)
class Coding:
    """What one quantizer is at all its widths, as far as it moves bytes.

    Attributes:
        name: with every parameter but width and seed, as in ``affine(group_size=32)``.
        block_tokens: tokens that are encoded together.
        calibration_tokens: tokens that a cache waits for before it encodes any.
    """

    name: str
    block_tokens: int = 1
    calibration_tokens: int = 0

    @classmethod
    def of(cls, quantizer: Quantizer) -> Coding:
        """That of a quantizer of any width."""
        fields = {name: value for name, value in quantizer.spec().items() if name not in _NOT_CODING}
        parameters = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        name = f"{quantizer.name}({parameters})" if parameters else quantizer.name
        return cls(name, quantizer.block_tokens, quantizer.calibration_tokens)

    def exact_and_coded(self, tokens: int, *, sinks: int, window: int, max_size: int | None) -> tuple[int, int]:
        """Tokens in use in fp16 and in code on one side of a layer, after ``tokens`` were appended and none trimmed.

        A sliding layer counts whole blocks, so the sum may exceed its ``max_size`` by less than a block.
        """
        first = min(tokens, sinks)
        blocks = max(0, tokens - first - window) // self.block_tokens
        if blocks * self.block_tokens < self.calibration_tokens:
            blocks = 0
        dropped = 0 if max_size is None else max(0, tokens - max_size)
        tail = min(tokens - first - blocks * self.block_tokens, tokens - dropped)
        return first + tail, (blocks - min(blocks, dropped // self.block_tokens)) * self.block_tokens


_NOT_CODING = ("quantizer", "code_bits", "seed")


def pair_name(keys: Quantizer, values: Quantizer) -> str:
    """The name of what codes keys and values: one name where they are coded alike, else as in ``kivi_keys/affine``."""
    return "/".join(dict.fromkeys((keys.name, values.name)))


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
