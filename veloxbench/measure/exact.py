"""The exact suite: codes, bytes and allocations of the reference implementation on fixed inputs, without a model.

A case produces arrays; integers become digests and must be equal, floats become a sketch and must agree up to
rounding. Inputs are chosen so that rounding decides nothing: small whole numbers
whose vectors have a length that is a whole number, so that sums are exact in any order and rotated coordinates lie
on a lattice far from the boundaries between codes. One set of digests then holds for every BLAS and every CPU.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxbench.records.arm import Arm
from veloxbench.records.record import Estimate, MethodRef, content_hash

N_SKETCHES = 8
DIGEST_HEX = 12
"""Hexadecimal digits of a digest kept in a metric: 48 bits, which a double holds exactly."""

Product = mx.array | NDArray[Any] | int | float | str | list[Any] | dict[str, Any]
Products = Mapping[str, Product]


@dataclass(frozen=True)
class FixedInputs:
    """The task of the suite: what every case is fed."""

    batch: int = 2
    heads: int = 2
    head_dim: int = 64
    pieces: tuple[int, ...] = (70, 1, 1, 24)
    """Tokens fed at a time: a prefill, single tokens, a chunk."""
    trimmed: int = 5
    """Tokens taken back after them."""
    again: int = 3
    """Tokens fed after that."""

    def tensor(self, seed: int, tokens: int, head_dim: int | None = None) -> NDArray[np.float16]:
        """Keys or values ``[batch, heads, tokens, head_dim]``."""
        return lattice_vectors((self.batch, self.heads, tokens, head_dim or self.head_dim), seed)

    @property
    def sha256(self) -> str:
        """Hash of the first case's keys: inputs from another generator make another suite."""
        return hashlib.sha256(self.tensor(0, sum(self.pieces)).tobytes()).hexdigest()


@dataclass(frozen=True)
class Case:
    """One thing that the suite looks at, named as an arm is.

    Attributes:
        produce: its arrays and figures by name. Strings, lists and mappings are digested as JSON.
        implementation: hash of the code that produces them.
    """

    arm: Arm
    produce: Callable[[], Products]
    implementation: Callable[[], str]
    target_means: Literal["code_bits", "bits_per_value"] | None = None

    @property
    def ref(self) -> MethodRef:
        """The case as it stands in a record's key."""
        return MethodRef(**self.arm.model_dump(), target_means=self.target_means, implementation=self.implementation())


@functools.cache
def lattice_vectors(shape: tuple[int, ...], seed: int) -> NDArray[np.float16]:
    """Vectors of small whole numbers, all of one whole length, times powers of two; every second negates the last.

    Args:
        shape: ``[..., T, D]``.
        seed: of NumPy's default generator.

    Returns:
        fp16. A vector divided by its root mean square and rotated by a Hadamard matrix has coordinates on a
        lattice of odd multiples of one step (the length is odd), never on the boundary at zero. An even number of
        first tokens has mean zero, so that taking the mean off leaves the lattice. One pair of vectors is zero.
    """
    rng = np.random.default_rng(seed)
    *lead, n_tokens, head_dim = shape
    n_pairs = -(-n_tokens // 2)
    n = int(np.prod(lead)) * n_pairs
    length = round((3.5 * head_dim) ** 0.5) // 2 * 2 + 1
    rows: list[NDArray[np.int64]] = []
    n_drawn = 0
    while n_drawn < n:  # one in a hundred or so has the length
        drawn = rng.integers(-2, 3, size=(4096, head_dim, 2), dtype=np.int8).sum(axis=-1, dtype=np.int64)
        rows.append(drawn[(drawn**2).sum(axis=-1) == length**2])
        n_drawn += len(rows[-1])
    whole = np.concatenate(rows)[:n]
    scaled = whole * 2.0 ** rng.integers(-1, 2, size=(n, 1))
    pairs = scaled.reshape(*lead, n_pairs, 1, head_dim)
    pairs[(0,) * len(lead) + (n_pairs // 2,)] = 0.0
    vectors = np.concatenate([pairs, -pairs], axis=-2).reshape(*lead, 2 * n_pairs, head_dim)
    halves = vectors[..., :n_tokens, :].astype(np.float16)
    halves.setflags(write=False)
    return halves


def digest(value: Product) -> int:
    """48 bits of the sha256 of an array's dtype, shape and bytes, or of a value's canonical JSON."""
    if isinstance(value, (mx.array, np.ndarray)):
        array = np.ascontiguousarray(np.array(value))
        if array.dtype.hasobject:
            raise TypeError(f"an array of objects has no bytes to digest: {array!r:.80}")
        content = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()
    else:
        content = content_hash(value)
    return int(content[:DIGEST_HEX], 16)


def sketch(values: NDArray[np.floating[Any]]) -> list[float]:
    """Sums under fixed patterns of signs, each divided by sqrt(n): as large as a value is, moved by every change."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    signs = np.random.default_rng(flat.size).integers(0, 2, size=(N_SKETCHES, flat.size)) * 2.0 - 1.0
    return [float(total) for total in signs @ flat / np.sqrt(flat.size)]


def observe(case: Case) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Metrics and samples of a case.

    Arrays of floats are sketched, every other array, string, list and mapping is digested, numbers stay.
    """
    metrics: dict[str, Estimate] = {}
    samples: dict[str, list[float]] = {}
    for name, product in case.produce().items():
        array = np.array(product) if isinstance(product, (mx.array, np.ndarray)) else None
        if array is not None and array.dtype.kind == "f":
            samples[name] = sketch(array) if array.size > N_SKETCHES else [float(x) for x in array.ravel()]
            metrics[f"{name}_values"] = Estimate(value=array.size, unit="count")
        elif isinstance(product, (int, float)) and not isinstance(product, bool):
            metrics[name] = Estimate(value=product, unit="count" if isinstance(product, int) else "")
        else:
            metrics[name] = Estimate(value=digest(product), unit="sha256/48")
    return metrics, samples
