"""Keys and values of a layer in coordinates in which every error costs the loss the same.

With x = [keys before their rotation, values] of one token, all heads side by side, μ and C its mean and covariance,
and F = E[g gᵀ] of the loss gradient g with respect to x, an error e raises the loss by ½ e F eᵀ. In the coordinates
y = (x − μ) A P, with A = (F + ε tr(F)/N · I)^½ and P the eigenvectors of A C A, errors cost ½ ‖e‖² each and
coefficients are uncorrelated: one step for all coefficients of all layers is reverse water-filling (Cover & Thomas,
§10.3.3; transform coding with a weighted error, Gersho & Gray 1992, §8). Scopes:

* ``head``: keys and values of each head have a transform of their own;
* ``layer``: all keys and values of a layer share one;
* ``below``: as ``layer``, on what is left after a linear prediction from the *decoded* vector of a layer below.

Cost of decoding a token: ``n · N`` multiply–adds for n coefficients of N values (``head``: of each head's), and
``N · N_below`` for the prediction. The matrices stay in memory: :attr:`LayerKLT.nbytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import mlx.core as mx

from veloxquant_mlx.transforms.coded_matrix import CodedMatrix
from veloxquant_mlx.transforms.rope import LayerRopes, Rope
from veloxquant_mlx.transforms.rotation import matmul_rows

Scope = Literal["head", "layer", "below"]
SCOPES: Final = get_args(Scope)


@dataclass(frozen=True)
class CachedShape:
    """Heads and widths of what a layer caches.

    Attributes:
        n_kv_heads: heads of the keys; the values may have another number (latent attention has one of each).
        key_dim: width of a key.
        n_value_heads: heads of the values.
        value_dim: width of a value.
    """

    n_kv_heads: int
    key_dim: int
    n_value_heads: int
    value_dim: int

    @property
    def key_size(self) -> int:
        """Values of a token's keys, all heads."""
        return self.n_kv_heads * self.key_dim

    @property
    def size(self) -> int:
        """N: values of a token, keys and values of all heads."""
        return self.key_size + self.n_value_heads * self.value_dim

    @staticmethod
    def of(keys: mx.array, values: mx.array) -> CachedShape:
        """Of arrays ``[B, H, T, D]``."""
        return CachedShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])

    def parts(self, scope: Scope) -> list[tuple[int, int]]:
        """Ranges of a token's N values that share a transform."""
        if scope != "head":
            return [(0, self.size)]
        heads = [(i * self.key_dim, (i + 1) * self.key_dim) for i in range(self.n_kv_heads)]
        first = self.key_size
        return heads + [
            (first + i * self.value_dim, first + (i + 1) * self.value_dim) for i in range(self.n_value_heads)
        ]


