"""The code of one layer's tokens: a transform, and for tokens of each age a step with its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from veloxquant_mlx.codes.deadzone import DeadZone, Singles, Symbols
from veloxquant_mlx.codes.entropy import EntropyTables, TableFamily
from veloxquant_mlx.transforms.klt import LayerKLT


def viewed(array: mx.array) -> Any:
    """The array in NumPy, sharing its memory."""
    return np.array(array, copy=False)


@dataclass(frozen=True, eq=False)
class SharedTables:
    """The entropy code's tables that all layers and ages share, held once.

    Attributes:
        arrays: :meth:`TableFamily.to_arrays`.
    """

    arrays: Mapping[str, mx.array]

    @classmethod
    def of(cls, family: TableFamily) -> SharedTables:
        """The tables of a fitted family."""
        return cls({name: mx.array(array) for name, array in family.to_arrays().items()})

    @cached_property
    def family(self) -> TableFamily:
        """For encoder and decoder; it shares the arrays' memory."""
        return TableFamily.from_arrays({name: viewed(array) for name, array in self.arrays.items()})


@dataclass(frozen=True, eq=False)
class TierCode:
    """How tokens of one range of ages are coded.

    Attributes:
        zone: step and centroids.
        classes: ``[n]`` uint16, the class of each coefficient in the shared tables.
        shifts: ``[n]`` uint8, low bits stored plainly.
        shared: the shared tables.
    """

    zone: DeadZone
    classes: mx.array
    shifts: mx.array
    shared: SharedTables

    @cached_property
    def tables(self) -> EntropyTables:
        """For encoder and decoder; it shares the arrays' memory."""
        return EntropyTables(self.shared.family, viewed(self.classes), viewed(self.shifts))

    def quantize(self, y: Singles) -> Symbols:
        """Integers of coefficients ``[..., n]``; one that the tables do not code becomes zero."""
        symbols = self.zone.quantize(y)
        return symbols if self.tables.active.all() else np.where(self.tables.active, symbols, np.int32(0))

    def arrays(self) -> dict[str, mx.array]:
        """The arrays that are this tier's own."""
        return {"magnitudes": self.zone.magnitudes, "classes": self.classes, "shifts": self.shifts}


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
