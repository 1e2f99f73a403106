"""Choose a width for every unit of a KV cache: pure functions on weighted distortion tables.

A *unit* is what gets one width: a layer, the keys of a layer, one head. It offers a few *choices*, each with
a real cost in bits (every resident byte counted) and a loss (weighted distortion). The three solvers here
minimise the summed loss under a budget of bits: :func:`reverse_water_filling` over real-valued widths in
closed form, :func:`greedy_choices` along the lower convex hulls, :func:`optimal_choices` exactly.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import TypeAdapter

from veloxquant_mlx.files import reading
from veloxquant_mlx.quantizers.base import Coding

Floats = NDArray[np.float64]


def _positive(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {array.shape}")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] = {array[bad[0]]} is not a finite positive number")
    return array


def reverse_water_filling(
    weights: ArrayLike,
    decays: ArrayLike,
    average: float,
    *,
    lower: float = 0.0,
    upper: float = math.inf,
    sizes: ArrayLike | None = None,
) -> Floats:
    """Real-valued widths that minimise ``sum(weights * decays**-b)`` at a given size-weighted mean.

    Unclipped and with one common decay β this is ``b_i = average + (ln w_i - mean ln w) / ln β`` (RateQuant,
    arXiv 2605.06675, §3; Cover & Thomas, Elements of Information Theory, §10.3.3 for β = 4). Bounds are met
    exactly: the water level solves a piecewise linear equation whose breakpoints are known, no iteration.

    Args:
        weights: ``[N]`` loss of each unit at zero bits (sensitivity x α), positive.
        decays: ``[N]`` or a scalar, the factor β > 1 by which one bit divides the loss.
        average: wanted mean width, between ``lower`` and ``upper``.
        lower: smallest width of any unit.
        upper: largest width of any unit.
        sizes: ``[N]`` values per token of each unit; equal if absent.

    Returns:
        ``[N]`` widths whose size-weighted mean is ``average``.

    Raises:
        ValueError: a weight, decay or size that is not finite and positive, or an average out of bounds.
    """
    weight = _positive("weights", weights)
    decay = _positive("decays", np.broadcast_to(np.asarray(decays, dtype=np.float64), weight.shape))
    if (decay <= 1).any():
        raise ValueError(f"decays must exceed 1, got {decay.min()}")
    size = np.ones_like(weight) if sizes is None else _positive("sizes", sizes)
    if size.shape != weight.shape:
        raise ValueError(f"sizes has {size.size} entries for {weight.size} weights")
    if not lower <= average <= upper:
        raise ValueError(f"average={average} lies outside [{lower}, {upper}]")
    # Stationarity: b_i = (height_i - level) / rate_i, clipped; the mean falls as the level rises.
    rate = np.log(decay)
    height = np.log(weight * rate / size)

    def widths(level: float) -> Floats:
        return np.asarray(np.clip((height - level) / rate, lower, upper))

    def mean(level: float) -> float:
        return float(np.average(widths(level), weights=size))

    edges = [height - rate * edge for edge in (lower, upper) if math.isfinite(edge)]
    breakpoints = np.unique(np.concatenate([height, *edges]))
    # Between two neighbouring breakpoints the same units are unclipped, and the mean is linear in the level.
    inside = np.searchsorted(-np.array([mean(level) for level in breakpoints]), -average)
    left = breakpoints[inside - 1] if inside > 0 else breakpoints[0] - 1.0
    right = breakpoints[inside] if inside < breakpoints.size else breakpoints[-1] + 1.0
    middle = 0.5 * (left + right)
    free = ((height - middle) / rate > lower) & ((height - middle) / rate < upper)
    if not free.any():  # flat: every unit is at a bound on both sides
        return widths(float(left if mean(float(left)) >= average else right))
    slope = float(np.sum(size[free] / rate[free]) / size.sum())
    return widths(float(middle + (mean(float(middle)) - average) / slope))


@dataclass(frozen=True)
class _Problem:
    """Choices of every unit as ``(index, cost, loss)``, cheapest first; costs as whole numbers."""

    options: tuple[tuple[tuple[int, int, float], ...], ...]
    budget: int


def _problem(costs: Sequence[Sequence[Fraction]], losses: Sequence[ArrayLike], budget: Fraction) -> _Problem:
    if not costs or len(costs) != len(losses):
        raise ValueError(f"{len(costs)} rows of costs for {len(losses)} rows of losses")
    scale = math.lcm(*(cost.denominator for row in costs for cost in row))
    common = math.gcd(*(int(cost * scale) for row in costs for cost in row)) or 1
    options = []
    for unit, (row, loss_row) in enumerate(zip(costs, losses, strict=True)):
        loss = np.asarray(loss_row, dtype=np.float64)
        if loss.shape != (len(row),):
            raise ValueError(f"unit {unit}: {len(row)} costs for losses of shape {loss.shape}")
        if not np.isfinite(loss).all() or (loss < 0).any():
            raise ValueError(f"unit {unit}: losses must be finite and not negative, got {loss.tolist()}")
        if min(row) < 0:
            raise ValueError(f"unit {unit}: a cost is negative: {min(row)}")
        whole = [int(cost * scale) // common for cost in row]
        order = sorted(range(len(row)), key=lambda i: (whole[i], loss[i]))
        options.append(tuple((i, whole[i], float(loss[i])) for i in order))
    lowest = sum(unit_options[0][1] for unit_options in options)
    whole_budget = math.floor(budget * scale / common)
    if lowest > whole_budget:
        raise ValueError(
            f"budget={budget} is below the cheapest choices, which cost {Fraction(lowest * common, scale)}"
        )
    return _Problem(tuple(options), whole_budget)


def lower_convex_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the choices on the lower convex hull, from the cheapest to the one of least loss.

    Args:
        costs: ascending costs of one unit's choices.
        losses: their losses.

    Returns:
        Indices whose slopes (loss saved per unit of cost) fall strictly; the first is the cheapest choice.
    """
    hull: list[int] = []
    for i in range(len(costs)):
        if hull and losses[i] >= losses[hull[-1]]:
            continue  # dearer and no better
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            before = (losses[a] - losses[b]) * (costs[i] - costs[b])
            after = (losses[b] - losses[i]) * (costs[b] - costs[a])
            if before > after:
                break
            hull.pop()
        hull.append(i)
    return hull


