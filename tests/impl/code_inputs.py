"""Tables and symbols for tests of the codes."""

import numpy as np

from veloxquant_kernels.rans_format import TokenModel, step_parts
from veloxquant_mlx.codes.entropy import INACTIVE, EntropyTables, TableFamily


def laplace_family(n_contexts=4, half=7, precision=12):
    """Nine tables of two-sided geometric frequencies; the narrowest has a symbol without any, so that it escapes."""
    scales, k = np.geomspace(0.2, 4, 9), np.abs(np.arange(-half, half + 1))
    p = np.concatenate([np.exp(-k / scales[:, None]), np.full((9, 1), 0.01)], axis=1)
    frequencies = np.floor(p / p.sum(axis=1, keepdims=True) * ((1 << precision) - 2 * half - 2)).astype(int) + 1
    frequencies[0, 0] = 0
    frequencies[:, half] += (1 << precision) - frequencies.sum(axis=1)
    cumulative = np.concatenate([np.zeros((9, 1), int), np.cumsum(frequencies, axis=1)], axis=1)
    class_tables = np.minimum(np.arange(6)[:, None] + np.arange(n_contexts), 8)
    weights, contexts = np.geomspace(400, 30, 6).astype(int), np.minimum(np.arange(256) // 40, n_contexts - 1)
    return TableFamily(cumulative, class_tables, weights, contexts, precision)


def tables(d=40, seed=0, **options):
    """Classes and shifts for ``d`` coefficients, two of which are not coded."""
    rng = np.random.default_rng(seed)
    classes, shifts = np.sort(rng.integers(0, 6, d))[::-1].copy(), np.zeros(d, int)
    shifts[: min(d, 4)] = [3, 1, 0, 16][: min(d, 4)]
    if d > 6:
        classes[[5, d - 1]] = INACTIVE
    return EntropyTables(laplace_family(**options), classes, shifts)


def symbols(n_tokens, own, seed=0, spread=2.0):
    """Gaussian integers, every hundredth replaced by any int32, the extremes among them."""
    rng = np.random.default_rng([seed, n_tokens])
    d = len(own.classes)
    q = np.rint(rng.standard_normal((n_tokens, d)) * spread).astype(np.int64)
    wild = rng.random((n_tokens, d)) < 0.01
    q[wild] = rng.integers(-(2**31), 2**31, wild.sum())
    q.ravel()[:: max(q.size // 3, 1)][:3] = [-(2**31), 2**31 - 1, 0][: len(q.ravel()[:: max(q.size // 3, 1)][:3])]
    q[:, ~own.active] = 0
    return q.astype(np.int32)


def coded_bits(symbols, own):
    """Ideal length: the sum of ``log2 1/p`` under the tables, plain bits and escapes included, nothing else."""
    model, total = TokenModel.start(own.tables, (len(symbols),)), 0.0
    active = np.ones(len(symbols), np.bool_)
    for j in own.tables.active:
        for part in step_parts(own.tables, model, int(j), symbols[:, j].astype(np.int64), active):
            cost = part.width.astype(np.float64) - np.log2(part.frequency.astype(np.float64))
            total += float(cost[part.active].sum())
    return total
