"""The whole calibration of ``fisher_klt``: transforms, steps for each age, entropy tables, and the caches they make.

What takes minutes, gradients and vectors of a text, is measured once (:func:`measure_model`) and serves every scope and
target. Fitting a target (:func:`fit_code`) sends the calibration vectors through the layers as the cache does, young
first and coded anew as they age, fits tables to the integers that come out, and moves the step until the coded length
of held-out vectors, at the context that is asked for and with everything counted, meets the target from below.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from numpy.typing import NDArray

from veloxquant_mlx.allocators.sensitivity import calibration_sequences, model_sha256
from veloxquant_mlx.cache.coded import CodedSpec, CodedStore, Handoff, cut_into_blocks
from veloxquant_mlx.cache.packed import PackedKVCache
from veloxquant_mlx.calibration.fit import FP16_TABLES, TableBits, fit_layer
from veloxquant_mlx.calibration.gradients import DEFAULT_SPLIT, SINKS, Split, fisher_matrices, window_sizes
from veloxquant_mlx.calibration.klt import (
    KLTCalibration,
    KLTProvenance,
    arrays_sha256,
    source_below,
    text_line_hashes,
)
from veloxquant_mlx.calibration.vectors import captured_vectors
from veloxquant_mlx.codes.deadzone import DeadZone
from veloxquant_mlx.codes.entropy import coded_nbytes
from veloxquant_mlx.codes.fit import fit_tables
from veloxquant_mlx.codes.layer import LayerCode, SharedTables, TierCode
from veloxquant_mlx.transforms.klt import SCOPES, CachedShape, LayerKLT, Scope
from veloxquant_mlx.transforms.rope import LayerRopes, probe_ropes

FORMAT: Final = "veloxquant-fisher-klt-1"
"""Of the calibration's file."""

AGES: Final = ((64, 3), (16, 9))
"""Tokens younger than 64 at a third of the step, younger than 16 at a ninth: the steps nest."""

HELD_OUT: Final = 2
"""Sequences of vectors that rates are measured on and nothing is fitted to."""

TABLE_TOKENS: Final = 4096
"""Tokens that the old tokens' tables are fitted to, spread over the rest; those of young ones to half as many."""

FIRST_STEP: Final = 0.0075
"""Where the search for a step begins: about 1.5 bits on smollm2-135m."""

CLOSE: Final = 0.015
"""A target is met by a code that is below it by at most this part of it."""

MAX_FITS: Final = 5
"""Fits before the search gives up."""

Singles = NDArray[np.float32]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Measurements:
    """What a text says of a model: all that fitting needs.

    Attributes:
        fishers: by layer ``[N, N]``.
        vectors: by layer ``[sequences, tokens, N]``, sinks left out.
        shapes: what layers cache.
        ropes: what rotates it.
        windows: sliding windows, None for full attention.
        provenance: model and text.
        line_hashes: of the text's lines.
    """

    fishers: Mapping[int, NDArray[np.floating]]
    vectors: Mapping[int, NDArray[np.floating]]
    shapes: Mapping[int, CachedShape]
    ropes: Mapping[int, LayerRopes]
    windows: Mapping[int, int | None]
    provenance: KLTProvenance
    line_hashes: NDArray[np.uint64]

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file, to :meth:`load`; ropes and windows are the model's to say again."""
        arrays = {f"fisher.{i}": x.astype(np.float32) for i, x in self.fishers.items()}
        arrays |= {f"vectors.{i}": x.astype(np.float16) for i, x in self.vectors.items()}
        text = json.dumps(asdict(self.provenance))
        with Path(path).open("wb") as file:
            np.savez(file, line_hashes=self.line_hashes, provenance=np.array(text), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path, model: Module) -> Self:
        """Read what :meth:`save` wrote of this model.

        Raises:
            ValueError: not such a file.
        """
        ropes = probe_ropes(model)
        try:
            with np.load(path) as held:
                fishers = {i: held[f"fisher.{i}"] for i in ropes}
                vectors = {i: held[f"vectors.{i}"] for i in ropes}
                provenance = KLTProvenance(**json.loads(str(held["provenance"])))
                line_hashes = held["line_hashes"]
        except (KeyError, ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} holds no measurements of this model: {error}") from error
        return cls(
            fishers, vectors, _shapes(model, ropes), ropes, window_sizes(model, list(ropes)), provenance, line_hashes
        )


