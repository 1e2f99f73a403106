"""The code of one layer's tokens: a transform, and for tokens of each age a step with its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_mlx.codes.entropy import EntropyBlocks, EntropyTables, TableFamily
from veloxquant_mlx.codes.uniform import Levels, UniformCode, decode_values, dequantize, quantize
from veloxquant_mlx.transforms.klt import LayerKLT

Singles = NDArray[np.float32]
Symbols = NDArray[np.int32]


def viewed(array: mx.array) -> Any:
    """The array in NumPy, sharing its memory."""
    return np.array(array, copy=False)


@dataclass(frozen=True, eq=False)
class SharedTables:
    """What all layers and ages share, held once: the entropy code's tables, and what its symbols stand for.

    Attributes:
        arrays: of :meth:`TableFamily.to_arrays`, and of :meth:`Levels.to_arrays` under ``levels.``.
        multiplier: what a bit may cost when integers are chosen, in squared steps.
    """

    arrays: Mapping[str, mx.array]
    multiplier: float

    @classmethod
    def of(cls, code: UniformCode) -> SharedTables:
        """The tables of a fitted code."""
        arrays = code.family.to_arrays() | {f"levels.{name}": a for name, a in code.levels.to_arrays().items()}
        return cls({name: mx.array(array) for name, array in arrays.items()}, code.multiplier)

    @cached_property
    def family(self) -> TableFamily:
        """For encoder and decoder; it shares the arrays' memory."""
        return TableFamily.from_arrays({name: viewed(array) for name, array in self.arrays.items()})

    @cached_property
    def levels(self) -> Levels:
        """Likewise."""
        own = {name.removeprefix("levels."): a for name, a in self.arrays.items() if name.startswith("levels.")}
        return Levels.from_arrays({name: viewed(array) for name, array in own.items()})


@dataclass(frozen=True, eq=False)
class TierCode:
    """How tokens of one range of ages are coded.

    Attributes:
        step: of all coefficients, in √nats.
        classes: ``[n]`` uint16, the class of each coefficient in the shared tables.
        shifts: ``[n]`` uint8, low bits stored plainly.
        shared: the shared tables.
    """

    step: float
    classes: mx.array
    shifts: mx.array
    shared: SharedTables

    @cached_property
    def tables(self) -> EntropyTables:
        """For encoder and decoder; it shares the arrays' memory."""
        return EntropyTables(self.shared.family, viewed(self.classes), viewed(self.shifts))

    def quantize(self, y: Singles) -> Symbols:
        """Integers of coefficients ``[..., n]``."""
        shared = self.shared
        flat = quantize(y.reshape(-1, y.shape[-1]), self.tables, shared.levels, self.step, shared.multiplier)
        return flat.reshape(y.shape)

    def values(self, symbols: Symbols) -> Singles:
        """What integers ``[..., n]`` stand for."""
        flat = dequantize(symbols.reshape(-1, symbols.shape[-1]), self.tables, self.shared.levels, self.step)
        return flat.reshape(symbols.shape)

    def decoded(self, blocks: EntropyBlocks, first: int, last: int) -> Singles:
        """What the integers in blocks ``first`` to ``last`` (exclusive) stand for, ``[T, n]``."""
        return decode_values(blocks, self.tables, self.shared.levels, self.step, first, last)

    def arrays(self) -> dict[str, mx.array]:
        """The arrays that are this tier's own."""
        return {"classes": self.classes, "shifts": self.shifts}


@dataclass(frozen=True, eq=False)
class LayerCode:
    """One layer's code.

    Attributes:
        transform: from keys and values to coefficients and back.
        tiers: how tokens are coded by age, the oldest first.
        readers: layers that are predicted from this one.
    """

    transform: LayerKLT
    tiers: tuple[TierCode, ...]
    readers: tuple[int, ...] = ()

    def static_arrays(self) -> list[mx.array]:
        """Every table that must stay in memory for the layer, the shared ones too."""
        shared = list(self.tiers[0].shared.arrays.values())
        return [*self.transform.arrays().values(), *(a for tier in self.tiers for a in tier.arrays().values()), *shared]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCode:
        """Itself: copies of a cache share its tables."""
        return self
