"""Fit a target: the step, the tables, and the rates that held-out vectors confirm.

The calibration vectors go through the layers as the cache sends them, young first and coded anew as they age; tables
are fitted to the integers that come out, and the step moves until the coded length of held-out vectors, at the context
that is asked for and with everything counted, meets the target from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_mlx.cache.coded import cut_into_blocks
from veloxquant_mlx.calibration.fisher_klt import FisherCode, layer_codes
from veloxquant_mlx.calibration.fit import fit_layer
from veloxquant_mlx.calibration.gradients import SINKS
from veloxquant_mlx.calibration.klt import KLTCalibration, source_below
from veloxquant_mlx.calibration.measure import HELD_OUT, Measurements
from veloxquant_mlx.codes.deadzone import DeadZone
from veloxquant_mlx.codes.entropy import coded_nbytes
from veloxquant_mlx.codes.fit import fit_tables
from veloxquant_mlx.codes.layer import SharedTables, TierCode
from veloxquant_mlx.transforms.coded_matrix import EXACT_BITS, check_table_bits
from veloxquant_mlx.transforms.klt import SCOPES, LayerKLT, Scope

AGES: Final = ((64, 3), (16, 9))
"""Tokens younger than 64 at a third of the step, younger than 16 at a ninth: the steps nest."""

TABLE_TOKENS: Final = 4096
"""Tokens that the old tokens' tables are fitted to, spread over the rest; those of young ones to half as many."""

FIRST_STEP: Final = 0.0014
"""Where the search for a step begins: about 1.5 bits on smollm2-135m with scope ``below``."""

HALVINGS_PER_BIT: Final = 1.45
"""By how many halvings of the step a bit is bought there, ages and dead zone included."""

CLOSE: Final = 0.015
"""A target is met by a code that is below it by at most this part of it."""

MAX_FITS: Final = 5
"""Fits before the search gives up."""

Singles = NDArray[np.float32]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class _Fitted:
    """Transforms and codes at one step, and the integers of the held-out vectors by layer and tier."""

    transforms: list[LayerKLT]
    tiers: dict[int, tuple[TierCode, ...]]
    coefficients: dict[int, list[Singles]]
    """By layer, for each tier what the held-out vectors were quantized from."""


def _rows(sequences: int, tokens: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, sequences * tokens - 1, min(count, sequences * tokens)).astype(np.int64))