def _shapes(model: Module, layers: Mapping[int, Any]) -> dict[int, CachedShape]:
    caches = make_prompt_cache(model)
    model(mx.array([[0]]), cache=caches)
    return {i: CachedShape.of(caches[i].keys, caches[i].values) for i in layers}


def measure_model(
    model: Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    gradient_sequences: int = 18,
    vector_sequences: int = 24,
    split: Split = DEFAULT_SPLIT,
    say: Say = lambda line: None,
    weights_sha256: str | None = None,
) -> Measurements:
    """Gradients and vectors of texts; minutes for a model of 135M parameters.

    Args:
        model: an mlx-lm model.
        tokenizer: its tokenizer.
        texts: long ones, none that is evaluated.
        gradient_sequences: of ``split.tokens`` tokens.
        vector_sequences: of as many; the last :data:`HELD_OUT` are for rates alone.
        split: how gradients cut a sequence.
        say: takes a line of progress.
        weights_sha256: :func:`model_sha256` of the model, where the caller has it.

    Raises:
        ValueError: texts too short, a rope that cannot be probed, numbers that are not finite.
    """
    if vector_sequences <= HELD_OUT:
        raise ValueError(f"vector_sequences must be above {HELD_OUT}, which are held out, got {vector_sequences}")
    ropes = probe_ropes(model)
    layers = list(ropes)
    count = gradient_sequences + vector_sequences
    sequences = calibration_sequences(tokenizer, list(texts), num_samples=count, seq_len=split.tokens)
    chosen = np.zeros(count, dtype=bool)
    chosen[np.linspace(0, count, gradient_sequences, endpoint=False).astype(int)] = True
    done = [0]

    def tick() -> None:
        done[0] += 1
        say(f"calibration: {done[0]} of {count} sequences")

    fishers = fisher_matrices(model, sequences[chosen], layers, ropes, split=split, on_sequence=tick)
    captured = captured_vectors(model, sequences[~chosen], layers, ropes, on_sequence=tick)
    provenance = KLTProvenance(
        model_sha256=model_sha256(model) if weights_sha256 is None else weights_sha256,
        model_type=str(getattr(model, "model_type", "unknown")),
        tokens_sha256=hashlib.sha256(sequences.astype("<i4").tobytes()).hexdigest(),
        gradient_tokens=int(sequences[chosen].size),
        vector_tokens=int(sequences[~chosen].size),
        seconds=0.0,
    )
    vectors = {i: x.reshape(vector_sequences, -1, x.shape[1]) for i, (_, x) in captured.items()}
    shapes = {i: shape for i, (shape, _) in captured.items()}
    hashes = text_line_hashes(texts)
    return Measurements(fishers, vectors, shapes, ropes, window_sizes(model, layers), provenance, hashes)


