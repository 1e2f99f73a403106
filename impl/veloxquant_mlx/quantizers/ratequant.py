"""RateQuant: a width per layer, side or head, coded by another method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from veloxquant_mlx.methods import METHODS, MethodOptions, Role, TargetMeaning, make_options
from veloxquant_mlx.quantizers.base import Quantizer


@METHODS.register("ratequant")
@dataclass(frozen=True)
class RateQuantOptions(MethodOptions):
    """A width per layer (or finer) from ``bit_allocation``, coded by another method.

    Args:
        base: the method that codes.
        base_options: its own fields.
    """

    summary: ClassVar[str] = "code widths by RateQuant (arXiv 2605.06675) over another method, per layer, side or head"
    targets: ClassVar[tuple[float, ...]] = ()
    target_means: ClassVar[TargetMeaning] = "bits_per_value"
    target_field: ClassVar[str | None] = None
    needs_allocation: ClassVar[bool] = True
    base: str = "turboquant_mse"
    base_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not METHODS[self.base].allocatable or METHODS[self.base].needs_allocation:
            raise ValueError(f"base={self.base!r} has no width to allocate")
        made = make_options(self.base, self.base_options)
        # the base's widths and window become this object's
        object.__setattr__(self, "widths", made.widths)
        object.__setattr__(self, "default_window", made.default_window)

    @property
    def _base(self) -> MethodOptions:
        return make_options(self.base, self.base_options)

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The base's quantizer at the allocated width."""
        return self._base.quantizer(role, code_bits, seed)

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The base's."""
        return self._base.outlier_quantizer(role, code_bits, seed)
