"""Pairwise-covering arrays: few cases in which every pair of values of every two factors occurs."""

import itertools

import numpy as np


def pairwise(factors, seed=0):
    """Rows of values, one per factor, greedily chosen until every pair is covered.

    ``factors`` maps names to lists of values. Returns a list of tuples in the order of the names.
    """
    values = list(factors.values())
    columns = list(itertools.combinations(range(len(values)), 2))
    missing = {(i, j, a, b) for i, j in columns for a in range(len(values[i])) for b in range(len(values[j]))}
    rng = np.random.default_rng(seed)
    rows = []
    while missing:
        i, j, a, b = min(missing)
        best, best_gain = None, -1
        for _ in range(64):
            row = [int(rng.integers(len(v))) for v in values]
            row[i], row[j] = a, b
            gain = sum((p, q, row[p], row[q]) in missing for p, q in columns)
            if gain > best_gain:
                best, best_gain = row, gain
        missing -= {(p, q, best[p], best[q]) for p, q in columns}
        rows.append(tuple(v[k] for v, k in zip(values, best, strict=True)))
    return rows