def greedy_choices(
    costs: Sequence[Sequence[Fraction]], losses: Sequence[ArrayLike], budget: Fraction
) -> tuple[int, ...]:
    """Marginal allocation: buy the step that saves most loss per bit until nothing more fits.

    Steps run along each unit's lower convex hull (Fox 1966, "Discrete optimization via marginal analysis"),
    so the result is optimal for the budget that it spends. What a step too large leaves over goes to the
    next best step that fits, which need not be optimal: :func:`optimal_choices` is.

    Args:
        costs: for each unit, the cost of each choice, in bits (any order).
        losses: likewise their losses.
        budget: total bits.

    Returns:
        For each unit the index of its choice.

    Raises:
        ValueError: a loss that is negative or not finite, shapes that disagree, or a budget below the
            cheapest choices.
    """
    problem = _problem(costs, losses, budget)
    steps: list[tuple[float, int, int, int, int]] = []
    chosen, spent = [], 0
    for unit, options in enumerate(problem.options):
        hull = lower_convex_hull([o[1] for o in options], [o[2] for o in options])
        chosen.append(options[hull[0]][0])
        spent += options[hull[0]][1]
        for rank, (a, b) in enumerate(itertools.pairwise(hull)):
            extra = options[b][1] - options[a][1]
            steps.append(((options[b][2] - options[a][2]) / extra, unit, rank, extra, options[b][0]))
    blocked: set[int] = set()
    for _, unit, _, extra, choice in sorted(steps):
        if unit in blocked:
            continue
        if spent + extra > problem.budget:
            blocked.add(unit)
        else:
            chosen[unit], spent = choice, spent + extra
    return tuple(chosen)


