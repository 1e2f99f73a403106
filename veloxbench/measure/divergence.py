"""Per-position comparison of an arm's logits with the reference's: NLL, KLD, top-1, target probability.

``compare_positions`` is the plain MLX definition. ``compare_rows`` is what a CPU runs: the same figures
from NumPy over blocks of rows that stay in the core's cache, on all cores; MLX's element-wise operations
on CPU are single-threaded and would cost as much as the forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LEAST = np.float32(65504.0)
"""Minus the least log-probability: fp16's largest magnitude. Models mask tokens with logits of -inf."""

ROWS_PER_BLOCK = 8  # 8 x 49k fp32 logits are 1.5 MB: they stay in a core's cache between the passes


@dataclass(frozen=True)
class ReferenceRows:
    """The reference's log-probabilities at some positions, as they are cached.

    ``log_probs`` ``[N, V]`` is fp16: logits after subtracting their logsumexp (so the error is relative to
    the distance from certainty). ``normaliser`` ``[N]`` is the fp32 logsumexp of those rounded values, so
    that the rounded distribution sums to one again.
    """

    log_probs: NDArray[np.float16]
    normaliser: Floats
    nll: Floats
    top1: NDArray[np.int32]


@dataclass(frozen=True)
class PositionStats:
    """One figure per position, ``[N]``: ``kld_nats`` is KL(reference || arm)."""

    nll: Floats
    kld_nats: Floats
    same_top1: NDArray[np.bool_]
    target_prob: Floats

    @staticmethod
    def concatenate(parts: list[PositionStats]) -> PositionStats:
        """Join along the last axis."""
        return PositionStats(
            *(
                np.concatenate([getattr(part, name) for part in parts], axis=-1)
                for name in PositionStats.__annotations__
            )
        )

    def reshape(self, *shape: int) -> PositionStats:
        """Every field in another shape."""
        return PositionStats(*(getattr(self, name).reshape(*shape) for name in PositionStats.__annotations__))


def log_probs_to_single(half: NDArray[np.float16], out: Floats) -> Floats:
    """Exact fp16 -> fp32 of finite values <= 0, several times quicker than ``astype``.

    The bits below the sign, shifted into place, are the magnitude with fp16's exponent bias; one product
    by -2^112 corrects the bias (of subnormals too) and restores the sign.
    """
    bits = out.view(np.uint32)
    np.copyto(bits, half.view(np.uint16), casting="unsafe")
    np.bitwise_and(bits, np.uint32(0x7FFF), out=bits)
    np.left_shift(bits, np.uint32(13), out=bits)
    np.multiply(out, np.float32(-(2.0**112)), out=out)
    return out


def log_probs_to_half(single: Floats, out: NDArray[np.float16]) -> None:
    """fp32 -> fp16 of values <= 0, rounded to nearest even as ``astype`` does; overwrites ``single``.

    Magnitudes below 6e-5 (fp16 subnormals) are rounded twice and may differ by one unit, 6e-8.
    """
    np.maximum(single, -LEAST, out=single)  # its probability is zero
    np.multiply(single, np.float32(-(2.0**-112)), out=single)
    bits = single.view(np.uint32)
    odd = np.right_shift(bits, np.uint32(13))
    np.bitwise_and(odd, np.uint32(1), out=odd)
    np.add(bits, np.uint32(0xFFF), out=bits)
    np.add(bits, odd, out=bits)
    np.right_shift(bits, np.uint32(13), out=bits)
    np.bitwise_or(bits, np.uint32(0x8000), out=bits)
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def _log_sum_exp(rows: Floats, scratch: Floats) -> Floats:
    peak = rows.max(axis=-1, keepdims=True)
    np.subtract(rows, peak, out=scratch)
    np.exp(scratch, out=scratch)
    total: Floats = np.log(scratch.sum(axis=-1)) + peak[:, 0]
    return total


def _each_block(
    logits: Floats,
    targets: NDArray[np.int32],
    pool: ThreadPoolExecutor,
    work: Callable[[slice, Floats, Floats, Floats], None],
) -> tuple[Floats, NDArray[np.int32]]:
    """NLL and most probable token of every row; ``work`` is told of each block: rows, scratch, logsumexp ``[n, 1]``."""
    n_rows = logits.shape[0]
    nll, top1 = np.empty(n_rows, np.float32), np.empty(n_rows, np.int32)

    def of_block(start: int) -> None:
        block = slice(start, min(start + ROWS_PER_BLOCK, n_rows))
        rows = logits[block]
        scratch = np.empty_like(rows)
        lse = _log_sum_exp(rows, scratch)
        nll[block] = lse - np.take_along_axis(rows, targets[block, None], axis=-1)[:, 0]
        top1[block] = rows.argmax(axis=-1)
        work(block, rows, scratch, lse[:, None])

    list(pool.map(of_block, range(0, n_rows, ROWS_PER_BLOCK)))
    return nll, top1