@dataclass(frozen=True, eq=False)
class FisherCode:
    """A calibration: makes the caches of a model.

    Attributes:
        klt: the transforms.
        layers: by layer its code.
        sinks: first tokens kept in fp16.
        ages: as in :data:`AGES`; empty: all tokens at one step.
        target: bits_per_value that were asked for, None where a step was.
        bits_per_value: realised on held-out calibration vectors at ``at_tokens`` tokens, everything counted.
        at_tokens: context of that figure.
        path: where it lies; None before it is saved.
        handoff: where its caches' layers meet.
    """

    klt: KLTCalibration
    layers: Mapping[int, LayerCode]
    sinks: int
    ages: tuple[tuple[int, int], ...]
    target: float | None
    bits_per_value: float
    at_tokens: int
    path: str | None = None
    sha256: str = ""
    handoff: Handoff = field(default_factory=Handoff)

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", arrays_sha256(self._arrays()))
        _KNOWN[self.sha256] = self

    @property
    def step(self) -> float:
        """Of the oldest tokens, in √nats."""
        return self.klt.step

    def spec(self, layer: int, max_size: int | None) -> CodedSpec:
        """How to store one layer, ``max_size`` its sliding window."""
        return CodedSpec(
            calibration_sha256=self.sha256,
            path=self.path,
            layer=layer,
            sinks=0 if max_size is not None else self.sinks,
            ages=tuple(age for age, _ in self.ages),
            max_size=max_size,
            code=self.layers[layer],
            handoff=self.handoff,
        )

    def caches(self, model: Module, *, weights_sha256: str | None = None) -> list[Any]:
        """One cache per layer of the model, for ``prompt_cache=`` of mlx-lm.

        Args:
            model: the one that was calibrated.
            weights_sha256: its :func:`model_sha256`, or whatever it was calibrated under, where the caller has it.

        Raises:
            ValueError: another model.
        """
        self.klt.check_model(model, sha256=weights_sha256)
        own = make_prompt_cache(model)
        attention = {i for i, cache in enumerate(own) if isinstance(cache, (KVCache, RotatingKVCache))}
        if attention != set(self.layers):
            raise ValueError(
                f"the calibration has {len(self.layers)} layers and the model {len(attention)} that it could code: "
                "it is another model's"
            )
        return [
            PackedKVCache(self.spec(i, getattr(cache, "max_size", None))) if i in self.layers else cache
            for i, cache in enumerate(own)
        ]

    def _arrays(self) -> dict[str, mx.array]:
        arrays, _ = self.klt.parts()
        for i, code in self.layers.items():
            for t, tier in enumerate(code.tiers):
                arrays |= {f"code.{i}.{t}.{name}": array for name, array in tier.arrays().items()}
        shared = next(iter(self.layers.values())).tiers[0].shared
        return arrays | {f"shared.{name}": array for name, array in shared.arrays.items()}

    def save(self, path: str | Path) -> FisherCode:
        """Write one ``.safetensors`` file, to :meth:`load`; returns the calibration that knows where it lies."""
        _, metadata = self.klt.parts()
        steps = {str(i): [tier.zone.step for tier in code.tiers] for i, code in self.layers.items()}
        names = ("sinks", "ages", "target", "bits_per_value", "at_tokens")
        metadata |= {
            "format": FORMAT,
            "klt_format": metadata["format"],
            "klt_sha256": metadata["arrays_sha256"],
            "arrays_sha256": self.sha256,
            "code": json.dumps({name: getattr(self, name) for name in names} | {"steps": steps}),
        }
        mx.save_safetensors(str(path), self._arrays(), metadata)
        return replace(self, path=str(path))

    @classmethod
    def load(cls, path: str | Path, *, scope: Scope | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            scope: refuse a calibration of another scope.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not such a file, damaged, or of another scope, in one sentence.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no calibration at {path}")
        try:
            loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
            arrays, metadata = loaded
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no fisher_klt calibration of this version ({FORMAT})")
            if metadata["arrays_sha256"] != arrays_sha256(arrays):
                raise ValueError(f"{path} is damaged: its tables do not have the hash it states; calibrate again")
            own = {name: a for name, a in arrays.items() if not name.startswith(("code.", "shared."))}
            klt = KLTCalibration.from_parts(own, metadata)
            told = json.loads(metadata["code"])
            shared = SharedTables({n.removeprefix("shared."): a for n, a in arrays.items() if n.startswith("shared.")})
            tiers = {
                layer.layer: tuple(
                    TierCode(
                        DeadZone(step, arrays[f"code.{layer.layer}.{t}.magnitudes"]),
                        arrays[f"code.{layer.layer}.{t}.classes"],
                        arrays[f"code.{layer.layer}.{t}.shifts"],
                        shared,
                    )
                    for t, step in enumerate(told["steps"][str(layer.layer)])
                )
                for layer in klt.layers
            }
            ages = tuple((age, divisor) for age, divisor in told["ages"])
            made = cls(
                klt,
                layer_codes(klt.layers, tiers),
                told["sinks"],
                ages,
                told["target"],
                told["bits_per_value"],
                told["at_tokens"],
                str(path),
                metadata["arrays_sha256"],
            )
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or no calibration: {error}") from error
        if scope is not None and made.klt.scope != scope:
            raise ValueError(f"{path} is a calibration of scope {made.klt.scope!r}, not {scope!r}")
        return made


_KNOWN: Final[weakref.WeakValueDictionary[str, FisherCode]] = weakref.WeakValueDictionary()


def find_calibration(sha256: str, path: str | None) -> FisherCode:
    """The calibration of a saved cache: one in memory, or its file.

    Raises:
        ValueError: it cannot be had, or another one lies there.
    """
    known = _KNOWN.get(sha256)
    if known is not None:
        return known
    if path is None:
        raise ValueError(f"the cache was coded with calibration {sha256[:12]}, which was never saved: load it first")
    try:
        found = FisherCode.load(path)
    except FileNotFoundError as error:
        raise ValueError(f"the cache was coded with calibration {sha256[:12]}, and {error}: load it first") from error
    if found.sha256 != sha256:
        raise ValueError(
            f"the cache was coded with calibration {sha256[:12]}, and {path} holds {found.sha256[:12]}: load the right "
            "one first"
        )
    return found


def layer_codes(layers: Sequence[LayerKLT], tiers: Mapping[int, tuple[TierCode, ...]]) -> dict[int, LayerCode]:
    """Codes of layers, each with the layers that are predicted from it."""
    readers = {layer.layer: tuple(other.layer for other in layers if other.below == layer.layer) for layer in layers}
    return {layer.layer: LayerCode(layer, tiers[layer.layer], readers[layer.layer]) for layer in layers}


def decoded_caches(caches: Sequence[Any]) -> list[tuple[mx.array, mx.array]]:
    """Keys and values of all layers, outside of a step: predicted layers after those that they are predicted from.

    Args:
        caches: a model's, single, as :meth:`FisherCode.caches` makes them.
    """
    decoded: dict[int, tuple[int, mx.array]] = {}
    pairs = []
    for cache in caches:
        store = cache.storage
        assert isinstance(store, CodedStore)
        transform = store.spec.code.transform
        below = None
        if transform.below is not None:
            start, whole = decoded[transform.below]
            below = whole[:, store.start - start : store.stop - start]
        own = store.decode(below)
        decoded[store.spec.layer] = store.with_sinks(own)
        pairs.append(cache.keys_and_values())
    return pairs


# ---- fitting --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Fitted:
    """Transforms and codes at one step, and the integers of the held-out vectors by layer and tier."""

    transforms: list[LayerKLT]
    tiers: dict[int, tuple[TierCode, ...]]
    coefficients: dict[int, list[Singles]]
    """By layer, for each tier what the held-out vectors were quantized from."""


def _rows(sequences: int, tokens: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, sequences * tokens - 1, min(count, sequences * tokens)).astype(np.int64))


