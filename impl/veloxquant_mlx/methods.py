"""The methods of this package: one options dataclass each, under one registry.

An options class holds what only its method needs, says which code widths exist, and makes the quantizer of one side
of one layer. A new method is a quantizer and one class here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from veloxquant_mlx.packing import MAX_CODE_BITS
from veloxquant_mlx.quantizers.base import Quantizer
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.registry import Registry

Role = Literal["keys", "values"]


class MethodOptions(Protocol):
    """What :class:`veloxquant_mlx.cache.base.KVCacheConfig` needs of a method."""

    widths: ClassVar[range]
    default_window: ClassVar[int]

    @property
    def code_bits(self) -> int:
        """Width of a code where the configuration allocates none."""

    def quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The quantizer of one side of a layer at this width."""


METHODS: Registry[type[MethodOptions]] = Registry("method")


@METHODS.register("turboquant_mse")
@dataclass(frozen=True)
class TurboQuantMSEOptions:
    """Options of :class:`TurboQuantMSE`."""

    widths: ClassVar[range] = range(1, MAX_CODE_BITS + 1)
    default_window: ClassVar[int] = 0
    code_bits: int = 4

    def quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantMSE(code_bits, seed)
