"""The one list of methods: options classes by name, each beside its quantizer.

A method is one module of ``veloxquant_mlx.quantizers``: a quantizer, and an options class registered with
``@METHODS.register``. The module is found by being there. Configurations, the harness and its command line read what
they need of a method here.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from veloxquant_kernels.packing import MAX_CODE_BITS
from veloxquant_mlx.quantizers.base import Quantizer
from veloxquant_mlx.registry import Registry, near_matches

Role = Literal["keys", "values"]
TargetMeaning = Literal["code_bits", "bits_per_value"]


@dataclass(frozen=True)
class MethodOptions(ABC):
    """What a configuration needs of a method.

    Its fields are what only its method needs.

    Attributes:
        summary: the method in half a sentence.
        targets: the targets that a measurement can name, the most costly first; none where only an allocation can tell.
        target_means: ``code_bits`` (the real cost is higher: scales count) or ``bits_per_value``.
        target_field: the field that a target sets; None where there is one target only.
        widths: code widths that ``bit_allocation``, ``value_bits`` and ``outlier_bits`` may name.
        default_window: ``window`` where the configuration names none.
        allocatable: whether layers may have different widths.
        needs_allocation: whether a ``bit_allocation`` must be given.
    """

    summary: ClassVar[str]
    targets: ClassVar[tuple[float, ...]] = tuple(float(bits) for bits in range(MAX_CODE_BITS, 0, -1))
    target_means: ClassVar[TargetMeaning] = "code_bits"
    target_field: ClassVar[str | None] = "code_bits"
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


@dataclass(frozen=True)
class WidthOptions(MethodOptions):
    """Options of a method that has one code width: ``code_bits`` unless a layer or a side is given another."""

    code_bits: int = 4

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The quantizer at ``code_bits``, or at the method's own width."""
        return self.coded(role, self.code_bits if code_bits is None else code_bits, seed)

    @abstractmethod
    def coded(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The quantizer of one side of a layer at a width."""


METHODS: Registry[type[MethodOptions]] = Registry("method", "veloxquant_mlx.quantizers")


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
