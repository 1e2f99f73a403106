"""RateQuant (arXiv 2605.06675): widths for a KV cache by reverse water-filling on weighted distortion.

Three steps, each of whose results can be saved and loaded::

    sensitivities = calibrate_layer_sensitivities(model, tokenizer)   # gradients: what an error costs
    curves = fit_distortion_curve(sensitivities)                      # measured: what error a width leaves
    bit_allocation = allocate_bits_ratequant(curves, target_bits=2.0) # bits where they save most
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from veloxquant_mlx.allocators.allocation import (
    AllocationEntry,
    BitAllocation,
    greedy_choices,
    held_tokens,
    optimal_choices,
    reverse_water_filling,
    shuffled,
)
from veloxquant_mlx.allocators.attribution import refine_distortion_curve
from veloxquant_mlx.allocators.curves import (
    DistortionCurve,
    DistortionCurves,
    exponential_fit,
    fit_distortion_curve,
)
from veloxquant_mlx.allocators.sensitivity import Sensitivities, calibrate_layer_sensitivities

__all__ = [
    "BitAllocation",
    "DistortionCurves",
    "Sensitivities",
    "allocate_bits_continuous",
    "allocate_bits_ratequant",
    "calibrate_layer_sensitivities",
    "fit_distortion_curve",
    "refine_distortion_curve",
    "shuffled",
]

UNITS: dict[str, Callable[[DistortionCurve], str]] = {
    "layer": lambda curve: f"layer_{curve.layer}",
    "layer_kv": lambda curve: f"layer_{curve.layer}.{curve.kind}",
    "head": lambda curve: f"layer_{curve.layer}.{curve.kind}.head_{curve.head}",
}
"""What gets one width, by name: the key of a curve in the allocation."""

SOLVERS = {"optimal": optimal_choices, "greedy": greedy_choices}
"""Integer solvers by name."""


@dataclass(frozen=True)
class _Unit:
    """Curves that share a width: per width, bits and loss in nats, both per token of the sequence."""

    name: str
    n_values: int
    head_dim: int
    max_size: int | None
    held_values: Fraction
    costs: tuple[Fraction, ...]
    losses: NDArray[np.float64]


def _cost(curves: DistortionCurves, curve: DistortionCurve, column: int, window: int, at_tokens: int) -> Fraction:
    """Bits per token of one head at a width, what the cache keeps in fp16 spread over all tokens."""
    exact, coded = curves.coding(curve.kind).exact_and_coded(
        at_tokens, sinks=curve.sinks, window=window, max_size=curve.max_size
    )
    return Fraction(curve.head_dim, at_tokens) * (coded * curves.cost(curve, column) + exact * 16)


def _units(curves: DistortionCurves, unit: str, widths: Iterable[int], window: int, at_tokens: int) -> list[_Unit]:
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} must be one of {', '.join(UNITS)}")
    if window < 0:
        raise ValueError(f"window={window} must not be negative")
    if at_tokens <= curves.sinks + window:
        raise ValueError(f"at_tokens={at_tokens} must exceed the {curves.sinks} sinks and the window of {window}")
    columns = [curves.widths.index(bits) for bits in widths]
    units = []
    for name, group in groupby(curves.curves, key=UNITS[unit]):
        members = list(group)
        n_values, max_size = sum(curve.head_dim for curve in members), members[0].max_size
        units.append(
            _Unit(
                name=name,
                n_values=n_values,
                head_dim=members[0].head_dim,
                max_size=max_size,
                held_values=n_values * Fraction(held_tokens(max_size, at_tokens), at_tokens),
                costs=tuple(
                    sum((_cost(curves, curve, i, window, at_tokens) for curve in members), Fraction(0)) for i in columns
                ),
                losses=np.array([sum(curve.losses[i] for curve in members) for i in columns]),
            )
        )
    return units


def _check_widths(curves: DistortionCurves, min_bits: int, max_bits: int) -> list[int]:
    if not 0 <= min_bits <= max_bits <= 8:
        raise ValueError(f"min_bits={min_bits} and max_bits={max_bits} must satisfy 0 <= min <= max <= 8")
    widths = [bits for bits in curves.widths if min_bits <= bits <= max_bits]
    missing = sorted({min_bits, max_bits} - set(widths))
    if missing:
        raise ValueError(f"width {missing[0]} was not measured; the curves of {curves.quantizer} have {curves.widths}")
    return widths


def _check_target(units: list[_Unit], target_bits: float, min_bits: int, max_bits: int) -> Fraction:
    values = sum((unit.held_values for unit in units), Fraction(0))
    lowest = float(sum(unit.costs[0] for unit in units) / values)
    highest = float(sum(unit.costs[-1] for unit in units) / values)
    if not math.isfinite(target_bits):
        raise ValueError(f"target_bits={target_bits} is not finite")
    if target_bits < lowest:
        raise ValueError(
            f"target_bits={target_bits} cannot be reached: min_bits={min_bits} already costs {lowest:g} "
            "bits_per_value, scales and norms included; that is the lowest reachable target"
        )
    if target_bits > highest:
        raise ValueError(
            f"target_bits={target_bits} cannot be used up: max_bits={max_bits} costs {highest:g} "
            "bits_per_value; raise max_bits or lower the target"
        )
    return values


def allocate_bits_ratequant(
    curves: DistortionCurves,
    target_bits: float,
    min_bits: int = 1,
    max_bits: int = 4,
    *,
    unit: str = "layer",
    solver: str = "optimal",
    window: int = 0,
    at_tokens: int = 2048,
) -> BitAllocation:
    """Integer widths that minimise the forecast loss at a real cost of at most ``target_bits``.

    Args:
        curves: from :func:`fit_distortion_curve`.
        target_bits: bits_per_value, everything that is stored counted: 2.0 is 8x smaller than fp16.
        min_bits: smallest code width.
        max_bits: largest code width.
        unit: ``layer`` (``layer_3``: one width for its keys and values), ``layer_kv`` (``layer_3.keys``) or
            ``head`` (``layer_3.keys.head_0``).
        solver: ``optimal`` (exact) or ``greedy`` (marginal steps on the lower convex hull, as in the paper).
        window: last tokens that the cache will keep in fp16 (128 by KIVI's default).
        at_tokens: sequence length at which the target holds; it matters only where tokens stay in fp16 (``sinks``, a
            ``window``, KIVI's incomplete block of keys, a calibration that waits for more), which weigh less in longer
            sequences, or where sliding-window layers hold a smaller share of them.

    Returns:
        A mapping from unit to width that knows its realised ``bits_per_value``, never above the target.

    Warns:
        UserWarning: the widths are so coarse that the realised cost is over 1% below the target.

    Raises:
        ValueError: widths not measured, or a target outside what they can cost, naming the nearest reachable.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} must be one of {', '.join(SOLVERS)}")
    widths = _check_widths(curves, min_bits, max_bits)
    units = _units(curves, unit, widths, window, at_tokens)
    values = _check_target(units, target_bits, min_bits, max_bits)
    # The decimal that was typed, not its binary neighbour: 1.2 must admit a cost of exactly 6/5.
    budget = Fraction(str(target_bits)) * values
    chosen = SOLVERS[solver]([u.costs for u in units], [u.losses for u in units], budget)
    allocation = BitAllocation(
        entries=tuple(
            AllocationEntry(u.name, widths[c], u.n_values, u.head_dim, u.costs[c] / u.held_values, u.max_size)
            for u, c in zip(units, chosen, strict=True)
        ),
        unit=unit,
        quantizer=curves.quantizer,
        target_bits=float(target_bits),
        sinks=curves.sinks,
        window=window,
        at_tokens=at_tokens,
        forecast_nats=float(sum(u.losses[c] for u, c in zip(units, chosen, strict=True))),
        codings=curves.codings,
    )
    realised = float(allocation.bits_per_value)
    if realised < 0.99 * target_bits:
        warnings.warn(
            f"target_bits={target_bits}: widths {widths} by {unit} realise {realised:.4f} bits_per_value",
            stacklevel=2,
        )
    return allocation


def allocate_bits_continuous(
    curves: DistortionCurves,
    target_bits: float,
    min_bits: int = 1,
    max_bits: int = 4,
    *,
    unit: str = "layer",
    window: int = 0,
    at_tokens: int = 2048,
) -> dict[str, float]:
    """Real-valued widths by the closed form, from exponential fits: what the integers approximate.

    Args:
        curves: from :func:`fit_distortion_curve`.
        target_bits: mean bits_per_value.
        min_bits: smallest width.
        max_bits: largest width.
        unit: as in :func:`allocate_bits_ratequant`.
        window: likewise.
        at_tokens: likewise.

    Returns:
        Width by unit; their mean over the values held at ``at_tokens``, plus the quantizer's mean overhead, is
        ``target_bits``.

    Raises:
        ValueError: as :func:`allocate_bits_ratequant`, or a unit whose loss is zero.
    """
    widths = _check_widths(curves, min_bits, max_bits)
    units = _units(curves, unit, widths, window, at_tokens)
    _check_target(units, target_bits, min_bits, max_bits)
    sizes = np.array([u.held_values for u in units], dtype=np.float64)
    overhead = [
        np.mean([float(cost / u.held_values) - b for cost, b in zip(u.costs, widths, strict=True)]) for u in units
    ]
    fits = [exponential_fit(widths, u.losses) for u in units]
    bits = reverse_water_filling(
        [fit.alpha for fit in fits],
        [fit.beta for fit in fits],
        float(np.clip(target_bits - np.average(overhead, weights=sizes), min_bits, max_bits)),
        lower=min_bits,
        upper=max_bits,
        sizes=sizes,
    )
    return dict(zip([u.name for u in units], bits.tolist(), strict=True))
