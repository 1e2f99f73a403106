"""Fit the entropy code's tables on calibration symbols: classes of coefficients, contexts of tokens, frequencies.

All layers (and all steps, for tokens of different ages) share a few dozen tables; a coefficient names its class in two
bytes. Classes are clusters of histograms, tables are clusters of what the classes show in each context: both are found
by Lloyd's iteration on code length, so a class is whatever codes alike, whatever its shape.

Sources: Lloyd 1982; Chou, Lookabaugh & Gray, Entropy-constrained vector quantization, IEEE Trans. ASSP 37 (1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.rans_format import LEVEL_SHIFT, MAX_SHIFT, N_LEVELS, Symbols, TokenModel
from veloxquant_mlx.codes.entropy import INACTIVE, EntropyTables, TableFamily

Floats = NDArray[np.float64]

RANGE: Final = 6.0
"""Standard deviations that a table reaches to before a coefficient stores low bits plainly."""
UNIT: Final = 256
"""A token of ordinary size adds about this much to its level at every step."""
LEAST_MAGNITUDE: Final = 0.3
"""Added to a class' mean magnitude, so that a rare nonzero does not fill a level. Measured: .05 and 1 code longer."""
ITERATIONS: Final = 10


def shifts_for(rms: NDArray[np.floating], half: int) -> NDArray[np.uint8]:
    """Low bits to store plainly, so that ``RANGE`` standard deviations fit the alphabet ``-half..half``."""
    shift = np.ceil(np.log2(np.maximum(np.asarray(rms, np.float64) * RANGE / half, 1)))
    return np.clip(shift, 0, MAX_SHIFT).astype(np.uint8)


def _symbols(values: Symbols, shifts: NDArray[np.uint8], half: int) -> NDArray[np.int64]:
    near = values.astype(np.int64) >> shifts
    return np.where(np.abs(near) <= half, near + half, 2 * half + 1)


def _histograms(keys: NDArray[np.int64], symbols: NDArray[np.int64], n_keys: int, n_symbols: int) -> Floats:
    counts = np.bincount((keys * n_symbols + symbols).ravel(), minlength=n_keys * n_symbols)
    return counts.reshape(n_keys, n_symbols).astype(np.float64)


def _smoothed(counts: Floats) -> Floats:
    """Probabilities: a thousandth of a slowly falling tail is mixed in, and a trace of everything."""
    n_symbols = counts.shape[-1]
    half = (n_symbols - 2) // 2
    k = np.abs(np.arange(-half, half + 1))
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    scale = np.maximum((p[..., :-1] * k).sum(-1, keepdims=True), 0.05)
    tail = np.exp(-k / (2 * scale))
    tail = np.concatenate([tail / tail.sum(-1, keepdims=True), np.full((*tail.shape[:-1], 1), 1e-3)], -1)
    p = p + (1e-3 + 1 / np.maximum(counts.sum(-1, keepdims=True), 1)) * tail + 1e-9
    return np.asarray(p / p.sum(-1, keepdims=True))


def _pooled(counts: Floats, member: NDArray[np.int64], n_clusters: int) -> Floats:
    pooled = np.zeros((n_clusters, counts.shape[1]))
    np.add.at(pooled, member, counts)
    return pooled


def _clusters(counts: Floats, n_clusters: int) -> tuple[NDArray[np.int64], Floats]:
    """Clusters of histograms ``[n, n_symbols]`` by code length, in the order of their entropy.

    Returns:
        ``[n]`` cluster of each, and the pooled counts ``[clusters, n_symbols]``; empty clusters are dropped.
    """
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    entropy = -np.sum(p * np.log2(np.maximum(p, 1e-12)), 1)
    place = np.log(entropy + 0.01)
    edges = np.linspace(place.min(), place.max() + 1e-9, n_clusters + 1)
    member = np.clip(np.searchsorted(edges, place, side="right") - 1, 0, n_clusters - 1)
    for _ in range(ITERATIONS):
        used, member = np.unique(member, return_inverse=True)
        nearest = (counts @ -np.log2(_smoothed(_pooled(counts, member, len(used)))).T).argmin(axis=1)
        if (nearest == member).all():
            break
        member = nearest
    used, member = np.unique(member, return_inverse=True)
    pooled = _pooled(counts, member, len(used))
    p = _smoothed(pooled)
    order = np.argsort(-(p * np.log2(p)).sum(1))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[member], pooled[order]


