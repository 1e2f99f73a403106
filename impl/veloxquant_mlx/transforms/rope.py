"""A layer's rotary position embedding as a map that can be undone and redone, read by probing the model.

Keys enter a cache rotated by their position, which spreads a fixed direction of key space over all of them. A
transform that is to find directions works on keys before the rotation ("pre-RoPE"; KVQuant, arXiv 2401.18079). What a
model rotates with is not derived from its configuration: the model's own rope modules are called on basis vectors
(:func:`probe_rope`), and each layer's cached keys at several offsets say which of them the layer uses
(:func:`probe_ropes`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxquant_mlx.probes import ProbeCache, probe_layers, probed_caches

RotateFunction = Callable[[mx.array, Any], mx.array]
"""``(x [B, H, T, D], offset) -> x`` rotated: what a model's rope module is."""

PROBED_BITS: Final = 15
"""Modules are probed at positions ``2**k`` up to this k, and their length-dependence at ``2**15`` tokens."""

_UNIT: Final = 2.0**-24  # fp32 rounds to half of 2**-23
_ANGLE_ULPS: Final = 4  # an angle in fp32 is a product of two rounded factors, of position and frequency, on each side
_VECTOR_TOLERANCE: Final = 1e-5  # an entry of a rotated fp32 vector: two products and a sum, and a cosine in fp32
_SAME_KEYS: Final = 1e-4  # relative: a token's keys at two offsets, computed alike but for the rotation
_EXPLAINED: Final = 0.5  # a rotation must leave at most half of what the position changes


