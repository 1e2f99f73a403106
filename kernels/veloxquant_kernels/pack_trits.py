"""Pack ternary codes five to a byte."""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from veloxquant_kernels.kernel import Backend, Kernel, as_rows, check_not_empty, resolve_backend

TRITS_PER_BYTE: Final = 5

_KERNEL = Kernel("pack_trits", ("trits",), ("bytes",))


def trit_bytes(n_trits: int) -> int:
    """Bytes of a row of ``n_trits`` trits."""
    return -(-n_trits // TRITS_PER_BYTE)


def pack_trits_reference(trits: mx.array) -> mx.array:
    """The definition: the number whose base-3 digits are five neighbouring trits, the first lowest."""
    lead, n_trits = trits.shape[:-1], trits.shape[-1]
    n_bytes = trit_bytes(n_trits)
    padded = mx.pad(trits.astype(mx.uint32), [(0, 0)] * len(lead) + [(0, n_bytes * TRITS_PER_BYTE - n_trits)])
    weights = mx.array([3**digit for digit in range(TRITS_PER_BYTE)], dtype=mx.uint32)
    return mx.sum(padded.reshape(*lead, n_bytes, TRITS_PER_BYTE) * weights, axis=-1).astype(mx.uint8)


def pack_trits(trits: mx.array, *, backend: Backend | None = None) -> mx.array:
    """Pack values 0, 1, 2 five to a byte: 1.6 bits each.

    Args:
        trits: ``[..., D]`` uint8, each below 3.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[..., ceil(D / 5)]`` uint8; missing trits are zero.

    Raises:
        ValueError: an empty array.
        TypeError: trits of another dtype.
    """
    check_not_empty("trits", trits)
    if trits.dtype != mx.uint8:
        raise TypeError(f"trits must be uint8, got {trits.dtype}")
    backend = resolve_backend(backend)
    if backend == "reference":
        return pack_trits_reference(trits)
    rows = as_rows(trits)
    shape = (rows.shape[0], trit_bytes(trits.shape[-1]))
    (packed,) = _KERNEL(
        [rows],
        backend=backend,
        grid=(shape[1], shape[0], 1),
        threadgroup=(min(shape[1], 32), 8, 1),
        output_shapes=[shape],
        output_dtypes=[mx.uint8],
    )
    return packed.reshape(*trits.shape[:-1], shape[1])
