"""Unpack ternary codes, five to a byte."""

from __future__ import annotations

import mlx.core as mx

from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_not_empty, resolve_backend
from veloxquant_kernels.pack_trits import TRITS_PER_BYTE, trit_bytes

_KERNEL = Kernel("unpack_trits", ("bytes",), ("trits",))


def unpack_trits_reference(data: mx.array, n_trits: int) -> mx.array:
    """The definition: the base-3 digits of every byte, the lowest first."""
    weights = mx.array([3**digit for digit in range(TRITS_PER_BYTE)], dtype=mx.uint32)
    digits = (data.astype(mx.uint32)[..., None] // weights) % 3
    return digits.reshape(*data.shape[:-1], -1)[..., :n_trits].astype(mx.uint8)


def unpack_trits(data: mx.array, n_trits: int, *, backend: Backend | None = None) -> mx.array:
    """The inverse of :func:`veloxquant_kernels.pack_trits.pack_trits`.

    Args:
        data: ``[..., ceil(n_trits / 5)]`` uint8.
        n_trits: trits in a row.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[..., n_trits]`` uint8.

    Raises:
        ValueError: rows that do not hold exactly ``n_trits``.
        TypeError: data of another dtype.
    """
    check_not_empty("data", data)
    if data.dtype != mx.uint8:
        raise TypeError(f"data must be uint8, got {data.dtype}")
    if n_trits < 1 or data.shape[-1] != trit_bytes(n_trits):
        raise ValueError(f"data has {data.shape[-1]} bytes a row; {n_trits} trits fill {trit_bytes(n_trits)}")
    backend = resolve_backend(backend)
    if backend == "reference":
        return unpack_trits_reference(data, n_trits)
    rows = as_rows(data)
    (trits,) = _KERNEL(
        [rows],
        backend=backend,
        grid=(n_trits, rows.shape[0], 1),
        threadgroup=(min(n_trits, 32), 8, 1),
        output_shapes=[(rows.shape[0], n_trits)],
        output_dtypes=[mx.uint8],
    )
    return trits.reshape(*data.shape[:-1], n_trits)