def _fit_at(
    m: Measurements, scope: Scope, step: float, ages: Sequence[tuple[int, int]], epsilon: float, bits: int
) -> _Fitted:
    """Fit everything at one step of the oldest tokens."""
    steps = [step, *(step / divisor for _, divisor in ages)]
    some = next(iter(m.vectors.values()))
    n_fit, tokens = some.shape[0] - HELD_OUT, some.shape[1]
    chosen = _rows(n_fit, tokens, TABLE_TOKENS)
    decoded_fit: dict[int, Singles] = {}
    decoded: dict[int, list[mx.array]] = {}
    transforms, zones, symbols, kept = [], {}, [], {}
    for layer, all_vectors in m.vectors.items():
        source = source_below(layer, m.windows) if scope == "below" else None
        x_fit = np.ascontiguousarray(all_vectors[:n_fit].reshape(-1, all_vectors.shape[2]))
        fitted = fit_layer(
            layer,
            m.shapes[layer],
            m.ropes[layer],
            np.asarray(m.fishers[layer], dtype=np.float64),
            x_fit,
            scope=scope,
            step=step,
            below=None if source is None else (source, decoded_fit[source]),
            epsilon=epsilon,
            bits=bits,
        )
        transforms.append(fitted.transform)
        decoded_fit[layer] = fitted.decoded
        held_out = all_vectors[n_fit:].reshape(-1, all_vectors.shape[2])
        x = mx.array(np.concatenate([x_fit[chosen], held_out]).astype(np.float32))[None]
        own_zones, own_decoded, own_kept, y, last = [], [], [], None, None
        for tier in reversed(range(len(steps))):  # as a token ages
            below = None if source is None else decoded[source][tier]
            if y is None or last is None:
                y = np.array(fitted.transform.encode(x, below)[0])
            else:
                centred = fitted.transform.mean + last
                y = np.array(fitted.transform.encode(centred, below)[0])
            zone = DeadZone.fit(y[: len(chosen)], steps[tier])
            q = zone.quantize(y)
            last = fitted.transform.decode(mx.array(zone.values(q))[None], below)
            mx.eval(last)
            own_zones.append(zone)
            own_decoded.append(last)
            own_kept.append(y[len(chosen) :])
            some_of = slice(None, len(chosen), 1 if tier == 0 else 2)
            symbols.append(_all_coded(q[some_of]))
        zones[layer] = own_zones[::-1]
        decoded[layer] = own_decoded[::-1]
        kept[layer] = own_kept[::-1]
        needed = {source_below(later, m.windows) for later in m.vectors if later > layer}
        decoded_fit = {i: d for i, d in decoded_fit.items() if i in needed}
        decoded = {i: d for i, d in decoded.items() if i in needed}
    family, tables = fit_tables(symbols)
    shared = SharedTables.of(family)
    n_tiers = len(steps)
    tiers = {}
    for at, layer in enumerate(m.vectors):
        own = tables[at * n_tiers : (at + 1) * n_tiers][::-1]
        tiers[layer] = tuple(
            TierCode(zone, mx.array(table.classes), mx.array(table.shifts), shared)
            for zone, table in zip(zones[layer], own, strict=True)
        )
    return _Fitted(transforms, tiers, kept)


def _all_coded(symbols: NDArray[np.int32]) -> NDArray[np.int32]:
    """With a one in columns of zeros: a coefficient that calibration never saw above zero must still have a code."""
    symbols = symbols.copy()
    symbols[0, ~symbols.any(axis=0)] = 1
    return symbols