def _fit_at(
    m: Measurements, scope: Scope, step: float, ages: Sequence[tuple[int, int]], epsilon: float, bits: TableBits
) -> _Fitted:
    """Fit everything at one step of the oldest tokens."""
    steps = [step, *(step / divisor for _, divisor in ages)]
    some = next(iter(m.vectors.values()))
    n_fit, tokens = some.shape[0] - HELD_OUT, some.shape[1]
    chosen = _rows(n_fit, tokens, TABLE_TOKENS)
    decoded_fit: dict[int, Singles] = {}
    decoded: dict[int, list[mx.array]] = {}
    transforms, zones, symbols, kept = [], {}, [], {}
    for layer, all_vectors in m.vectors.items():
        source = source_below(layer, m.windows) if scope == "below" else None
        x_fit = np.ascontiguousarray(all_vectors[:n_fit].reshape(-1, all_vectors.shape[2]))
        fitted = fit_layer(
            layer,
            m.shapes[layer],
            m.ropes[layer],
            np.asarray(m.fishers[layer], dtype=np.float64),
            x_fit,
            scope=scope,
            step=step,
            below=None if source is None else (source, decoded_fit[source]),
            epsilon=epsilon,
            bits=bits,
        )
        transforms.append(fitted.transform)
        decoded_fit[layer] = fitted.decoded
        held_out = all_vectors[n_fit:].reshape(-1, all_vectors.shape[2])
        x = mx.array(np.concatenate([x_fit[chosen], held_out]).astype(np.float32))[None]
        own_zones, own_decoded, own_kept, y, last = [], [], [], None, None
        for tier in reversed(range(len(steps))):  # as a token ages
            below = None if source is None else decoded[source][tier]
            if y is None or last is None:
                y = np.array(fitted.transform.encode(x, below)[0])
            else:
                centred = fitted.transform.mean + last
                y = np.array(fitted.transform.encode(centred, below)[0])
            zone = DeadZone.fit(y[: len(chosen)], steps[tier])
            q = zone.quantize(y)
            last = fitted.transform.decode(mx.array(zone.values(q))[None], below)
            mx.eval(last)
            own_zones.append(zone)
            own_decoded.append(last)
            own_kept.append(y[len(chosen) :])
            some_of = slice(None, len(chosen), 1 if tier == 0 else 2)
            symbols.append(_all_coded(q[some_of]))
        zones[layer] = own_zones[::-1]
        decoded[layer] = own_decoded[::-1]
        kept[layer] = own_kept[::-1]
        needed = {source_below(later, m.windows) for later in m.vectors if later > layer}
        decoded_fit = {i: d for i, d in decoded_fit.items() if i in needed}
        decoded = {i: d for i, d in decoded.items() if i in needed}
    family, tables = fit_tables(symbols)
    shared = SharedTables.of(family)
    n_tiers = len(steps)
    tiers = {}
    for at, layer in enumerate(m.vectors):
        own = tables[at * n_tiers : (at + 1) * n_tiers][::-1]
        tiers[layer] = tuple(
            TierCode(zone, mx.array(table.classes), mx.array(table.shifts), shared)
            for zone, table in zip(zones[layer], own, strict=True)
        )
    return _Fitted(transforms, tiers, kept)