def reference_rows(
    logits: Floats, targets: NDArray[np.int32], out: NDArray[np.float16], pool: ThreadPoolExecutor
) -> ReferenceRows:
    """Log-probabilities of the reference arm, written to ``out`` as fp16.

    Args:
        logits: ``[N, V]`` fp32.
        targets: ``[N]``, the token that followed.
        out: ``[N, V]``, for example a slice of a memory map.
    """
    normaliser = np.empty(logits.shape[0], np.float32)

    def work(block: slice, rows: Floats, scratch: Floats, lse: Floats) -> None:
        np.subtract(rows, lse, out=scratch)
        log_probs_to_half(scratch, out[block])
        normaliser[block] = _log_sum_exp(log_probs_to_single(out[block], scratch), np.empty_like(rows))

    nll, top1 = _each_block(logits, targets, pool, work)
    return ReferenceRows(out, normaliser, nll, top1)


def compare_rows(
    reference: ReferenceRows, logits: Floats, targets: NDArray[np.int32], pool: ThreadPoolExecutor
) -> PositionStats:
    """An arm's logits against the reference, on CPU.

    Args:
        logits: ``[N, V]`` fp32.
        targets: ``[N]``.
    Returns:
        The same figures as :func:`compare_positions`, within fp32 rounding.
    """
    kld = np.empty(logits.shape[0], np.float32)

    def work(block: slice, rows: Floats, scratch: Floats, lse: Floats) -> None:
        log_p = log_probs_to_single(reference.log_probs[block], np.empty_like(rows))
        log_p -= reference.normaliser[block, None]
        # log p - log q first: it is small, so the fp32 sum keeps its digits (sum p log p - sum p log q would not)
        np.maximum(rows, lse - LEAST, out=scratch)  # a logit of -inf: as improbable as fp16 can tell
        np.subtract(log_p, scratch, out=scratch)
        scratch += lse
        np.exp(log_p, out=log_p)
        kld[block] = np.einsum("ij,ij->i", log_p, scratch)

    nll, top1 = _each_block(logits, targets, pool, work)
    return PositionStats(nll, kld, top1 == reference.top1, np.exp(-nll))


def compare(
    reference: ReferenceRows, logits: mx.array, targets: NDArray[np.int32], pool: ThreadPoolExecutor
) -> PositionStats:
    """Compare ``[N, V]`` logits with the reference on whichever device computed them."""
    if mx.default_device() == mx.gpu:
        return compare_positions(mx.array(reference.log_probs), logits, mx.array(targets))
    return compare_rows(reference, as_rows(logits), targets, pool)


def as_rows(logits: mx.array) -> Floats:
    """``[..., V]`` logits as fp32 NumPy rows ``[N, V]``, without a copy where they are fp32 already."""
    return np.asarray(logits.astype(mx.float32).reshape(-1, logits.shape[-1]))


def compare_positions(reference: mx.array, logits: mx.array, targets: mx.array) -> PositionStats:
    """The definition, in MLX: the reference's and the arm's logits ``[N, V]`` against each other.

    KLD is sum p (log p - log q) over the vocabulary; NLL is -log q of the token that followed.
    """
    log_p = reference.astype(mx.float32) - mx.logsumexp(reference.astype(mx.float32), axis=-1, keepdims=True)
    log_p = mx.maximum(log_p, -float(LEAST))
    log_q = logits.astype(mx.float32) - mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True)
    nll = -mx.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
    kld = mx.sum(mx.exp(log_p) * (log_p - mx.maximum(log_q, -float(LEAST))), axis=-1)
    same = mx.argmax(log_q, axis=-1) == mx.argmax(log_p, axis=-1)
    mx.eval(nll, kld, same)
    return PositionStats(np.array(nll), np.array(kld), np.array(same), np.exp(-np.array(nll)))


def worker_pool() -> ThreadPoolExecutor:
    """One thread per core; NumPy releases the lock inside its loops."""
    return ThreadPoolExecutor(os.cpu_count() or 1)