@dataclass(frozen=True)
class Rope:
    """Scaled rotation of coordinate pairs by an angle proportional to the position; the rest passes unchanged.

    Within the coordinates ``[start, start + dims)`` pair ``i`` is ``(i, i + dims/2)``, or ``(2i, 2i + 1)`` where
    ``traditional``. At position p it turns by ``p * frequencies[i]`` and is multiplied by ``scale``.

    :meth:`rotate` and :meth:`unrotate` take angles from the same frequencies, so that they invert each other to fp32
    rounding at every position, however exact the frequencies are.

    Attributes:
        dim: width of the vectors.
        start: first rotated coordinate.
        dims: rotated coordinates; 0 for a layer without rope.
        traditional: whether neighbours are paired.
        frequencies: ``dims/2`` angles a token, in radians; 0 for a pair that stays.
        scale: factor on the rotated coordinates (YaRN's and LongRoPE's mscale).
    """

    dim: int
    start: int = 0
    dims: int = 0
    traditional: bool = False
    frequencies: tuple[float, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 1 or self.start < 0 or self.dims < 0 or self.dims % 2 or self.start + self.dims > self.dim:
            raise ValueError(
                f"start={self.start} and dims={self.dims} (even) must lie within vectors of dim={self.dim} coordinates"
            )
        if len(self.frequencies) != self.dims // 2:
            raise ValueError(f"frequencies must be {self.dims // 2}, a pair each, got {len(self.frequencies)}")
        if not all(map(math.isfinite, (*self.frequencies, self.scale))) or self.scale == 0:
            raise ValueError("frequencies and scale must be finite, and scale not 0")

    def rotate(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate ``[B, H, T, dim]``, whose first token is at position ``offset`` (an int, or one a row: ``[B]``)."""
        return self._turn(x, offset, 1, self.scale)

    def unrotate(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """The inverse of :meth:`rotate`."""
        return self._turn(x, offset, -1, 1 / self.scale)

    def _turn(self, x: mx.array, offset: int | mx.array, sign: int, scale: float) -> mx.array:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be of {self.dim} coordinates, got {x.shape[-1]}")
        if not self.dims or not x.size:
            return x
        end = self.start + self.dims
        part = x if self.start == 0 else x[..., self.start : end]
        turned: mx.array = mx.fast.rope(
            part,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=_wavelengths(self.frequencies, sign),
        )
        if scale != 1:
            turned = mx.concatenate([turned[..., : self.dims] * scale, turned[..., self.dims :]], axis=-1)
        return turned if self.start == 0 else mx.concatenate([x[..., : self.start], turned, x[..., end:]], axis=-1)


@dataclass(frozen=True)
class LayerRopes:
    """What rotates the two arrays that a layer caches; the values' is the identity but where latents are cached.

    A layer with latent attention (DeepSeek's MLA) caches the compressed latent as keys, unrotated, and its keys'
    rotated part as values.
    """

    keys: Rope
    values: Rope


@functools.lru_cache(maxsize=64)
def _wavelengths(frequencies: tuple[float, ...], sign: int) -> mx.array:
    """``mx.fast.rope`` takes reciprocals of frequencies; infinity for a pair that stays."""
    return mx.array([sign / f if f else math.inf for f in frequencies], dtype=mx.float32)


def _images(module: RotateFunction, dim: int, position: int) -> NDArray[np.float64]:
    """``[dim, dim]``: row i is what the module makes of basis vector i at a position."""
    basis = mx.eye(dim, dtype=mx.float32).reshape(dim, 1, 1, dim)
    return np.array(module(basis, position), dtype=np.float64).reshape(dim, dim)


def angle_tolerance(position: int, frequencies: tuple[float, ...]) -> float:
    """Largest difference of a rotated unit vector's entries between two fp32 computations at a position.

    An fp32 angle of ``position * frequency`` radians is known to ``2**-24`` of itself for each rounding: at position
    30,000 and frequency 1 that is .007 for the four roundings of two computations. It does not touch
    :meth:`Rope.unrotate`, which uses the angles of :meth:`Rope.rotate`.
    """
    return _VECTOR_TOLERANCE + _ANGLE_ULPS * _UNIT * position * max(map(abs, frequencies), default=0.0)


def probe_rope(module: RotateFunction, dim: int) -> Rope:
    """Read a rope module by what it does to basis vectors.

    Args:
        module: called as ``module(x, offset)`` with fp32 ``[B, H, T, dim]``.
        dim: width of the vectors; the module may rotate fewer coordinates.

    Returns:
        The same map, verified at positions ``2**k`` and between, up to 32,767, to :func:`angle_tolerance`.

    Raises:
        ValueError: the module is no scaled rotation of pairs by an angle proportional to the position (or one that
            depends on the length of the sequence), saying which.
    """
    _check_length_independence(module, dim)
    still = _images(module, dim, 0)
    diagonal = np.diag(still)
    if not np.isfinite(still).all() or np.abs(still - np.diag(diagonal)).max() > _VECTOR_TOLERANCE:
        raise ValueError("the module does not map position 0 to itself, up to a scale")
    early, late = _images(module, dim, 1), _images(module, dim, 2**PROBED_BITS)
    off = np.maximum(np.abs(early), np.abs(late)) * (1 - np.eye(dim))
    partners = {i: np.flatnonzero(off[i]) for i in range(dim) if off[i].any()}
    if any(len(js) != 1 or list(partners.get(int(js[0]), ())) != [i] for i, js in partners.items()):
        raise ValueError("the module mixes more than pairs of coordinates")
    pairs = sorted({(min(i, int(js[0])), max(i, int(js[0]))) for i, js in partners.items()})
    scaled = np.flatnonzero(np.abs(diagonal - 1) > _UNIT)
    scale = float(np.float32(diagonal[scaled[0]])) if scaled.size else 1.0
    if not pairs:
        if scaled.size:
            raise ValueError("the module scales its input and does not rotate it")
        return Rope(dim)
    distances = {j - i for i, j in pairs}
    if len(distances) != 1:
        raise ValueError("the module pairs coordinates at more than one distance")
    start, distance = pairs[0][0], distances.pop()
    traditional = distance == 1 and len(pairs) > 1
    dims = pairs[-1][1] + 1 - start if traditional else 2 * distance
    firsts = range(start, start + dims, 2) if traditional else range(start, start + distance)
    frequencies = _frequencies(module, dim, [(i, i + distance) for i in firsts], scale)
    rope = Rope(dim, start, dims, traditional, frequencies, scale)
    _verify(rope, module)
    return rope


def _frequencies(module: RotateFunction, dim: int, pairs: list[tuple[int, int]], scale: float) -> tuple[float, ...]:
    """Angles a token, each doubling of the position halving what is unknown of them."""
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    frequencies = np.zeros(len(pairs))
    for k in range(PROBED_BITS + 1):
        images = _images(module, dim, 2**k)
        angles = np.arctan2(images[first, second], images[first, first])
        expected = frequencies * 2**k
        frequencies = (expected + (angles - expected + np.pi) % (2 * np.pi) - np.pi) / 2**k
    exact = frequencies.astype(np.float32)  # what the module holds, where it holds fp32
    exact[np.abs(exact) < 1e-12] = 0  # an angle of 0, unwrapped
    return tuple(map(float, exact))


def _verify(rope: Rope, module: RotateFunction) -> None:
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((2, 2, 5, rope.dim)).astype(np.float32))
    for position in (0, 1, 2, 7, 100, 1023, 4095, 10_007, 2**PROBED_BITS - 5):
        got, wanted = (np.array(f(x, position)) for f in (rope.rotate, module))
        error, allowed = np.abs(got - wanted).max(), 8 * abs(rope.scale) * angle_tolerance(position, rope.frequencies)
        if not error <= allowed:
            raise ValueError(
                f"the module is no scaled rotation by angles proportional to the position: at position {position} it "
                f"differs from one by {error:.1e}"
            )


def _check_length_independence(module: RotateFunction, dim: int) -> None:
    x = mx.array(np.random.default_rng(1).standard_normal((1, 1, 1, dim)).astype(np.float32))
    at = (7, 2**PROBED_BITS - 1)
    whole = np.array(module(mx.broadcast_to(x, (1, 1, 2**PROBED_BITS, dim)), 0)[:, :, mx.array(at)])
    alone = np.concatenate([np.array(module(x, position)) for position in at], axis=2)
    allowed = 8 * max(1.0, float(np.abs(alone).max())) * angle_tolerance(at[1], (1.0,))
    if not np.abs(whole - alone).max() <= allowed:
        raise ValueError("the module's rotation depends on the length of the sequence")


def rope_modules(model: Module) -> Iterator[tuple[str, RotateFunction]]:
    """What in a model may rotate, by name: modules and methods called rope or rotary, and tables of frequencies."""
    for path, module in model.named_modules():  # type: ignore[no-untyped-call]
        name = path.rsplit(".", 1)[-1]
        if any(word in text.lower() for text in (name, type(module).__name__) for word in ("rope", "rotary")):
            if callable(module):
                yield path, module
            continue
        for attribute in ("rope", "_rope", "rotary_emb"):
            method = getattr(type(module), attribute, None)
            if callable(method):
                yield f"{path}.{attribute}", getattr(module, attribute)
        table = getattr(module, "_rope_freqs", None)
        if isinstance(table, mx.array):
            for traditional in (False, True):
                yield f"{path}._rope_freqs", _fast_rope(table, traditional)


def _fast_rope(table: mx.array, traditional: bool) -> RotateFunction:
    return lambda x, offset: mx.fast.rope(
        x, 2 * table.size, traditional=traditional, base=None, scale=1.0, offset=offset, freqs=table
    )


class _AtOffset(ProbeCache):
    """A probe whose one token stands at a position; attention sees it alone, so its output is its value."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The token's own keys and values, also as attributes: DeepSeek-V3.2 reads and assigns them."""
        self.keys, self.values = super().update_and_fetch(keys, values)
        return self.keys, self.values


def _cached(model: Module, layers: tuple[int, ...], tokens: mx.array, offset: int) -> list[tuple[mx.array, mx.array]]:
    probes = {layer: _AtOffset(offset) for layer in layers}
    mx.eval(model(tokens, cache=probed_caches(model, probes)))
    missing = [layer for layer, probe in probes.items() if probe.seen is None]
    if missing:
        raise ValueError(f"layer {missing[0]} of the model never called update_and_fetch")
    return [probe.seen for probe in probes.values() if probe.seen is not None]


def _norm(x: mx.array) -> float:
    return float(np.linalg.norm(np.array(x)))


@dataclass(frozen=True)
class _Candidates:
    """Probed ropes of a model for vectors of a width, each at both ends of the vector where it rotates a part."""

    ropes: tuple[Rope, ...]
    refusals: tuple[str, ...]


def _candidates(model: Module, dim: int) -> _Candidates:
    ropes: dict[Rope, None] = {}
    refusals: dict[str, None] = {}
    seen: set[Any] = set()
    for path, module in rope_modules(model):
        # Layers repeat their module: equal settings and tables rotate alike.
        key = _settings(module)
        if key is not None and key in seen:
            continue
        seen.add(key)
        for width in (dim, *sorted(_own_widths(module))):
            if width > dim:
                continue
            try:
                rope = probe_rope(module, width)
            except Exception as error:  # a stranger's module may raise anything on vectors that it is not for
                refusals[f"{path}: {error}"] = None
                continue
            if rope.dims:
                for start in (0, dim - rope.dims):
                    ropes[replace(rope, dim=dim, start=start)] = None
                break
    return _Candidates(tuple(ropes), tuple(refusals))


def _own_widths(module: Any) -> set[int]:
    """Widths of vectors that a module may insist on, by its attributes."""
    fields = {**vars(module), **dict(module)} if isinstance(module, Module) else {}
    named = {fields[name] for name in ("dims", "dim") if isinstance(fields.get(name), int)}
    return named | {2 * x.size for x in fields.values() if isinstance(x, mx.array) and x.ndim == 1}


def _settings(module: Any) -> Any:
    if not isinstance(module, Module):
        return None
    fields = {**vars(module), **dict(module)}
    parts = {
        name: (value.shape, tuple(np.array(value.astype(mx.float32)).ravel().tolist()))
        if isinstance(value, mx.array)
        else value
        for name, value in fields.items()
    }
    try:
        key = type(module), tuple(sorted((name, repr(value)) for name, value in parts.items()))
        hash(key)
    except TypeError:
        return None
    return key


def probe_ropes(model: Module) -> dict[int, LayerRopes]:
    """Which rotation the keys and the values of every layer with a KV cache have passed when they are cached.

    One token alone in a layer's cache leaves the layer unchanged by its position but for the rotation, so what is
    cached at two offsets differs by it: each layer is given the rope of the model that explains the difference, the
    identity where there is none (NoPE layers, latents, values), whatever class the model is.

    Args:
        model: an mlx-lm model.

    Returns:
        By index of the model's caches.

    Raises:
        ValueError: a layer rotates what it caches and none of the model's rope modules is that rotation, naming the
            layer and why modules were refused; a model without KV caches.
    """
    layers = probe_layers(model)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no layer with a KV cache")
    tokens = mx.arange(1, 9).reshape(8, 1)
    offsets = (1, 2, 5, 23, 59)
    still = _cached(model, layers, tokens, 0)
    moved = [_cached(model, layers, tokens, offset) for offset in offsets]
    known: dict[int, _Candidates] = {}

    def rope_of(layer: int, index: int, role: int) -> Rope:
        first = still[index][role].astype(mx.float32)
        later = [run[index][role].astype(mx.float32) for run in moved]
        dim = first.shape[-1]

        def residual(rope: Rope) -> float:
            pre = rope.unrotate(first, 0)
            gaps = [_norm(rope.rotate(pre, o) - x) for o, x in zip(offsets, later, strict=True)]
            return max(gaps) / max(_norm(first), 1e-30)

        change = residual(Rope(dim))
        if not math.isfinite(change):
            raise ValueError(f"layer {layer} caches {('keys', 'values')[role]} that are not finite")
        if change < _SAME_KEYS:
            return Rope(dim)
        if dim not in known:
            known[dim] = _candidates(model, dim)
        ropes = known[dim].ropes
        best = min(ropes, key=residual, default=None)
        if best is not None and residual(best) <= _EXPLAINED * change:
            return best
        norms = [mx.linalg.norm(x, axis=-1) for x in (first, *later)]
        kept = all(mx.allclose(norms[0], n, rtol=1e-2).item() for n in norms[1:])
        if not kept:  # positions that are added before the projection (GPT-2) leave nothing to undo
            return Rope(dim)
        refused = "".join(f"; {text}" for text in known[dim].refusals[:2])
        raise ValueError(
            f"layer {layer} rotates its {('keys', 'values')[role]} with the position, and none of the "
            f"{len(ropes)} rotations of {type(model).__name__} is the one{refused}"
        )

    return {layer: LayerRopes(rope_of(layer, index, 0), rope_of(layer, index, 1)) for index, layer in enumerate(layers)}
