"""Coefficients as integers of one step: dead zone, optimised rounding, trellis, and what integers stand for.

One step for all coefficients is reverse water-filling where every error costs the same; the entropy code's tables turn
the integers into bits. Three ways to choose an integer:

- :func:`dead_zone` looks at the coefficient alone;
- :func:`quantize` with a family of one state minimises ``error² + multiplier·bits`` under the tables;
- with 4 or 8 states a token's numbers walk a trellis, whose odd states use levels halfway between those of the even
  ones: a packing of space denser than a grid, by Viterbi's algorithm.

Measured at equal error: 4 and 8 states save .12 and .14 bits on a Gaussian at 2.3 bits, .18 and .19 at 7 bits; .062 and
.070 on the transformed keys and values of a model at 1.33 bits, most of whose coefficients have little to share.
Decoding costs the same for any number of states. The price: what a trellis coded cannot be coded anew for nothing. A
grid of a third of the step nests (a coarse cell is three fine ones: .003 to .01 bits are lost), halves and quarters do
not (.06 to .5), nor does a trellis (.01 to .04 from a grid of a fifth of its step, twice that from another trellis).

A symbol stands for the mean of what was coded by it (its centroid), by table and magnitude.

Sources: Sullivan, Efficient scalar quantization of exponential and Laplacian random variables, IEEE Trans. IT 42
(1996); Marcellin & Fischer, Trellis coded quantization, IEEE Trans. Commun. 38 (1990); Fischer & Wang,
Entropy-constrained trellis coded quantization, IEEE Trans. IT 38 (1992); the 4- and 8-state machines of dependent
quantization in VVC (Schwarz et al., DCC 2019) and its successor's test model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from veloxquant_kernels.rans_decode import rans_decode_reference
from veloxquant_kernels.rans_format import LENGTH_BITS, NEXT_STATES, Symbols, Tables, TokenModel
from veloxquant_mlx.codes import native
from veloxquant_mlx.codes.entropy import EntropyBlocks, EntropyTables, TableFamily, check_decoded, decoding_range
from veloxquant_mlx.codes.fit import fit_tables

Floats32 = NDArray[np.float32]

DEAD: Final = 0.6
"""A magnitude below ``k + DEAD`` steps rounds to k: Laplacian sources want the dead zone wider than half a step."""
CENTROIDS: Final = 12
"""Magnitudes whose centroids are kept; beyond them the density is flat over a step."""
LEAST_COUNT: Final = 50
"""Calibration symbols that a centroid of its own needs."""
MULTIPLIER: Final = 0.1
"""``-dD/dR`` of a fine uniform quantizer is ``2 ln 2 / 12 = .1155`` squared steps; .1 to .13 are alike."""
LARGEST: Final = float(1 << 29)
"""Steps; larger coefficients are clipped."""


@dataclass(frozen=True, eq=False)
class Levels:
    """What symbols stand for, in steps: ``sign(q) (|q| - set/2 + offsets[set, table, |q|])``.

    Attributes:
        offsets: ``[n_sets, n_tables, CENTROIDS + 1]`` fp32; column 0 is not used: zero stands for zero.
        outer: the offset of larger magnitudes, and of those that a table does not code.
    """

    offsets: Floats32
    outer: float = 0.0

    def __post_init__(self) -> None:
        offsets = np.ascontiguousarray(self.offsets, np.float32)
        if offsets.ndim != 3 or not np.isfinite(offsets).all() or not np.isfinite(self.outer):
            raise ValueError(f"offsets must be finite [sets, tables, magnitudes], got {offsets.shape}")
        object.__setattr__(self, "offsets", offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name, for safetensors."""
        return {"offsets": self.offsets, "outer": np.array([self.outer], np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> Levels:
        """The inverse of :meth:`to_arrays`."""
        return cls(np.asarray(arrays["offsets"]), float(np.asarray(arrays["outer"]).ravel()[0]))

    @classmethod
    def middle(cls, family: TableFamily, outer: float = 0.0) -> Levels:
        """Every symbol stands for the middle of its cell, ``outer`` beyond it."""
        return cls(np.full((*family.cumulative.shape[:2], CENTROIDS + 1), outer, np.float32), outer)

    def expanded(self, family: TableFamily) -> Floats32:
        """``[n_sets, n_tables, n_symbols]``: each symbol's level in steps.

        Raises:
            ValueError: offsets of another family.
        """
        if self.offsets.shape[:2] != family.cumulative.shape[:2]:
            raise ValueError(f"offsets {self.offsets.shape} do not fit tables {family.cumulative.shape}")
        half, kept = family.half, self.offsets.shape[2] - 1
        offset = np.full((*self.offsets.shape[:2], half + 1), self.outer, np.float32)
        offset[..., : min(kept, half) + 1] = self.offsets[..., : half + 1]
        coded = np.diff(family.cumulative.astype(np.int64), axis=-1)[..., half:-1] > 0
        offset = np.where(coded, offset, np.float32(self.outer))
        sets = np.arange(len(offset), dtype=np.float32)[:, None, None]
        magnitude = np.arange(half + 1, dtype=np.float32) + offset - np.float32(0.5) * sets
        magnitude[..., 0] = 0
        escape = np.zeros((*offset.shape[:2], 1), np.float32)
        return np.ascontiguousarray(np.concatenate([-magnitude[..., :0:-1], magnitude, escape], -1), np.float32)


def dead_zone(y: ArrayLike, step: float, dead: float = DEAD) -> Symbols:
    """``sign(y) floor(|y| / step + 1 - dead)``: int32, of any shape.

    Raises:
        ValueError: a step that is not positive, or coefficients that are not finite.
    """
    scaled = _scaled(np.asarray(y), step)
    return (np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(1 - dead))).astype(np.int32)


def _scaled(y: NDArray[np.generic], step: float) -> Floats32:
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"step must be finite and positive, got {step}")
    array = np.ascontiguousarray(y, np.float32)
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"y{where} = {array[tuple(where)]} is not finite")
    return np.asarray(np.clip(array * np.float32(1 / np.float32(step)), -LARGEST, LARGEST), np.float32)