def _all_coded(symbols: NDArray[np.int32]) -> NDArray[np.int32]:
    """With a one in columns of zeros: a coefficient that calibration never saw above zero must still have a code."""
    symbols = symbols.copy()
    symbols[0, ~symbols.any(axis=0)] = 1
    return symbols


def measured_bits(
    fitted_tiers: Mapping[int, tuple[TierCode, ...]],
    coefficients: Mapping[int, list[Singles]],
    sizes: Mapping[int, int],
    ages: Sequence[tuple[int, int]],
    sinks: int,
    at_tokens: int,
    scale: float = 1.0,
) -> float:
    """Bits a value of a cache of ``at_tokens`` tokens, blocks and sinks counted, from held-out coefficients.

    Args:
        scale: steps are multiplied by it: the same tables serve a slightly different step.
    """
    limits = [age for age, _ in ages]
    ends = [max(sinks, at_tokens - age) for age in limits]
    parts = cut_into_blocks(sinks, ends, at_tokens)
    total = values = 0.0
    for layer, tiers in fitted_tiers.items():
        total += 16.0 * sinks * sizes[layer]
        values += at_tokens * sizes[layer]
        for tier, code in enumerate(tiers):
            y = coefficients[layer][tier]
            y = y if tier == 0 else y[: max(256, len(y) // 4)]
            q = replace(code, zone=replace(code.zone, step=code.zone.step * scale)).quantize(y)
            for length in {part.last - part.first for part in parts if part.tier == tier}:
                count = sum(part.tier == tier and part.last - part.first == length for part in parts)
                some = q if len(q) >= length else np.resize(q, (length, q.shape[1]))
                whole = min(len(some) // length, 8 if count == 1 else 1 << 30) * length
                nbytes = coded_nbytes(np.ascontiguousarray(some[:whole]), code.tables, length)
                total += 8 * nbytes * count / (whole // length)
    return total / values


def fit_code(
    m: Measurements,
    *,
    target: float | None = None,
    step: float | None = None,
    scope: Scope = "below",
    sinks: int = SINKS,
    ages: Sequence[tuple[int, int]] = AGES,
    at_tokens: int = 2048,
    epsilon: float = 0.1,
    bits: TableBits = FP16_TABLES,
    first_step: float = FIRST_STEP,
    say: Say = lambda line: None,
) -> FisherCode:
    """Fit a code that meets a target, or the code at a step.

    Args:
        m: what the model does on the calibration text.
        target: bits_per_value at ``at_tokens`` tokens of one sequence, tables apart, everything else counted.
        step: of the oldest tokens in √nats, in place of a target.
        scope: ``head``, ``layer`` or ``below``.
        sinks: first tokens kept in fp16, those of sliding-window layers excepted.
        ages: as in :data:`AGES`, the oldest first.
        at_tokens: context at which the target holds.
        epsilon: regularisation of Fisher matrices.
        bits: of the transforms' tables.
        first_step: where the search begins.
        say: takes a line of progress.

    Raises:
        ValueError: a scope, target or step out of range, or a target that no step reaches.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if (target is None) == (step is None):
        raise ValueError("give a target or a step, not both")
    if target is not None and not 0 < target <= 16:
        raise ValueError(f"target must lie within 0..16 bits a value, got {target!r}")
    if step is not None and not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be finite and above 0, got {step!r}")
    ages = tuple((int(age), int(divisor)) for age, divisor in ages)
    sizes = {layer: shape.size for layer, shape in m.shapes.items()}
    tried: list[tuple[float, float]] = []

    def bits_of(fitted: _Fitted, scale: float = 1.0) -> float:
        return measured_bits(fitted.tiers, fitted.coefficients, sizes, ages, sinks, at_tokens, scale)

    at = first_step if step is None else step
    for _ in range(MAX_FITS):
        fitted = _fit_at(m, scope, at, ages, epsilon, bits)
        real = bits_of(fitted)
        say(f"step {at:.5f}: {real:.3f} bits a value at {at_tokens} tokens")
        if target is None:
            break
        tried.append((math.log2(at), real))
        scale = _scale_for(bits_of, fitted, real, target) if abs(real / target - 1) < 0.08 else None
        if scale is not None:
            fitted, at = _scaled(fitted, scale), at * scale
            real = bits_of(fitted)
            break
        at = 2.0 ** _next_step(tried, target)
    else:
        raise ValueError(f"no step was found for {target} bits a value in {MAX_FITS} fits: {tried}")
    klt = KLTCalibration(scope, at, tuple(fitted.transforms), m.provenance, m.line_hashes)
    codes = layer_codes(klt.layers, fitted.tiers)
    return FisherCode(klt, codes, sinks, ages, target, real, at_tokens)


def _next_step(tried: Sequence[tuple[float, float]], target: float) -> float:
    """The logarithm of the next step: along the line through the last two, or along one bit a halving."""
    log, real = tried[-1]
    slope = -0.85
    if len(tried) > 1 and tried[-2][0] != log:
        slope = min(-0.3, (real - tried[-2][1]) / (log - tried[-2][0]))
    return log + max(-2.0, min(2.0, (target * (1 - CLOSE / 3) - real) / slope))


def _scale_for(bits_of: Callable[[_Fitted, float], float], fitted: _Fitted, real: float, target: float) -> float | None:
    """A factor near 1 of all steps at which the target is met from below with the tables as they are."""
    low, high = 0.85, 1.18
    if target * (1 - CLOSE / 3) <= real <= target:
        return 1.0
    if not bits_of(fitted, high) <= target <= bits_of(fitted, low):
        return None
    for _ in range(5):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if bits_of(fitted, middle) <= target else (middle, high)
    return high


def _scaled(fitted: _Fitted, scale: float) -> _Fitted:
    tiers = {
        layer: tuple(replace(code, zone=replace(code.zone, step=code.zone.step * scale)) for code in codes)
        for layer, codes in fitted.tiers.items()
    }
    return replace(fitted, tiers=tiers)
