"""Allocation of widths: closed form, greedy and exact solvers, and the mapping they return."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import minimize

from veloxquant_mlx.allocators.allocation import (
    AllocationEntry,
    BitAllocation,
    greedy_choices,
    lower_convex_hull,
    optimal_choices,
    reverse_water_filling,
    shuffled,
)

LLOYD_MAX = (1.0, 0.36338, 0.11748, 0.03455, 0.00950)
"""Distortion of a unit Gaussian at 0..4 bits (Max 1960)."""


def brute_force(costs, losses, budget):
    """Least loss over every combination within the budget."""
    best = None
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        if sum(row[c] for row, c in zip(costs, choice, strict=True)) <= budget:
            loss = sum(row[c] for row, c in zip(losses, choice, strict=True))
            best = loss if best is None else min(best, loss)
    return best


def total(rows, choice):
    return sum(row[c] for row, c in zip(rows, choice, strict=True))


def test_closed_form_is_the_log_weight_rule_where_no_bound_binds():
    """b_i = mean + (ln w_i - mean ln w) / ln beta (RateQuant, section 3)."""
    weights = np.array([1.0, 2.0, 8.0, 0.5])
    expected = 3.0 + (np.log(weights) - np.log(weights).mean()) / np.log(3.5)
    np.testing.assert_allclose(reverse_water_filling(weights, 3.5, 3.0), expected, rtol=1e-12)


def test_closed_form_equalises_the_distortion_of_gaussians():
    """Unclipped Gaussian components all end at the water level D (Cover & Thomas, theorem 10.3.3)."""
    variances = np.array([4.0, 1.0, 0.25, 0.01])
    bits = reverse_water_filling(variances, 4.0, 1.0)
    distortion = variances * 4.0**-bits
    water = distortion[0]
    np.testing.assert_allclose(distortion, np.minimum(variances, water), rtol=1e-12)
    assert bits.mean() == pytest.approx(1.0, abs=1e-12)
    assert bits[3] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_closed_form_with_bounds_and_unequal_units_matches_a_numeric_optimiser(seed):
    """SLSQP on the same convex program finds no lower loss and the same widths to 1e-3 bits."""
    rng = np.random.default_rng(seed)
    weights, decays = np.exp(rng.normal(0, 2, 8)), rng.uniform(2.0, 4.5, 8)
    sizes = rng.integers(1, 4, 8).astype(float)
    bits = reverse_water_filling(weights, decays, 2.0, lower=0.5, upper=4.0, sizes=sizes)
    assert np.average(bits, weights=sizes) == pytest.approx(2.0, abs=1e-9)
    solution = minimize(
        lambda b: np.sum(weights * decays**-b),
        np.full(8, 2.0),
        jac=lambda b: -weights * np.log(decays) * decays**-b,
        bounds=[(0.5, 4.0)] * 8,
        constraints={"type": "eq", "fun": lambda b: sizes @ b - 2.0 * sizes.sum(), "jac": lambda b: sizes},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solution.success
    assert np.sum(weights * decays**-bits) <= solution.fun * (1 + 1e-9)
    np.testing.assert_allclose(bits, solution.x, atol=1e-3)


@pytest.mark.parametrize("average", [1.0, 4.0])
def test_closed_form_at_a_bound_gives_that_bound(average):
    """A mean equal to a bound leaves one solution."""
    bits = reverse_water_filling([1.0, 100.0, 3.0], 4.0, average, lower=1.0, upper=4.0)
    np.testing.assert_allclose(bits, average, atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "decays", "average", "message"),
    [
        ([1.0, float("nan")], 4.0, 1.0, r"weights\[1\] = nan"),
        ([1.0, -2.0], 4.0, 1.0, r"weights\[1\] = -2.0"),
        ([1.0, 2.0], 1.0, 1.0, "decays must exceed 1"),
        ([1.0, 2.0], 4.0, -0.5, "average=-0.5"),
    ],
)
def test_closed_form_refuses_what_has_no_solution(weights, decays, average, message):
    with pytest.raises(ValueError, match=message):
        reverse_water_filling(weights, decays, average)


def test_hull_drops_choices_that_a_mixture_beats():
    """(2, 0.9) lies above the chord from (1, 1) to (3, 0.2); (4, 0.2) saves nothing."""
    assert lower_convex_hull([0, 1, 2, 3, 4], [4.0, 1.0, 0.9, 0.2, 0.2]) == [0, 1, 3]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_optimal_for_convex_tables_of_equal_cost(seed):
    """With equal steps and convex losses greedy reaches brute force at every budget (Fox 1966)."""
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(0, 2, 5))
    costs = [[Fraction(0)] + [b + Fraction(1, 4) for b in range(1, 4)]] * 5
    costs = [[row[1] - 1, *row[1:]] for row in costs]  # 1/4, 5/4, 9/4, 13/4: equal steps
    losses = [[w * d for d in LLOYD_MAX[:4]] for w in weights]
    for budget in range(2, 17):
        choice = greedy_choices(costs, losses, Fraction(budget))
        assert total(costs, choice) <= budget
        assert total(losses, choice) == pytest.approx(brute_force(costs, losses, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_exact_solver_agrees_with_brute_force(seed):
    """Unequal sizes, odd costs, tables that are neither convex nor monotone: the exact solver is exact."""
    rng = np.random.default_rng(seed)
    costs = [[Fraction(int(rng.integers(0, 30)), int(rng.choice([1, 4, 5, 64]))) for _ in range(4)] for _ in range(5)]
    losses = rng.exponential(1.0, (5, 4)).tolist()
    lowest = sum(min(row) for row in costs)
    budget = lowest + Fraction(int(rng.integers(0, 40)), 2)
    choice = optimal_choices(costs, losses, budget)
    assert total(costs, choice) <= budget
    assert total(losses, choice) == pytest.approx(brute_force(costs, losses, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_greedy_is_optimal_where_its_budget_ends_a_step(seed):
    """A budget equal to the k best hull steps is a Lagrangian optimum: no combination does better."""
    rng = np.random.default_rng(seed)
    costs = [[Fraction(0), Fraction(5, 4), Fraction(9, 4), Fraction(17, 4)] for _ in range(4)]
    losses = (np.exp(rng.normal(0, 2, (4, 1))) * [1.0, 0.36338, 0.11748, 0.00950]).tolist()
    steps = sorted(
        ((row[b] - row[a]) / float(costs[0][b] - costs[0][a]), costs[0][b] - costs[0][a])
        for row in losses
        for a, b in [(0, 1), (1, 2), (2, 3)]
    )
    for budget in itertools.accumulate(extra for _, extra in steps):
        choice = greedy_choices(costs, losses, budget)
        assert total(costs, choice) == budget
        assert total(losses, choice) == pytest.approx(brute_force(costs, losses, budget), rel=1e-12)


@pytest.mark.parametrize("solver", [greedy_choices, optimal_choices])
def test_solvers_name_the_lowest_reachable_cost(solver):
    """A budget below the cheapest choices is an error that says what they cost."""
    with pytest.raises(ValueError, match="which cost 5/2"):
        solver([[Fraction(5, 4), Fraction(9, 4)]] * 2, [[1.0, 0.5]] * 2, Fraction(2))


@pytest.mark.parametrize("loss", [float("nan"), -1.0, float("inf")])
@pytest.mark.parametrize("solver", [greedy_choices, optimal_choices])
def test_solvers_refuse_losses_that_are_not_losses(solver, loss):
    with pytest.raises(ValueError, match="unit 1: losses"):
        solver([[Fraction(1), Fraction(2)]] * 2, [[1.0, 0.5], [1.0, loss]], Fraction(4))


def test_exact_solver_handles_a_whole_model_by_heads():
    """180 units x 8 widths at 1.9 bits spends all but less than one step of the budget."""
    rng = np.random.default_rng(0)
    widths = [b + Fraction(1, 4) for b in range(1, 9)]
    weights = np.exp(rng.normal(0, 2, 180))
    losses = [[w * 4.0**-b for b in range(1, 9)] for w in weights]
    choice = optimal_choices([widths] * 180, losses, Fraction(19, 10) * 180)
    mean = total([widths] * 180, choice) / 180
    assert Fraction(19, 10) - Fraction(1, 180) < mean <= Fraction(19, 10)


def entry(i, bits, *, n_values=384, head_dim=64):
    return AllocationEntry(f"layer_{i}", bits, n_values, head_dim, bits + Fraction(16, head_dim))


def allocation(bits, **changes):
    fields = {"unit": "layer", "quantizer": "TurboQuantMSE", "target_bits": 3.0, "forecast_nats": 0.125}
    return BitAllocation(tuple(entry(i, b) for i, b in enumerate(bits)), **(fields | changes))


def test_allocation_is_a_read_only_mapping_that_knows_its_cost():
    """Mean of 1, 2, 4, 4 code bits is 2.75; with an fp16 norm per 64 values it is 3.0."""
    result = allocation([1, 2, 4, 4])
    assert dict(result) == {"layer_0": 1, "layer_1": 2, "layer_2": 4, "layer_3": 4}
    assert result.bits_per_value == 3
    assert result.histogram == {1: 1, 2: 1, 4: 2}
    with pytest.raises(TypeError):
        result["layer_0"] = 8


def test_mean_cost_is_weighted_by_the_values_of_each_unit():
    """One unit three times as large counts three times."""
    result = BitAllocation(
        (entry(0, 4, n_values=300), entry(1, 2, n_values=100)), unit="layer", quantizer="q", target_bits=4.0
    )
    assert result.bits_per_value == Fraction(4 * 3 + 2, 4) + Fraction(1, 4)


def test_allocation_survives_json_and_disk(tmp_path):
    """Saving and loading gives an equal object, fractions exact."""
    original = allocation([1, 2, 4, 4])
    assert BitAllocation.from_json(original.to_json()) == original
    original.save(tmp_path / "bits.json")
    assert BitAllocation.load(tmp_path / "bits.json") == original


def test_allocation_refuses_a_name_twice():
    with pytest.raises(ValueError, match="'layer_0' twice"):
        BitAllocation((entry(0, 1), entry(0, 2)), unit="layer", quantizer="q", target_bits=2.0)


def test_shuffle_keeps_histogram_and_bytes_and_depends_on_its_seed():
    """30 layers with 10 different widths: another order, the same widths, the same cost."""
    original = allocation([1, 2, 4] * 10)
    shuffles = [shuffled(original, seed) for seed in range(20)]
    assert all(s.histogram == original.histogram for s in shuffles)
    assert all(s.bits_per_value == original.bits_per_value for s in shuffles)
    assert all(list(s) == list(original) for s in shuffles)
    assert len({tuple(s.values()) for s in shuffles}) == 20
    assert shuffled(original, 7) == shuffled(original, 7)
    assert original.forecast_nats is not None
    assert shuffles[0].forecast_nats is None


def test_shuffle_moves_widths_only_between_units_of_one_shape():
    """Two shapes: the widths of each shape stay within it, so the mean stays exact."""
    entries = tuple(entry(i, b, n_values=n) for i, (b, n) in enumerate([(1, 64), (2, 64), (4, 512), (3, 512)]))
    original = BitAllocation(entries, unit="layer", quantizer="q", target_bits=4.0)
    for seed in range(10):
        result = shuffled(original, seed)
        assert sorted(list(result.values())[:2]) == [1, 2]
        assert result.bits_per_value == original.bits_per_value