def symbol_costs(family: TableFamily) -> Floats32:
    """``[n_sets, n_tables, n_symbols]`` bits of each symbol; without a frequency, of its escape and length."""
    bits = family.bits.astype(np.float64)
    q = np.arange(-family.half, family.half + 1)
    length = np.frexp(((q << 1) ^ (q >> 63)).astype(np.float64))[1]
    escaped = bits[..., -1:] + LENGTH_BITS + np.maximum(length - 1, 0)
    inner = np.where(np.isfinite(bits[..., :-1]), bits[..., :-1], escaped)
    return np.ascontiguousarray(np.concatenate([inner, bits[..., -1:]], -1), np.float32)


def quantize(
    y: ArrayLike, tables: EntropyTables, levels: Levels, step: float, multiplier: float = MULTIPLIER
) -> Symbols:
    """The integers of least ``error² + multiplier · step² · bits`` for each token, under its tables.

    Args:
        y: ``[T, d]`` coefficients.
        tables: of the entropy code; the family's ``n_states`` says whether a trellis is walked.
        levels: what symbols stand for.
        step: distance of neighbouring levels of a set.
        multiplier: what a bit may cost, in squared steps; 0 takes the nearest level.

    Returns:
        ``[T, d]`` int32; zero where ``tables`` codes nothing.

    Raises:
        ValueError: a wrong shape, a step or multiplier out of range, or coefficients that are not finite.
    """
    array = np.asarray(y)
    if array.ndim != 2 or array.shape[1] != len(tables.classes):
        raise ValueError(f"y must be [T, {len(tables.classes)}], got {array.shape}")
    if not (np.isfinite(multiplier) and multiplier >= 0):
        raise ValueError(f"multiplier must be finite and not negative, got {multiplier}")
    scaled, bits, expanded = _scaled(array, step), symbol_costs(tables.family), levels.expanded(tables.family)
    library = native.library()
    if library is None:
        return quantize_reference(scaled, tables.tables, bits, expanded, levels.outer, multiplier)
    return native.quantize(library, scaled, tables.tables, bits, expanded, levels.outer, multiplier)


