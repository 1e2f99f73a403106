"""The methods of this package: one options dataclass each, under one registry.

An options class holds what only its method needs, says which code widths exist, and makes the quantizer of one side
of one layer. A new method is a quantizer and one class here.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from veloxquant_mlx.packing import MAX_CODE_BITS
from veloxquant_mlx.quantizers.affine import Affine, PerChannelAffine
from veloxquant_mlx.quantizers.base import Quantizer
from veloxquant_mlx.quantizers.rvq import RVQ
from veloxquant_mlx.quantizers.ternary import Ternary
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_prod import TurboQuantProd, TurboQuantProdAdaptive
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic
from veloxquant_mlx.registry import Registry, near_matches

Role = Literal["keys", "values"]


@dataclass(frozen=True)
class MethodOptions(ABC):
    """What a configuration needs of a method.

    Attributes:
        widths: code widths that ``bit_allocation``, ``value_bits`` and ``outlier_bits`` may name.
        default_window: ``window`` where the configuration names none.
        allocatable: whether layers may have different widths.
        needs_allocation: whether a ``bit_allocation`` must be given.
    """

    widths: ClassVar[range] = range(1, MAX_CODE_BITS + 1)
    default_window: ClassVar[int] = 0
    allocatable: ClassVar[bool] = True
    needs_allocation: ClassVar[bool] = False

    @abstractmethod
    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The quantizer of one side of a layer, at the method's own width where ``code_bits`` is None.

        Raises:
            ValueError: an option or width outside its range, naming it.
        """

    def factories(self, seed: int = 0) -> Mapping[str, Callable[[int], Quantizer]]:
        """Width -> quantizer, of keys and of values: what :func:`fit_distortion_curve` measures."""
        return {role: partial(self.quantizer, role, seed=seed) for role in get_args(Role)}

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """A per-token quantizer for flagged tokens."""
        return self.quantizer(role, code_bits, seed)


METHODS: Registry[type[MethodOptions]] = Registry("method")


def make_options(method: str, options: Mapping[str, Any], common: frozenset[str] = frozenset()) -> MethodOptions:
    """The options object of a method.

    Args:
        method: a registered name.
        options: its fields.
        common: further field names to suggest for a misspelt one.

    Raises:
        ValueError: an unknown method, or a value outside its range.
        TypeError: a field that the method does not have, with near matches.
    """
    options_class = METHODS[method]
    known = {option.name for option in dataclasses.fields(options_class)}
    for name in options:
        if name not in known:
            raise TypeError(
                f"method {method!r} has no field {name!r}; did you mean {near_matches(name, known | common)}?"
            )
    made = options_class(**options)
    if not made.needs_allocation:
        for role in ("keys", "values"):
            made.quantizer(role, None, 0)  # its own checks name what is out of range
    return made


@METHODS.register("turboquant_mse")
@dataclass(frozen=True)
class TurboQuantMSEOptions(MethodOptions):
    """Options of :class:`TurboQuantMSE`."""

    code_bits: int = 4

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantMSE(self.code_bits if code_bits is None else code_bits, seed)


@METHODS.register("turboquant_prod")
@dataclass(frozen=True)
class TurboQuantProdOptions(MethodOptions):
    """Options of :class:`TurboQuantProd`."""

    code_bits: int = 4

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantProd(self.code_bits if code_bits is None else code_bits, seed)


@METHODS.register("turboquant_prod_adaptive")
@dataclass(frozen=True)
class TurboQuantProdAdaptiveOptions(MethodOptions):
    """Options of :class:`TurboQuantProdAdaptive`; ``value_bits`` gives values a fixed width."""

    allocatable: ClassVar[bool] = False
    base_bits: int = 2
    max_bits: int = 4
    distortion_threshold: float = 0.05
    block_size: int = 32

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """Adaptive, or TurboQuant Prod at a width that is named."""
        if code_bits is not None:
            return TurboQuantProd(code_bits, seed)
        return TurboQuantProdAdaptive(
            base_bits=self.base_bits,
            max_bits=self.max_bits,
            distortion_threshold=self.distortion_threshold,
            block_size=self.block_size,
            seed=seed,
        )


@METHODS.register("rvq")
@dataclass(frozen=True)
class RVQOptions(MethodOptions):
    """Options of :class:`RVQ`."""

    code_bits: int = 2

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return RVQ(self.code_bits if code_bits is None else code_bits, seed)

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """Scalar codes: at high widths they leave less than residual stages."""
        return TurboQuantMSE(code_bits, seed)


@METHODS.register("affine")
@dataclass(frozen=True)
class AffineOptions(MethodOptions):
    """Options of :class:`Affine`."""

    code_bits: int = 4
    group_size: int = 32

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return Affine(self.code_bits if code_bits is None else code_bits, self.group_size)


@METHODS.register("kivi")
@dataclass(frozen=True)
class KIVIOptions(MethodOptions):
    """KIVI (arXiv 2402.02750): keys in groups of tokens per channel, values in groups of channels per token.

    The last 128 tokens stay in fp16 unless ``window`` says otherwise.
    """

    default_window: ClassVar[int] = 128
    code_bits: int = 2
    group_size: int = 32

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """Per channel for keys, per token for values."""
        bits = self.code_bits if code_bits is None else code_bits
        return PerChannelAffine(bits, self.group_size) if role == "keys" else Affine(bits, self.group_size)

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """Per token on both sides: a flagged token has no neighbours."""
        return Affine(code_bits, self.group_size)


@METHODS.register("ternary")
@dataclass(frozen=True)
class TernaryOptions(MethodOptions):
    """:class:`Ternary`, which has one width; ``value_bits`` gives values TurboQuant MSE."""

    allocatable: ClassVar[bool] = False

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """Ternary, or TurboQuant MSE at a width that is named."""
        return Ternary(seed) if code_bits is None else TurboQuantMSE(code_bits, seed)


@METHODS.register("turboquant_static")
@dataclass(frozen=True)
class TurboQuantStaticOptions(MethodOptions):
    """Options of :class:`TurboQuantStatic`; width 0 keeps nothing but the mean."""

    widths: ClassVar[range] = range(MAX_CODE_BITS + 1)
    code_bits: int = 1
    calibration: int = 64

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantStatic(self.code_bits if code_bits is None else code_bits, self.calibration, seed)

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """With a norm per token: a flagged token is far from the calibrated scale."""
        return TurboQuantMSE(code_bits, seed)


@METHODS.register("ratequant")
@dataclass(frozen=True)
class RateQuantOptions(MethodOptions):
    """A width per layer (or finer) from ``bit_allocation``, coded by another method.

    Args:
        base: the method that codes.
        base_options: its own fields.
    """

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
