"""Tables that are read by gathers along an axis: the quick way to decode small integers in plain MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def expand_table(entries: np.ndarray, group: int) -> np.ndarray:
    """Table of all ``group``-tuples of ``entries``, ``[len(entries)**group, group]``, the first of a tuple fastest."""
    levels = len(entries)
    index = np.arange(levels**group)
    return np.stack([entries[index // levels**j % levels] for j in range(group)], axis=-1)


def lookup_table(rows: np.ndarray) -> mx.array:
    """A table for :func:`lookup` from ``[N, G]`` entries; fp32 entries travel in pairs, as complex64.

    Evaluated here: a lazy array belongs to the thread that made it, and tables are shared.
    """
    table = mx.array(np.ascontiguousarray(rows))
    table = table.view(mx.complex64) if rows.dtype == np.float32 and rows.shape[1] % 2 == 0 else table
    mx.eval(table)
    return table


def lookup(table: mx.array, index: mx.array) -> mx.array:
    """Entries of a :func:`lookup_table`: ``[...]`` unsigned indices to ``[..., G]``.

    A gather along an axis costs MLX on CPU a twentieth of ``mx.take`` of rows.
    """
    flat = index.reshape(-1, 1)
    entries = mx.take_along_axis(table, mx.broadcast_to(flat, (flat.shape[0], table.shape[1])), axis=0)
    if entries.dtype == mx.complex64:
        entries = entries.view(mx.float32)
    return entries.reshape(*index.shape, entries.shape[1])
