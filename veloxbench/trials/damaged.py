"""Damage to the reference implementation's caches, made at run time: what a quality gate is tried on.

Registers no method. A damage is a change of a layer's storage specification: another quantizer, a window or a sink
fewer. The product knows nothing of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from veloxbench.measure.exact import Case
from veloxbench.measure.exact_cases import whole_life
from veloxbench.methods.veloxquant import implementation
from veloxbench.records.arm import Arm
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, LayerSpec, PackedKVCache
from veloxquant_mlx.quantizers.base import Arrays, Codes
from veloxquant_mlx.quantizers.lloyd_max import Codebook
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import inverse_rotation_matrix, matmul_rows, rotation_matrix

CODE_BITS: Final = 4
CENTROID: Final = 10
"""The damaged centroid of the 16: the third above zero, a code in ten."""
FIRST, MIDDLE = 0, 15
"""Layers of smollm2-135m's thirty that the damages of one layer strike."""

STRUCK: Final = (FIRST, MIDDLE)
CACHE_CLASS: Final = PackedKVCache
Change = Callable[[LayerSpec], LayerSpec]


@dataclass(frozen=True)
class ShiftedCentroid(TurboQuantMSE):
    """TurboQuant MSE, one centroid off by ``share`` of itself; the boundaries stay."""

    share: float = field(default=0.0, compare=False)  # no part of what a saved cache names

    def codebook(self, head_dim: int) -> Codebook:
        """The codebook with its wrong entry."""
        return _shifted(super().codebook(head_dim), self.share)


@functools.cache
def _shifted(codebook: Codebook, share: float) -> Codebook:
    centroids = codebook.centroids.copy()
    centroids[CENTROID] *= 1 + share
    return Codebook(centroids, codebook.boundaries, codebook.distortion)


@dataclass(frozen=True)
class Unrotated(TurboQuantMSE):
    """TurboQuant MSE of the vectors as they are: the rotation is undone before it is done."""

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        return super()._encode(matmul_rows(x, inverse_rotation_matrix(x.shape[-1], self.seed)), static)

    def _decode(self, codes: Codes) -> mx.array:
        return matmul_rows(super()._decode(codes), rotation_matrix(codes.head_dim, self.seed))


@dataclass(frozen=True)
class ScaledHead(TurboQuantMSE):
    """TurboQuant MSE whose first KV head decodes too long by ``share``."""

    share: float = field(default=0.0, compare=False)  # no part of what a saved cache names

    def _decode(self, codes: Codes) -> mx.array:
        decoded = super()._decode(codes)
        scale = np.ones((1, decoded.shape[1], 1, 1), np.float32)
        scale[0, 0] += self.share
        return decoded * mx.array(scale)


@dataclass(frozen=True)
class LateTokens(TurboQuantMSE):
    """TurboQuant MSE that decodes every token one place late, the last one in the first place."""

    def _decode(self, codes: Codes) -> mx.array:
        decoded = super()._decode(codes)
        return mx.concatenate([decoded[:, :, -1:], decoded[:, :, :-1]], axis=2)


@dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        name: short and unique.
        summary: for the table.
        base: the undamaged configuration, a key of :data:`BASES`.
        change: what it does to each layer's specification.
        harmful: False for a control: codes that are no worse by design.
    """

    name: str
    summary: str
    base: str
    change: Change
    harmful: bool = True


BASES: Final = {
    "plain": KVCacheConfig(method="turboquant_mse", code_bits=CODE_BITS),
    "sinks and window": KVCacheConfig(method="turboquant_mse", code_bits=CODE_BITS, sinks=4, window=32),
}


def undamaged(spec: LayerSpec) -> LayerSpec:
    """The specification as it is: the change of a base or a control."""
    return spec


def _everywhere(make: Callable[[], TurboQuantMSE]) -> Change:
    return lambda spec: dataclasses.replace(spec, keys=make(), values=make())


def _in_layer(layer: int, make: Callable[[], TurboQuantMSE]) -> Change:
    change = _everywhere(make)
    return lambda spec: change(spec) if spec.layer == layer else spec


def _in_layers(n_layers: int, make: Callable[[], TurboQuantMSE]) -> Change:
    change = _everywhere(make)
    return lambda spec: change(spec) if spec.layer < n_layers else spec


def _centroid(share: float) -> Damage:
    make = functools.partial(ShiftedCentroid, CODE_BITS, share=share)
    return Damage(f"centroid {share:.0%}", f"one of 16 centroids {share:.0%} too large", "plain", _everywhere(make))


def _head(layer: int, share: float) -> Damage:
    make = functools.partial(ScaledHead, CODE_BITS, share=share)
    return Damage(
        f"head scale {share:.0%}, layer {layer}",
        f"layer {layer}: the first KV head's keys and values {share:.0%} too long",
        "plain",
        _in_layer(layer, make),
    )


def _narrower(layer: int) -> Damage:
    make = functools.partial(TurboQuantMSE, CODE_BITS - 1)
    return Damage(f"3 bits, layer {layer}", f"layer {layer} at one bit less", "plain", _in_layer(layer, make))


def _other_rotation(seed: int) -> Damage:
    make = functools.partial(TurboQuantMSE, CODE_BITS, seed)
    summary = f"control: rotation of seed {seed}, no worse by design than that of seed 0"
    return Damage(f"seed {seed}", summary, "plain", _everywhere(make), harmful=False)


def _windowed(name: str, summary: str, **fields: int) -> Damage:
    return Damage(name, summary, "sinks and window", lambda spec: dataclasses.replace(spec, **fields))  # type: ignore[arg-type]


DAMAGES: Final = (
    _centroid(0.01),
    _centroid(0.02),
    _centroid(0.05),
    _centroid(0.20),
    _narrower(FIRST),
    _narrower(MIDDLE),
    Damage(
        "3 bits, 10 layers",
        "layers 0 to 9 at one bit less",
        "plain",
        _in_layers(10, functools.partial(TurboQuantMSE, CODE_BITS - 1)),
    ),
    Damage("no rotation", "rotation left out", "plain", _everywhere(functools.partial(Unrotated, CODE_BITS))),
    Damage(
        "no rotation, layer 15",
        "layer 15: rotation left out",
        "plain",
        _in_layer(MIDDLE, functools.partial(Unrotated, CODE_BITS)),
    ),
    _head(FIRST, 0.01),
    _head(FIRST, 0.05),
    _head(FIRST, 0.20),
    _head(MIDDLE, 0.20),
    Damage(
        "head scale 20%",
        "every layer: the first KV head's keys and values 20% too long",
        "plain",
        _everywhere(functools.partial(ScaledHead, CODE_BITS, share=0.20)),
    ),
    Damage(
        "tokens late",
        "layer 15: tokens decode one place late",
        "plain",
        _in_layer(MIDDLE, lambda: LateTokens(CODE_BITS)),
    ),
    _windowed("window 31", "window of 31 tokens, not 32", window=31),
    _windowed("3 sinks", "3 sinks, not 4", sinks=3),
    _windowed("no sinks", "no sinks, not 4", sinks=0),
    _other_rotation(1),
    _other_rotation(2),
    Damage("again", "control: nothing, measured again", "plain", undamaged, harmful=False),
)


def strikes(damage: Damage, layer: int) -> bool:
    """Whether a damage changes a layer at all."""
    spec = BASES[damage.base].layer_spec(layer, None, None, None)
    return damage.change(spec) != spec


def damaged_caches(model: Module, base: str, change: Change) -> list[Any]:
    """The caches of a base configuration, each layer's specification changed."""
    return [PackedKVCache(change(cache.spec)) for cache in KVCacheBuilder.build(model, BASES[base])]


def exact_case(base: str, layer: int, change: Change) -> Case:
    """The exact suite's life of a cache, for one layer of a base configuration, changed."""
    spec = change(BASES[base].layer_spec(layer, None, None, None))
    return Case(
        Arm(name=base, target=float(CODE_BITS)),
        target_means="code_bits",
        produce=lambda: whole_life(lambda: PackedKVCache(spec)),
        implementation=implementation,
    )