def optimal_choices(
    costs: Sequence[Sequence[Fraction]], losses: Sequence[ArrayLike], budget: Fraction
) -> tuple[int, ...]:
    """The choices of least summed loss within the budget, exactly (multiple-choice knapsack).

    Dynamic programming over the costs that partial allocations can reach: a few hundred where units are of
    equal size, the usual case. Ties go to the cheaper allocation. Arguments, result and errors are those of
    :func:`greedy_choices`.
    """
    problem = _problem(costs, losses, budget)
    reach, least = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    rest = sum(options[0][1] for options in problem.options)
    for options in problem.options:
        rest -= options[0][1]
        width = len(options)
        total = (reach[:, None] + np.array([o[1] for o in options])).ravel()
        loss = (least[:, None] + np.array([o[2] for o in options])).ravel()
        fits = np.flatnonzero(total <= problem.budget - rest)
        order = fits[np.lexsort((loss[fits], total[fits]))]  # the first of each cost has its least loss
        keep = order[np.r_[True, np.diff(total[order]) > 0]]
        better = np.r_[True, loss[keep][1:] < np.minimum.accumulate(loss[keep])[:-1]]
        keep = keep[better]  # dearer and no better cannot be part of an optimum
        trail.append((keep // width, keep % width))
        reach, least = total[keep], loss[keep]
    state, chosen = int(np.argmin(least)), []
    for options, (parent, option) in zip(reversed(problem.options), reversed(trail), strict=True):
        chosen.append(options[int(option[state])][0])
        state = int(parent[state])
    return tuple(reversed(chosen))


def held_tokens(max_size: int | None, at_tokens: int) -> int:
    """Tokens that a layer holds of a sequence of ``at_tokens``, its sliding window's at most."""
    return at_tokens if max_size is None else min(max_size, at_tokens)


@dataclass(frozen=True)
class AllocationEntry:
    """One unit's width and what it costs.

    Attributes:
        name: ``layer_3``, ``layer_3.keys`` or ``layer_3.values.head_1``.
        bits: code width.
        n_values: K and V values that the unit caches per token.
        head_dim: length of its vectors.
        bits_per_value: real cost of that width at that head_dim, everything counted.
        max_size: the layer's sliding window in tokens, None for full attention.
    """

    name: str
    bits: int
    n_values: int
    head_dim: int
    bits_per_value: Fraction
    max_size: int | None = None


@dataclass(frozen=True)
class BitAllocation(Mapping[str, int]):
    """Widths by unit, a read-only mapping ``name -> bits`` that knows what it costs.

    Attributes:
        entries: the units, in the model's order.
        unit: what a unit is: ``layer``, ``layer_kv`` or ``head``.
        quantizer: name of the quantizer whose costs and distortions were used; as in ``kivi_keys/affine`` where
            values are coded differently from keys.
        target_bits: the bits_per_value that was asked for.
        sinks: first tokens that the cache keeps in fp16, which the entries' costs count.
        window: last tokens that it keeps in fp16, counted likewise.
        at_tokens: sequence length at which those costs hold.
        forecast_nats: loss increase per token that the curves predict; absent if not from curves.
        codings: the keys' and the values' quantizer with its parameters; None where only the name is known, as in
            allocations saved before they were kept.
    """

    entries: tuple[AllocationEntry, ...]
    unit: str
    quantizer: str
    target_bits: float
    sinks: int = 0
    window: int = 0
    at_tokens: int = 2048
    forecast_nats: float | None = None
    codings: tuple[Coding, Coding] | None = None

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(entry.name for entry in self.entries).items() if count > 1]
        if not self.entries or twice:
            raise ValueError(f"entries names {twice[0]!r} twice" if twice else "entries is empty")

    @cached_property
    def _bits(self) -> dict[str, int]:
        return {entry.name: entry.bits for entry in self.entries}

    def __getitem__(self, name: str) -> int:
        return self._bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bits_per_value(self) -> Fraction:
        """The realised mean cost over all values that are held at ``at_tokens``; never above ``target_bits``.

        Outlier tokens are not among them: a cache with an outlier observer takes the bare widths, ``dict(self)``.
        """
        held = [entry.n_values * held_tokens(entry.max_size, self.at_tokens) for entry in self.entries]
        bits = (entry.bits_per_value * values for entry, values in zip(self.entries, held, strict=True))
        return sum(bits, Fraction(0)) / sum(held)

    @property
    def histogram(self) -> dict[int, int]:
        """How many units have each width, by ascending width."""
        return dict(sorted(Counter(entry.bits for entry in self.entries).items()))

    def to_json(self) -> str:
        """The allocation as JSON; fractions as ``"5/4"``."""
        return _ALLOCATION.dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str) -> BitAllocation:
        """The inverse of :meth:`to_json`."""
        return _ALLOCATION.validate_json(text)

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to ``path``."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BitAllocation:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, or no allocation.
        """
        with reading(path, "bit allocation"):
            return cls.from_json(Path(path).read_text(encoding="utf-8"))


_ALLOCATION = TypeAdapter(BitAllocation)


def shuffled(allocation: BitAllocation, seed: int) -> BitAllocation:
    """The same widths dealt to other units at random: same histogram, same bytes, no knowledge of the model.

    The control for any claim of an allocator. Widths move only between units of equal size, head_dim and sliding
    window (and between keys and values only if they are coded alike), so the realised bits_per_value stays exactly
    the same.

    Args:
        allocation: what to shuffle.
        seed: of NumPy's default generator.

    Returns:
        The shuffled allocation, without a forecast.
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, entry in enumerate(allocation.entries):
        side = ".values" in entry.name if "/" in allocation.quantizer else None
        groups.setdefault((side, entry.n_values, entry.head_dim, entry.max_size), []).append(position)
    entries = list(allocation.entries)
    for positions in groups.values():
        for position, source in zip(positions, rng.permutation(positions).tolist(), strict=True):
            donor = allocation.entries[source]
            entries[position] = replace(entries[position], bits=donor.bits, bits_per_value=donor.bits_per_value)
    return replace(allocation, entries=tuple(entries), forecast_nats=None)