def dequantize(symbols: ArrayLike, tables: EntropyTables, levels: Levels, step: float) -> Floats32:
    """What integers ``[T, d]`` stand for: fp32."""
    array = np.ascontiguousarray(symbols, np.int32)
    if array.ndim != 2 or array.shape[1] != len(tables.classes):
        raise ValueError(f"symbols must be [T, {len(tables.classes)}], got {array.shape}")
    expanded, library = levels.expanded(tables.family), native.library()
    if library is None:
        return values_reference(array, tables.tables, expanded, step, levels.outer)
    return native.values(library, array, tables.tables, expanded, step, levels.outer)


def decode_values(
    blocks: EntropyBlocks,
    tables: EntropyTables,
    levels: Levels,
    step: float,
    first: int = 0,
    last: int | None = None,
) -> Floats32:
    """``dequantize(decode_blocks(...))`` in one pass: ``[T, d]`` fp32.

    Raises:
        DamagedBlock: words that no encoder wrote.
    """
    first, last, starts, tokens = decoding_range(blocks, first, last)
    if last == first:
        return np.zeros((0, len(tables.classes)), np.float32)
    expanded, library = levels.expanded(tables.family), native.library()
    if library is None:
        planes, status = rans_decode_reference(blocks.words, starts, tokens, tables.tables)
        check_decoded(status, first)
        return values_reference(np.ascontiguousarray(planes.T), tables.tables, expanded, step, levels.outer)
    values, status = native.decode_values(
        library, blocks.words, starts, tokens, tables.tables, expanded, step, levels.outer
    )
    check_decoded(status, first)
    return values


# ---- the definitions, in NumPy -------------------------------------------------------------------


def _symbol_of(q: NDArray[np.int64], shift: int, cumulative: NDArray[np.uint64], tables: Tables) -> NDArray[np.int64]:
    near = q >> shift
    symbol = np.where(np.abs(near) <= tables.half, near + tables.half, tables.escape)
    start, stop = (np.take_along_axis(cumulative, (symbol + i)[..., None], -1)[..., 0] for i in (0, 1))
    return np.where(start == stop, tables.escape, symbol)


def _level_of(
    q: NDArray[np.int64], shift: int, row: Floats32, sets: NDArray[np.int64], outer: float, half: int
) -> Floats32:
    near = q >> shift
    magnitude = np.abs(q).astype(np.float32) + np.float32(outer) - np.where(sets > 0, np.float32(0.5), np.float32(0))
    plain = np.where(q == 0, np.float32(0), np.where(q < 0, -magnitude, magnitude)).astype(np.float32)
    inside = (np.abs(near) <= half) & (shift == 0)
    from_table = np.take_along_axis(row, (np.clip(near, -half, half) + half)[..., None], -1)[..., 0]
    return np.asarray(np.where(inside, from_table, plain), np.float32)


@dataclass
class _Survivors:
    """Paths ``[T]`` that end in one state of the trellis: what they cost and what they have shown."""

    cost: Floats32
    model: TokenModel