def joined(x: mx.array) -> mx.array:
    """Heads side by side: ``[B, H, T, D]`` to ``[B, T, H·D]``."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def parted(x: mx.array, n_heads: int) -> mx.array:
    """The inverse of :func:`joined`."""
    return x.reshape(*x.shape[:2], n_heads, -1).transpose(0, 2, 1, 3)


def cached_vectors(keys: mx.array, values: mx.array, ropes: LayerRopes, offset: int | mx.array = 0) -> mx.array:
    """What a layer caches as one vector a token, its rotation undone.

    Args:
        keys: ``[B, H, T, D]`` as they enter the cache.
        values: likewise.
        ropes: of the layer.
        offset: position of the first token, an int or one a row ``[B]``.

    Returns:
        ``[B, T, N]`` fp32.
    """
    sides = (
        ropes.keys.unrotate(keys.astype(mx.float32), offset),
        ropes.values.unrotate(values.astype(mx.float32), offset),
    )
    return mx.concatenate([joined(side) for side in sides], axis=-1)


def keys_and_values(
    x: mx.array, shape: CachedShape, ropes: LayerRopes, offset: int | mx.array = 0
) -> tuple[mx.array, mx.array]:
    """The inverse of :func:`cached_vectors`: ``[B, H, T, D]`` keys and values, fp32."""
    keys = parted(x[..., : shape.key_size], shape.n_kv_heads)
    values = parted(x[..., shape.key_size :], shape.n_value_heads)
    return ropes.keys.rotate(keys, offset), ropes.values.rotate(values, offset)


@dataclass(frozen=True, eq=False)
class Block:
    """The transform of the values ``[start, stop)`` of a token.

    Attributes:
        start: first value.
        stop: behind the last.
        encoder: ``[n, stop − start]``: rows are dotted with the vector to give coefficients.
        decoder: ``[n, stop − start]``: rows are summed, times coefficients, to give the vector.
    """

    start: int
    stop: int
    encoder: CodedMatrix
    decoder: CodedMatrix

    def __post_init__(self) -> None:
        width = self.stop - self.start
        if self.encoder.shape != self.decoder.shape or self.encoder.columns != width or self.encoder.shape[0] > width:
            raise ValueError(
                f"encoder {self.encoder.shape} and decoder {self.decoder.shape} must be alike, at most {width} x "
                f"{width}"
            )

    @property
    def n_coefficients(self) -> int:
        """Coefficients of the block: as many as values, or fewer where the last were left out as always zero."""
        return self.encoder.shape[0]


@dataclass(frozen=True, eq=False)
class LayerKLT:
    """The transform of one layer's keys and values.

    Coefficients of a token come in order of falling variance over the calibration text, whatever the scope.

    Attributes:
        layer: index of the layer's cache.
        shape: what it caches.
        ropes: what rotates it.
        mean: ``[N]`` fp32, of the calibration vectors.
        blocks: one, or one a head for keys and values each.
        order: ``[n]`` uint16: coefficient ``order[i]`` of the blocks in turn comes at place i; None for one block.
        below: index of the cache that the layer is predicted from.
        predictor: ``[N, N_below]``: rows are dotted with the decoded vector of ``below``, its mean subtracted.
        deviations: ``[n]`` fp32, root mean square of each coefficient over the calibration text; no part of
            :attr:`nbytes`, since nothing reads it once codes are fitted.
    """

    layer: int
    shape: CachedShape
    ropes: LayerRopes
    mean: mx.array
    blocks: tuple[Block, ...]
    order: mx.array | None
    below: int | None
    predictor: CodedMatrix | None
    deviations: mx.array

    def __post_init__(self) -> None:
        if (self.below is None) != (self.predictor is None):
            raise ValueError("below and predictor go together")
        if self.mean.shape != (self.shape.size,) or self.deviations.shape != (self.n_coefficients,):
            raise ValueError(
                f"mean must be [{self.shape.size}] and deviations [{self.n_coefficients}], got {self.mean.shape} and "
                f"{self.deviations.shape}"
            )

    @property
    def n_coefficients(self) -> int:
        """n: coefficients of a token."""
        return sum(block.n_coefficients for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes that stay in memory beside the cache: matrices, mean and order."""
        matrices = [m for block in self.blocks for m in (block.encoder, block.decoder)]
        if self.predictor is not None:
            matrices.append(self.predictor)
        return sum(m.nbytes for m in matrices) + self.mean.nbytes + (0 if self.order is None else self.order.nbytes)

    def predicted(self, below: mx.array | None) -> mx.array | float:
        """The forecast of the centred vector from the centred decoded one below, ``[B, T, N]``; 0 without."""
        if (below is None) != (self.predictor is None):
            wanted = "no decoded vector" if self.predictor is None else f"the decoded vector of layer {self.below}"
            raise ValueError(f"layer {self.layer} is predicted from {wanted}")
        if self.predictor is None or below is None:
            return 0.0
        return matmul_rows(below, self.predictor.dense().T)

    def encode(self, x: mx.array, below: mx.array | None = None) -> mx.array:
        """Coefficients ``[B, T, n]`` of vectors ``[B, T, N]`` (:func:`cached_vectors`).

        Args:
            x: vectors, not centred.
            below: :meth:`decode` of layer :attr:`below` for the same tokens; None where the layer is not predicted.
        """
        centred = x - self.mean - self.predicted(below)
        parts = [matmul_rows(centred[..., b.start : b.stop], b.encoder.dense().T) for b in self.blocks]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return y if self.order is None else mx.take(y, self.order, axis=-1)

    def decode(self, y: mx.array, below: mx.array | None = None) -> mx.array:
        """Centred vectors ``[B, T, N]`` of coefficients ``[B, T, n]``: what layers above are predicted from."""
        if self.order is not None:
            y = mx.take(y, mx.argsort(self.order), axis=-1)
        parts, first = [], 0
        for block in self.blocks:
            last = first + block.n_coefficients
            parts.append(matmul_rows(y[..., first:last], block.decoder.dense()))
            first = last
        whole = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return whole + self.predicted(below)

    def vectors(self, keys: mx.array, values: mx.array, offset: int | mx.array = 0) -> mx.array:
        """:func:`cached_vectors` of this layer."""
        if CachedShape.of(keys, values) != self.shape:
            raise ValueError(f"layer {self.layer} was calibrated for {self.shape}, got {CachedShape.of(keys, values)}")
        return cached_vectors(keys, values, self.ropes, offset)

    def keys_and_values(self, centred: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, mx.array]:
        """What attention reads, of what :meth:`decode` gave: ``[B, H, T, D]`` keys (rotated) and values, fp32."""
        return keys_and_values(centred + self.mean, self.shape, self.ropes, offset)

    def arrays(self) -> dict[str, mx.array]:
        """Everything that is an array, by name, for a file."""
        held = {"mean": self.mean, "deviations": self.deviations}
        if self.order is not None:
            held["order"] = self.order
        matrices = {
            f"{i}.{kind}": getattr(b, kind) for i, b in enumerate(self.blocks) for kind in ("encoder", "decoder")
        }
        if self.predictor is not None:
            matrices["predictor"] = self.predictor
        return held | {f"{name}.{part}": a for name, m in matrices.items() for part, a in m.arrays().items()}

    def description(self) -> dict[str, Any]:
        """Everything else, as JSON can hold it."""
        matrices = [(b.start, b.stop, b.encoder.bits, b.decoder.bits) for b in self.blocks]
        return {
            "layer": self.layer,
            "shape": vars(self.shape),
            "ropes": {side: vars(rope) for side, rope in vars(self.ropes).items()},
            "blocks": matrices,
            "below": self.below,
            "predictor": None if self.predictor is None else (self.predictor.bits, self.predictor.columns),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, mx.array], description: Mapping[str, Any]) -> LayerKLT:
        """The transform of what :meth:`arrays` and :meth:`description` gave."""

        def matrix(name: str, bits: int, columns: int) -> CodedMatrix:
            return CodedMatrix(arrays[f"{name}.rows"], arrays[f"{name}.scales"], bits, columns)

        ropes = {
            side: Rope(**{**rope, "frequencies": tuple(rope["frequencies"])})
            for side, rope in description["ropes"].items()
        }
        return LayerKLT(
            layer=description["layer"],
            shape=CachedShape(**description["shape"]),
            ropes=LayerRopes(**ropes),
            mean=arrays["mean"],
            blocks=tuple(
                Block(
                    start,
                    stop,
                    matrix(f"{i}.encoder", first, stop - start),
                    matrix(f"{i}.decoder", second, stop - start),
                )
                for i, (start, stop, first, second) in enumerate(description["blocks"])
            ),
            order=arrays.get("order"),
            below=description["below"],
            predictor=None if description["predictor"] is None else matrix("predictor", *description["predictor"]),
            deviations=arrays["deviations"],
        )