def measured_bits(
    fitted_tiers: Mapping[int, tuple[TierCode, ...]],
    coefficients: Mapping[int, list[Singles]],
    sizes: Mapping[int, int],
    ages: Sequence[tuple[int, int]],
    sinks: int,
    at_tokens: int,
    scale: float = 1.0,
) -> float:
    """Bits a value of a cache of ``at_tokens`` tokens, blocks and sinks counted, from held-out coefficients.

    Args:
        scale: steps are multiplied by it: the same tables serve a slightly different step.
    """
    limits = [age for age, _ in ages]
    ends = [max(sinks, at_tokens - age) for age in limits]
    parts = cut_into_blocks(sinks, ends, at_tokens)
    total = values = 0.0
    for layer, tiers in fitted_tiers.items():
        total += 16.0 * sinks * sizes[layer]
        values += at_tokens * sizes[layer]
        for tier, code in enumerate(tiers):
            y = coefficients[layer][tier]
            y = y if tier == 0 else y[: max(256, len(y) // 4)]
            q = replace(code, zone=replace(code.zone, step=code.zone.step * scale)).quantize(y)
            for length in {part.last - part.first for part in parts if part.tier == tier}:
                count = sum(part.tier == tier and part.last - part.first == length for part in parts)
                some = q if len(q) >= length else np.resize(q, (length, q.shape[1]))
                whole = min(len(some) // length, 8 if count == 1 else 1 << 30) * length
                nbytes = coded_nbytes(np.ascontiguousarray(some[:whole]), code.tables, length)
                total += 8 * nbytes * count / (whole // length)
    return total / values


def fit_code(
    m: Measurements,
    *,
    target: float | None = None,
    step: float | None = None,
    scope: Scope = "below",
    sinks: int = SINKS,
    ages: Sequence[tuple[int, int]] = AGES,
    at_tokens: int = 2048,
    epsilon: float = 0.1,
    bits: int = EXACT_BITS,
    say: Say = lambda line: None,
) -> FisherCode:
    """Fit a code that meets a target, or the code at a step.

    Args:
        m: what the model does on the calibration text.
        target: bits_per_value at ``at_tokens`` tokens of one sequence, tables apart, everything else counted.
        step: of the oldest tokens in √nats, in place of a target.
        scope: ``head``, ``layer`` or ``below``.
        sinks: first tokens kept in fp16, those of sliding-window layers excepted.
        ages: as in :data:`AGES`, the oldest first.
        at_tokens: context at which the target holds.
        epsilon: regularisation of Fisher matrices.
        bits: an entry of the transforms' tables, 2..8, or 16 for fp16.
        say: takes a line of progress.

    Raises:
        ValueError: a scope, target or step out of range, or a target that no step reaches.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if (target is None) == (step is None):
        raise ValueError("give a target or a step, not both")
    if target is not None and not 0 < target <= 16:
        raise ValueError(f"target must lie within 0..16 bits a value, got {target!r}")
    if step is not None and not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be finite and above 0, got {step!r}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be finite and above 0, got {epsilon!r}")
    check_table_bits(bits)
    ages = tuple((int(age), int(divisor)) for age, divisor in ages)
    sizes = {layer: shape.size for layer, shape in m.shapes.items()}
    tried: list[tuple[float, float]] = []

    def bits_of(fitted: _Fitted, scale: float = 1.0) -> float:
        return measured_bits(fitted.tiers, fitted.coefficients, sizes, ages, sinks, at_tokens, scale)

    at = FIRST_STEP * 2 ** (HALVINGS_PER_BIT * (1.5 - (target or 1.5))) if step is None else step
    for _ in range(MAX_FITS):
        fitted = _fit_at(m, scope, at, ages, epsilon, bits)
        real = bits_of(fitted)
        say(f"step {at:.5f}: {real:.3f} bits a value at {at_tokens} tokens")
        if target is None:
            break
        tried.append((math.log2(at), real))
        scale = _scale_for(bits_of, fitted, real, target) if abs(real / target - 1) < 0.08 else None
        if scale is not None:
            fitted, at = _scaled(fitted, scale), at * scale
            real = bits_of(fitted)
            break
        at = 2.0 ** _next_step(tried, target)
    else:
        raise ValueError(f"no step was found for {target} bits a value in {MAX_FITS} fits: {tried}")
    klt = KLTCalibration(scope, at, tuple(fitted.transforms), m.provenance, m.line_hashes)
    codes = layer_codes(klt.layers, fitted.tiers)
    return FisherCode(klt, codes, sinks, ages, target, real, at_tokens)


def _next_step(tried: Sequence[tuple[float, float]], target: float) -> float:
    """The logarithm of the next step: along the line through the last two, or along one bit a halving."""
    log, real = tried[-1]
    slope = -1 / HALVINGS_PER_BIT
    if len(tried) > 1 and tried[-2][0] != log:
        slope = min(-0.3, (real - tried[-2][1]) / (log - tried[-2][0]))
    return log + max(-2.0, min(2.0, (target * (1 - CLOSE / 3) - real) / slope))


def _scale_for(bits_of: Callable[[_Fitted, float], float], fitted: _Fitted, real: float, target: float) -> float | None:
    """A factor near 1 of all steps at which the target is met from below with the tables as they are."""
    low, high = 0.85, 1.18
    if target * (1 - CLOSE / 3) <= real <= target:
        return 1.0
    if not bits_of(fitted, high) <= target <= bits_of(fitted, low):
        return None
    for _ in range(5):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if bits_of(fitted, middle) <= target else (middle, high)
    return high


def _scaled(fitted: _Fitted, scale: float) -> _Fitted:
    tiers = {
        layer: tuple(replace(code, zone=replace(code.zone, step=code.zone.step * scale)) for code in codes)
        for layer, codes in fitted.tiers.items()
    }
    return replace(fitted, tiers=tiers)