def _best(
    y: Floats32,
    j: int,
    model: TokenModel,
    tables: Tables,
    bits: Floats32,
    levels: Floats32,
    outer: float,
    weight: float,
) -> list[tuple[Floats32, NDArray[np.int64]]]:
    """Cost and number ``[T]`` of the best even and of the best odd choice."""
    shift, half = int(tables.shifts[j]), tables.half
    sets = model.states & 1 if tables.n_states > 1 else np.zeros(len(y), np.int64)
    context = tables.contexts[np.minimum(model.levels >> 7, 255)]
    table = tables.class_tables[tables.classes[j], context]
    rate_row, level_row = bits[sets, table], levels[sets, table]

    def cost(q: NDArray[np.int64]) -> Floats32:
        near = q >> shift
        number = ((q << 1) ^ (q >> 63)) & 0xFFFFFFFF
        length = (LENGTH_BITS + np.frexp(number.astype(np.float64))[1] - 1).astype(np.float32)
        inner = np.take_along_axis(rate_row, (np.clip(near, -half, half) + half)[..., None], -1)[..., 0]
        rate = np.where(np.abs(near) <= half, inner + np.float32(shift), rate_row[:, -1] + length)
        error = y - _level_of(q, shift, level_row, sets, outer, half)
        return np.asarray(error * error + np.float32(weight) * rate.astype(np.float32), np.float32)

    below = (np.abs(y) + np.where(sets > 0, np.float32(0.5), np.float32(0))).astype(np.int64)
    sign = np.where(y < 0, -1, 1)
    choices = [sign * below, sign * (below + 1)]
    costs, odd = [cost(q) for q in choices], (below & 1).astype(bool)
    best = [np.where(odd, costs[1], costs[0]), np.where(odd, costs[0], costs[1])]
    numbers = [np.where(odd, choices[1], choices[0]), np.where(odd, choices[0], choices[1])]
    zero = cost(np.zeros_like(below))
    takes_zero = (below > 0) & (below < 8) & (zero < best[0])
    best[0], numbers[0] = np.where(takes_zero, zero, best[0]), np.where(takes_zero, 0, numbers[0])
    return list(zip(best, numbers, strict=True))


def quantize_reference(
    scaled: Floats32, tables: Tables, bits: Floats32, levels: Floats32, outer: float, multiplier: float
) -> Symbols:
    """The definition of :func:`quantize`, all tokens at once; ``scaled`` is in steps."""
    n, n_states = len(scaled), tables.n_states
    start = TokenModel.start(tables, (n,))
    survivors = [_Survivors(np.full(n, 0 if s == 0 else np.inf, np.float32), start) for s in range(n_states)]
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for j in map(int, tables.active):
        shift = int(tables.shifts[j])
        grown = [np.full(n, np.inf, np.float32) for _ in range(n_states)]
        numbers, origin = np.zeros((n_states, n), np.int64), np.zeros((n_states, n), np.int64)
        for s, survivor in enumerate(survivors):
            model = TokenModel(tables, survivor.model.levels, np.full(n, s, np.int64))
            choices = _best(scaled[:, j], j, model, tables, bits, levels, outer, multiplier)
            for parity, (cost, number) in enumerate(choices):
                to = NEXT_STATES[n_states][s][parity]
                total = survivor.cost + cost
                better = total < grown[to]
                grown[to] = np.where(better, total, grown[to])
                numbers[to] = np.where(better, number, numbers[to])
                origin[to] = np.where(better, s, origin[to])
        held = np.stack([survivor.model.levels for survivor in survivors])
        made = []
        for s in range(n_states):
            model = TokenModel(tables, held[origin[s], np.arange(n)], origin[s].copy())
            symbol = _symbol_of(numbers[s], shift, model.cumulative(j), tables)
            model.update(j, symbol, numbers[s])
            made.append(_Survivors(grown[s], model))
        survivors = made
        trail.append((numbers, origin))
    out = np.zeros((n, len(tables.classes)), np.int32)
    state = np.argmin(np.stack([survivor.cost for survivor in survivors]), axis=0)
    for j, (numbers, origin) in zip(reversed(tables.active), reversed(trail), strict=True):
        out[:, j] = numbers[state, np.arange(n)]
        state = origin[state, np.arange(n)]
    return out


def values_reference(symbols: Symbols, tables: Tables, levels: Floats32, step: float, outer: float) -> Floats32:
    """The definition of :func:`dequantize`."""
    out = np.zeros(symbols.shape, np.float32)
    model = TokenModel.start(tables, (len(symbols),))
    for j in map(int, tables.active):
        q, shift = symbols[:, j].astype(np.int64), int(tables.shifts[j])
        sets = model.states & 1 if tables.n_states > 1 else np.zeros(len(q), np.int64)
        context = tables.contexts[np.minimum(model.levels >> 7, 255)]
        row = levels[sets, tables.class_tables[tables.classes[j], context]]
        out[:, j] = _level_of(q, shift, row, sets, outer, tables.half) * np.float32(step)
        model.update(j, _symbol_of(q, shift, model.cumulative(j), tables), q)
    return out