def integer_frequencies(p: Floats, precision: int) -> NDArray[np.uint16]:
    """Cumulative frequencies ``[..., n_symbols + 1]``, up to ``2**precision``, for probabilities ``[..., n_symbols]``.

    A symbol less likely than half a slot has none and is coded by the escape, the last symbol, which takes its
    probability and has at least one. What rounding leaves over goes where it costs least.
    """
    total = 1 << precision
    flat = p.reshape(-1, p.shape[-1])
    cumulative = np.zeros((len(flat), p.shape[-1] + 1), np.int64)
    for row, out in zip(flat, cumulative, strict=True):
        target = row / row.sum() * total
        rare = target < 0.5
        rare[-1] = False
        target[-1] += target[rare].sum()
        target[rare] = 0
        frequency = np.where(rare, 0, np.maximum(np.rint(target), 1)).astype(np.int64)
        while (excess := int(frequency.sum()) - total) != 0:
            sign = 1 if excess > 0 else -1
            able = frequency > 1 if sign > 0 else frequency > 0
            after = np.maximum(frequency - sign, 1)
            cost = np.where(able, -target * np.log2(after / np.maximum(frequency, 1)), np.inf)
            best = np.argsort(cost)[: max(1, min(abs(excess), int(able.sum()) // 4))]
            frequency[best] -= sign
        out[1:] = np.cumsum(frequency)
    return cumulative.reshape(*p.shape[:-1], -1).astype(np.uint16)


def _levels(layer: Symbols, tables: EntropyTables) -> NDArray[np.int64]:
    """Level ``[n_active, n]`` before each active coefficient of each token."""
    t = tables.tables
    model = TokenModel.start(t, (len(layer),))
    levels = np.zeros((len(t.active), len(layer)), np.int64)
    symbols = _symbols(layer, t.shifts, t.half)
    for i, j in enumerate(t.active):
        levels[i] = np.minimum(model.levels >> LEVEL_SHIFT, N_LEVELS - 1)
        model.update(int(j), symbols[:, j])
    return levels


def fit_tables(
    layers: Sequence[Symbols],
    *,
    n_classes: int = 48,
    n_contexts: int = 16,
    n_tables: int = 64,
    half: int = 63,
    precision: int = 12,
) -> tuple[TableFamily, tuple[EntropyTables, ...]]:
    """Tables for symbols like these.

    Args:
        layers: for each layer (and step) ``[n, d]`` integers, coefficients in order of falling variance: contexts learn
            from the large ones.
        n_classes: classes of coefficients at most.
        n_contexts: contexts, 1 for none.
        n_tables: tables at most.
        half: largest magnitude with a symbol of its own.
        precision: frequencies of a table sum to ``2**precision``.

    Returns:
        The family, and each layer's tables. A coefficient that is zero in all of its tokens is not coded.

    Raises:
        ValueError: no symbols, or only zeros.
    """
    if not layers or any(layer.ndim != 2 or len(layer) == 0 for layer in layers):
        raise ValueError("layers must hold at least one [n, d] array of symbols, n > 0")
    n_symbols = 2 * half + 2
    active = [(layer != 0).any(axis=0) for layer in layers]
    if not any(mask.any() for mask in active):
        raise ValueError("layers holds nothing but zeros: nothing to fit")
    shifts = [shifts_for(np.sqrt(np.square(layer, dtype=np.float64).mean(axis=0)), half) for layer in layers]
    counts = np.concatenate([
        _histograms(np.arange(mask.sum()), _symbols(layer, shift, half)[:, mask], int(mask.sum()), n_symbols)
        for layer, mask, shift in zip(layers, active, shifts, strict=True)
    ])  # fmt: skip
    member, pooled = _clusters(counts, n_classes)
    distance = np.abs(np.arange(n_symbols) - half)
    magnitude = (pooled * distance).sum(-1) / pooled.sum(-1)
    weights = np.clip(np.rint(UNIT / (magnitude + LEAST_MAGNITUDE)), 1, 0xFFFF).astype(np.uint16)
    classes, at = [], 0
    for mask in active:
        own = np.full(mask.shape, INACTIVE, np.uint16)
        own[mask] = member[at : at + mask.sum()]
        classes.append(own)
        at += int(mask.sum())
    blank = TableFamily(
        integer_frequencies(_smoothed(pooled), precision),
        np.arange(len(weights), dtype=np.uint16)[:, None],
        weights,
        np.zeros(N_LEVELS, np.uint8),
        precision,
    )
    drafts = [EntropyTables(blank, own, shift) for own, shift in zip(classes, shifts, strict=True)]
    walked = [_levels(layer, draft) for layer, draft in zip(layers, drafts, strict=True)]
    seen = sum(np.bincount(levels.ravel(), minlength=N_LEVELS) for levels in walked)
    rank = (np.cumsum(seen) - 0.5 * seen) / max(int(np.sum(seen)), 1)
    contexts = np.minimum((rank * n_contexts).astype(np.uint8), n_contexts - 1)
    joint = np.zeros((len(weights) * n_contexts, n_symbols))
    for layer, levels, draft in zip(layers, walked, drafts, strict=True):
        own = draft.classes[draft.active].astype(np.int64)[:, None]
        keys = own * n_contexts + contexts[levels]
        symbols = _symbols(layer, draft.shifts, half)[:, draft.active].T
        joint += _histograms(keys, symbols, len(joint), n_symbols)
    table, pooled = _clusters(joint, n_tables)
    cumulative = integer_frequencies(_smoothed(pooled), precision)
    family = TableFamily(
        cumulative, table.astype(np.uint16).reshape(len(weights), n_contexts), weights, contexts, precision
    )
    return family, tuple(EntropyTables(family, d.classes, d.shifts) for d in drafts)
