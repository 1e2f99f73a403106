"""The exact suite's cases: every method and width of ``veloxquant_mlx``, its caches, packing and allocations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from veloxbench.inputs.corpora import TokenBlock
from veloxbench.measure.exact import Case, FixedInputs, Products, digest, observe
from veloxbench.measure.suite import Cell, Measured, Measurement, Rates, Suite, Tick, measures
from veloxbench.methods.cache_under_test import arrays_of
from veloxbench.methods.veloxquant import implementation
from veloxbench.records.arm import Arm
from veloxbench.records.record import MethodRef, TextRef
from veloxquant_mlx.allocators.allocation import BitAllocation, shuffled
from veloxquant_mlx.allocators.curves import DistortionCurves, Weighting, fit_distortion_curve
from veloxquant_mlx.allocators.ratequant import UNITS, allocate_bits_continuous, allocate_bits_ratequant
from veloxquant_mlx.allocators.sensitivity import HeadSensitivities, Provenance, Sensitivities
from veloxquant_mlx.cache.base import KVCacheConfig, PackedKVCache
from veloxquant_mlx.methods import METHODS
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.packing import pack_codes, pack_trits, unpack_codes
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic

INPUTS = FixedInputs()
PACKED_LENGTHS = (1, 7, 31, 33, 64, 80, 128)
LAYERS, CALIBRATION_TOKENS = 6, 64


def _case(
    method: str,
    produce: Callable[[], Products],
    *,
    target: float | None = None,
    target_means: Literal["code_bits", "bits_per_value"] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Case:
    arm = Arm(name=method, target=target, parameters=dict(parameters or {}))
    return Case(arm, produce, implementation, target_means)


@functools.cache
def cases() -> list[Case]:
    """Every case, in order."""
    return [*_methods(), *_caches(), *_packing(), *_allocations()]


def _inputs(head_dim: int, seed: int, tokens: int) -> tuple[mx.array, mx.array]:
    return mx.array(INPUTS.tensor(seed, tokens, head_dim)), mx.array(INPUTS.tensor(seed + 1, tokens, head_dim))


def _account(name: str, cache: Any) -> Products:
    """What a cache holds now and what attention would read, each name starting with ``name``."""
    keys, values = cache.fetch(cache.size(), mx.float32)
    return {**_held(name, cache), f"{name}_keys": keys, f"{name}_values": values}


def _held(name: str, cache: Any) -> Products:
    leaves = arrays_of(cache)
    codes = [np.array(leaf).tolist() for leaf in leaves if leaf.dtype not in (mx.float16, mx.float32)]
    halves = [np.array(leaf).ravel() for leaf in leaves if leaf.dtype == mx.float16]
    return {
        f"{name}_codes": codes,
        **({f"{name}_halves": np.concatenate(halves)} if halves else {}),
        f"{name}_tokens": cache.size(),
        f"{name}_bits_per_value": float(cache.bits_per_value()),
        f"{name}_formula_bytes": float(cache.formula_nbytes()),
        f"{name}_nbytes": cache.nbytes,
    }


def _feed(cache: Any, keys: mx.array, values: mx.array, pieces: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    start = 0
    fetched = keys, values
    for n in pieces:
        fetched = cache.update_and_fetch(keys[:, :, start : start + n], values[:, :, start : start + n])
        mx.eval(fetched)
        start += n
    return fetched


def whole_life(make: Callable[[], PackedKVCache], *, head_dim: int = INPUTS.head_dim, seed: int = 0) -> Products:
    """Fed in pieces, trimmed, fed again, saved and restored: everything a cache goes through in use."""
    cache, total = make(), sum(INPUTS.pieces)
    keys, values = _inputs(head_dim, seed, total + INPUTS.again)
    last_keys, last_values = _feed(cache, keys, values, INPUTS.pieces)
    products = dict(_account("fed", cache))
    products["fetched"] = mx.concatenate([last_keys.reshape(-1), last_values.reshape(-1)]).astype(mx.float32)
    for n in (1, 4):
        mask = cache.make_mask(n, return_array=True)
        products[f"mask_{n}"] = "none" if mask is None else mask
    products["trimmable"] = int(cache.is_trimmable())
    if cache.is_trimmable():
        cache.trim(INPUTS.trimmed)
        products |= _held("trimmed", cache)
    _feed(cache, keys[:, :, total:], values[:, :, total:], (INPUTS.again,))
    products |= _account("again", cache)
    again, restored = _account("", cache), _account("", PackedKVCache.from_state(cache.state))
    products["restored_unlike"] = sum(digest(again[name]) != digest(restored[name]) for name in again)
    return products


def _made(config: KVCacheConfig, max_size: int | None = None) -> PackedKVCache:
    return PackedKVCache(
        config.layer_spec(0, None, config.value_bits, max_size),
        outlier_observer=config.outlier_observer,
        distortion_observer=config.distortion_observer,
    )


def _method_case(method: str, target: float | None, seed: int = 0, **options: Any) -> Case:
    def produce() -> Products:
        config = KVCacheConfig(method=method, **options)
        made = {f"{role}_spec": config.quantizer(role, None).spec() for role in ("keys", "values")}
        return made | dict(whole_life(lambda: _made(config), seed=seed))

    return _case(
        method=method,
        target=target,
        target_means=None if target is None else "code_bits",
        produce=produce,
        parameters={name: value for name, value in options.items() if name != "code_bits"},
    )


def _methods() -> Iterator[Case]:
    """Every registered method at every width that it has."""
    for name in METHODS:
        options = METHODS[name]
        if options.needs_allocation:
            continue  # the allocations below
        fields = {option.name for option in dataclasses.fields(options)}
        extra = {"window": 32} if options.default_window else {}
        if "code_bits" not in fields:
            yield _method_case(name, None, **extra)
            continue
        for bits in options.widths:
            yield _method_case(name, float(bits), code_bits=bits, **extra)


def _caches() -> Iterator[Case]:
    """What caches do besides coding: sinks, windows, sliding layers, outliers, heads, batches, observers."""
    config = partial(KVCacheConfig, method="turboquant_mse", code_bits=4)

    def case(parameters: dict[str, Any], produce: Callable[[], Products]) -> Case:
        return _case(method="cache", target=4.0, target_means="code_bits", produce=produce, parameters=parameters)

    def life(max_size: int | None = None, head_dim: int = INPUTS.head_dim, **options: Any) -> Callable[[], Products]:
        return lambda: whole_life(lambda: _made(config(**options), max_size), head_dim=head_dim)

    yield case({"sinks": 4, "window": 8}, life(sinks=4, window=8))
    yield case({"max_size": 48}, life(max_size=48))
    yield case({"max_size": 48, "window": 8}, life(max_size=48, window=8))
    yield case({"value_bits": 2}, life(value_bits=2))
    for head_dim in (80, 96, 128):
        yield case({"head_dim": head_dim}, life(head_dim=head_dim))
    yield case({"heads": "2,5"}, lambda: whole_life(_per_head))
    yield case({"outliers": "both"}, _outliers)
    yield case({"observer": "distortion"}, _distortion)
    yield case({"batch": "left padding"}, _batch)


def _per_head() -> PackedKVCache:
    spec = KVCacheConfig(method="turboquant_mse", code_bits=4)
    return PackedKVCache(spec.layer_spec(0, (2, 5), (5, 2), None))


def _outliers() -> Products:
    observer = KeyNormObserver(outlier_threshold=1.5, window_size=16, tail="both")
    config = KVCacheConfig(method="turboquant_mse", code_bits=2, outlier_observer=observer, outlier_bits=8)
    products = dict(whole_life(lambda: _made(config)))
    report = observer.report()
    products["outlier_count"] = report.outlier_count
    products["outlier_norms"] = np.array([report.mean_outlier_norm, report.outlier_fraction])
    products["layers"] = np.array([[row.token_count, row.mean_norm] for row in report.layers])
    return products


def _distortion() -> Products:
    observer = DistortionObserver()
    config = KVCacheConfig(method="turboquant_prod", code_bits=3, distortion_observer=observer)
    products = dict(whole_life(lambda: _made(config)))
    rows = observer.report().rows
    products["rows"] = [[row.layer, row.role, row.quantizer, row.code_bits, row.n_vectors] for row in rows]
    figures = ("cosine", "relative_mse", "inner_product_mse", "gain")
    products["figures"] = np.array([[getattr(row, name) for name in figures] for row in rows])
    return products


def _batch() -> Products:
    config = KVCacheConfig(method="turboquant_mse", code_bits=4, window=4)
    keys, values = _inputs(INPUTS.head_dim, 4, 40)
    singles = []
    for row, tokens in enumerate((30, 21)):
        cache = _made(config)
        _feed(cache, keys[row : row + 1, :, :tokens], values[row : row + 1, :, :tokens], (tokens,))
        singles.append(cache)
    merged = PackedKVCache.merge(singles)
    fetched = merged.update_and_fetch(keys[:, :, 30:36], values[:, :, 30:36])
    products: dict[str, Any] = {
        "keys": fetched[0].astype(mx.float32),
        "values": fetched[1].astype(mx.float32),
        "mask": merged.make_mask(2),
        "offset": merged.offset,
        "left_padding": merged.left_padding,
        "nbytes": merged.nbytes,
        "bits_per_value": float(merged.bits_per_value()),
    }
    merged.trim(2)
    products |= _account("extracted", merged.extract(1))
    return products


def _packing() -> Iterator[Case]:
    def codes(bits: int) -> Products:
        rng = np.random.default_rng(bits)
        products: dict[str, Any] = {"wrong": 0}
        for length in PACKED_LENGTHS:
            rows = rng.integers(0, 1 << bits, size=(3, 5, length)).astype(np.uint32)
            words = pack_codes(mx.array(rows), bits)
            products[f"words_{length}"] = words
            products["wrong"] += int((np.array(unpack_codes(words, bits, length)) != rows).sum())
        return products

    def trits() -> Products:
        rng = np.random.default_rng(0)
        rows = {n: rng.integers(0, 3, size=(3, 5, n)).astype(np.uint8) for n in PACKED_LENGTHS}
        return {f"bytes_{n}": pack_trits(mx.array(row)) for n, row in rows.items()}

    for bits in range(1, 9):
        yield _case(method="pack_codes", target=float(bits), target_means="code_bits", produce=partial(codes, bits))
    yield _case(method="pack_trits", produce=trits)


def fixed_sensitivities() -> Sensitivities:
    """Sensitivities of a model that does not exist: whole numbers times powers of two, sums exact in any order."""
    rng = np.random.default_rng(0)
    heads = []
    for layer in range(LAYERS):
        for side, kind in enumerate(("keys", "values")):
            vectors = INPUTS.tensor(100 + 2 * layer + side, CALIBRATION_TOKENS).astype(np.float32) / 4
            size = 2.0 ** rng.integers(-6, 1, size=(1, INPUTS.heads, 1, 1))
            gradients = rng.integers(-4, 5, size=vectors.shape) * size / 16
            heads.append(
                HeadSensitivities(
                    layer=layer,
                    kind=kind,
                    squared_gradients=(gradients**2).sum(axis=-1),
                    vectors=mx.array(vectors.astype(np.float16)),
                    gradients=mx.array(gradients.astype(np.float32)).astype(mx.bfloat16),
                )
            )
    provenance = Provenance(
        model_sha256="",
        text_sha256="",
        num_samples=INPUTS.batch,
        seq_len=CALIBRATION_TOKENS,
        model_type="fixed",
        n_layers=LAYERS,
    )
    return Sensitivities(tuple(heads), provenance)


def _table(curves: DistortionCurves) -> Products:
    return {
        "distortions": np.array([curve.distortions for curve in curves.curves]),
        "losses": np.array([curve.losses for curve in curves.curves]),
        "weights": np.array([curve.weight for curve in curves.curves]),
        "variances": np.array([curve.variance for curve in curves.curves]),
        "fits": np.array([[curve.fit.alpha, curve.fit.beta] for curve in curves.curves]),
        "costs": {str(dim): [str(cost) for cost in row] for dim, row in curves.costs.items()},
    }


def _allocated(allocation: BitAllocation) -> Products:
    products: dict[str, Any] = {"widths": dict(allocation), "bits_per_value": float(allocation.bits_per_value)}
    if allocation.forecast_nats is not None:  # a shuffled allocation has none
        products["forecast_nats"] = np.array([allocation.forecast_nats])
    return products


def _fitted(static: bool, sinks: int, weighting: Weighting) -> Products:
    quantizer = TurboQuantStatic if static else TurboQuantMSE
    widths = range(9) if static else range(1, 9)
    return _table(
        fit_distortion_curve(fixed_sensitivities(), quantizer, widths=tuple(widths), sinks=sinks, weighting=weighting)
    )


def _ratequant(target: float, unit: str, solver: str) -> Products:
    return _allocated(allocate_bits_ratequant(_dyadic_curves(), target, 1, 8, unit=unit, solver=solver))


def _shuffled() -> Products:
    return _allocated(shuffled(allocate_bits_ratequant(_dyadic_curves(), 3.25, 1, 8), 1))


def _continuous() -> Products:
    return {"widths": np.array(list(allocate_bits_continuous(_dyadic_curves(), 3.25, 1, 8).values()))}


def _allocations() -> Iterator[Case]:
    curves: list[tuple[bool, int, Weighting]] = [(False, 0, "coherent"), (True, 4, "token"), (False, 4, "product")]
    for static, sinks, weighting in curves:
        name = (TurboQuantStatic if static else TurboQuantMSE).name
        yield _case(
            method="distortion_curves",
            produce=partial(_fitted, static, sinks, weighting),
            parameters={"quantizer": name, "sinks": sinks, "weighting": weighting},
        )
    ratequant = partial(_case, method="ratequant", target_means="bits_per_value")
    for unit in UNITS:
        for solver in ("optimal", "greedy"):
            for target in (2.25, 3.75):
                yield ratequant(
                    target=target,
                    parameters={"unit": unit, "solver": solver},
                    produce=partial(_ratequant, target, unit, solver),
                )
    yield ratequant(target=3.25, parameters={"shuffle": 1}, produce=_shuffled)
    yield ratequant(target=3.25, parameters={"continuous": True}, produce=_continuous)


def _dyadic_curves() -> DistortionCurves:
    """Curves whose losses are sums of powers of two with distinct exponents, so that no solver meets a rounding."""
    measured = fit_distortion_curve(fixed_sensitivities(), TurboQuantMSE, widths=tuple(range(1, 9)))
    rng = np.random.default_rng(1)
    curves = []
    for curve in measured.curves:
        weight = float(rng.integers(1, 4096)) / 256
        distortions = tuple(weight * 4.0**-bits for bits in measured.widths)
        curves.append(dataclasses.replace(curve, weight=weight, distortions=distortions, losses=distortions))
    return dataclasses.replace(measured, curves=tuple(curves))


@measures
class Exact(Suite):
    """Every case, once: it reads no model, no text and no section of the grid."""

    name = "exact"
    section = "exact"
    tasks = FixedInputs
    default = INPUTS

    def cells(self, tasks: FixedInputs, arms: Sequence[Arm]) -> Iterator[Cell]:
        """One per case, whatever the grid's arms are."""
        for case in cases():
            yield Cell(self.name, "fixed inputs", tasks, case.arm)

    def seconds(self, cell: Cell, rates: Rates) -> float:
        """A moment."""
        return 0.1

    def ref(self, arm: Arm) -> MethodRef:
        """The case's own, which is no registered method's."""
        return case_of(arm).ref

    def text(self, cell: Cell, block: TokenBlock) -> TextRef:
        """The fixed inputs."""
        return TextRef(name="fixed inputs", tokens_sha256=cell.task.sha256)

    def measure(self, item: Measurement, bench: None, tick: Tick) -> Measured:
        """Produce the case and reduce what it produced to digests, sizes and sums."""
        return Measured(*observe(case_of(item.cell.arm)))


def case_of(arm: Arm) -> Case:
    """The case that is named as the arm is."""
    return _by_label()[arm.label]


@functools.cache
def _by_label() -> dict[str, Case]:
    return {case.arm.label: case for case in cases()}