# ---- fitting -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UniformCode:
    """A fitted code: one step, tables, levels.

    Attributes:
        family: tables that all layers share.
        tables: each layer's.
        levels: what symbols stand for, shared.
        multiplier: what a bit may cost, in squared steps.
    """

    family: TableFamily
    tables: tuple[EntropyTables, ...]
    levels: Levels
    multiplier: float


def fit_levels(
    layers: Sequence[Floats32], symbols: Sequence[Symbols], tables: Sequence[EntropyTables], outer: float = 0.0
) -> Levels:
    """Centroids of what was coded as each magnitude, in each table; ``layers`` in steps, ``[n, d]`` each."""
    family = tables[0].family
    total, count = (np.zeros((*family.cumulative.shape[:2], CENTROIDS + 1)) for _ in range(2))
    for y, q, own in zip(layers, symbols, tables, strict=True):
        t = own.tables
        model = TokenModel.start(t, (len(q),))
        for j in map(int, t.active):
            values, shift = q[:, j].astype(np.int64), int(t.shifts[j])
            sets = model.states & 1 if t.n_states > 1 else np.zeros(len(q), np.int64)
            context = t.contexts[np.minimum(model.levels >> 7, 255)]
            table, k = t.class_tables[t.classes[j], context], np.abs(values)
            if shift == 0:
                near = (k > 0) & (k <= CENTROIDS)
                beyond = np.abs(y[:, j]) * np.where(np.sign(y[:, j]) == np.sign(values), 1, -1) - (k - 0.5 * sets)
                at = (sets[near], table[near], k[near])
                np.add.at(total, at, beyond[near])
                np.add.at(count, at, 1)
            model.update(j, _symbol_of(values, shift, model.cumulative(j), t), values)
    return Levels((total + LEAST_COUNT * outer) / (count + LEAST_COUNT), outer)


def fit_code(
    layers: Sequence[ArrayLike],
    step: float,
    *,
    n_states: int = 1,
    multiplier: float = MULTIPLIER,
    rounds: int = 3,
    **options: int,
) -> UniformCode:
    """Tables and levels for coefficients like these at this step, by turns with the integers that they lead to.

    Args:
        layers: for each layer ``[n, d]`` calibration coefficients, in order of falling variance.
        step: distance of neighbouring levels of a set.
        n_states: 1, or 4 or 8 for a trellis.
        multiplier: what a bit may cost, in squared steps.
        rounds: how often integers are chosen anew.
        options: of :func:`veloxquant_mlx.codes.fit.fit_tables`.

    Returns:
        The code.

    Raises:
        ValueError: as :func:`quantize` and ``fit_tables``.
    """
    if n_states not in NEXT_STATES:
        raise ValueError(f"n_states must be one of {sorted(NEXT_STATES)}, got {n_states}")
    scaled = [_scaled(np.asarray(y), step) for y in layers]
    symbols = [dead_zone(y, 1.0) for y in scaled]
    family, tables = fit_tables(symbols, **options)
    levels = fit_levels(scaled, symbols, tables)
    if n_states > 1:  # both sets begin with the plain code's tables; the rounds part them
        cumulative = np.repeat(family.cumulative, 2, axis=0)
        offsets = np.repeat(levels.offsets, 2, axis=0)
        family = TableFamily(
            cumulative, family.class_tables, family.weights, family.contexts, family.precision, n_states
        )
        tables = tuple(EntropyTables(family, own.classes, own.shifts) for own in tables)
        levels = Levels(offsets, levels.outer)
    for _ in range(rounds):
        symbols = [quantize(y, own, levels, 1.0, multiplier) for y, own in zip(scaled, tables, strict=True)]
        family, tables = fit_tables(symbols, n_states=n_states, **options)
        levels = fit_levels(scaled, symbols, tables)
    return UniformCode(family, tables, levels, multiplier)


__all__ = [
    "Levels",
    "UniformCode",
    "dead_zone",
    "decode_values",
    "dequantize",
    "fit_code",
    "fit_levels",
    "quantize",
]
