"""Configure and build caches: ``KVCacheBuilder.build(model, KVCacheConfig(method=..., ...))``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from veloxquant_kernels.kernel import Backend
from veloxquant_mlx.allocators.allocation import BitAllocation
from veloxquant_mlx.cache.fused import FusedMode, fuse, leaves
from veloxquant_mlx.cache.packed import BatchPackedKVCache, LayerSpec, PackedKVCache
from veloxquant_mlx.cache.persistence import load_prompt_cache, save_prompt_cache
from veloxquant_mlx.cache.storage import HeldArray
from veloxquant_mlx.hook import own_caches
from veloxquant_mlx.methods import METHODS, MethodOptions, Role, make_options
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.quantizers.base import Coding, Quantizer, pair_name
from veloxquant_mlx.quantizers.per_head import PerHead

__all__ = [
    "BatchPackedKVCache",
    "HeldArray",
    "KVCacheBuilder",
    "KVCacheConfig",
    "LayerSpec",
    "PackedKVCache",
    "load_prompt_cache",
    "save_prompt_cache",
]

_UNIT = re.compile(r"layer_(?P<layer>\d+)(\.(?P<role>keys|values)(\.head_(?P<head>\d+))?)?")

Widths = int | tuple[int, ...] | None
"""Code width of one side of a layer: one, one per KV head, or the method's own."""


@dataclasses.dataclass(frozen=True, init=False)
class KVCacheConfig:
    """A method, what all methods share, and the chosen method's own options.

    Args:
        method: a name of ``veloxquant_mlx.methods.METHODS``.
        bit_allocation: code widths by unit: ``layer_3``, or ``layer_3.keys`` and ``layer_3.values``, or
            ``layer_3.keys.head_0`` and so on for every head. Every layer of the model must be named. A
            ``BitAllocation`` must count the quantizers with their parameters, sinks and window that are configured, and
            goes with no ``outlier_observer``; a plain mapping (``dict(bit_allocation)``) claims no cost. Absent: the
            method's ``code_bits`` everywhere.
        value_bits: code width of all values; absent: the layer's width.
        outlier_observer: flags tokens, which are then kept at ``outlier_bits`` as well.
        outlier_bits: code width of flagged tokens, keys and values, at least that of all others; 8 where an observer
            is given without it.
        distortion_observer: is told of everything that is encoded.
        sinks: first tokens kept in fp16, paid for in bytes; none on sliding-window layers.
        window: last tokens kept in fp16, paid for in bytes; absent: the method's default (0 for most).
        seed: of rotations and sketches.
        fused: whether decode steps attend to the packed arrays through the fused Metal kernel: ``auto`` where Metal is
            MLX's default device, ``on`` (an error where it cannot be) or ``off``. A layer that is not fused says why in
            its cache's ``attention``.
        fused_backend: where the fused kernel runs; None is Metal, ``emulator`` executes it on the CPU.
        options: the options object that ``dataclasses.replace`` hands on: ``replace(config, sinks=1)``.
        **method_options: fields of the method's options class.

    Raises:
        ValueError: an unknown method, a value outside its range, naming it, or an allocation made for something else.
        TypeError: a field that the method does not have, with near matches, or another method's options.
    """

    method: str
    bit_allocation: Mapping[str, int] | None
    value_bits: int | None
    outlier_observer: KeyNormObserver | None
    outlier_bits: int | None
    distortion_observer: DistortionObserver | None
    sinks: int
    window: int
    seed: int
    fused: FusedMode
    fused_backend: Backend | None
    options: MethodOptions

    def __init__(
        self,
        method: str,
        *,
        bit_allocation: Mapping[str, int] | None = None,
        value_bits: int | None = None,
        outlier_observer: KeyNormObserver | None = None,
        outlier_bits: int | None = None,
        distortion_observer: DistortionObserver | None = None,
        sinks: int = 0,
        window: int | None = None,
        seed: int = 0,
        fused: FusedMode = "auto",
        fused_backend: Backend | None = None,
        options: MethodOptions | None = None,
        **method_options: Any,
    ) -> None:
        common = frozenset(field.name for field in dataclasses.fields(KVCacheConfig)) - {"options"}
        if options is not None:
            if type(options) is not METHODS[method]:
                raise TypeError(f"options must be {METHODS[method].__name__} for {method!r}, got {options!r}")
            method_options = {
                field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            } | method_options
        made = make_options(method, method_options, common)
        for name, count in (("sinks", sinks), ("window", window), ("seed", seed)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise ValueError(f"{name} must be an int of at least 0, got {count!r}")
        for name, value, known in (
            ("fused", fused, get_args(FusedMode)),
            ("fused_backend", fused_backend, (None, *get_args(Backend))),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if outlier_bits is not None and outlier_observer is None:
            raise ValueError("outlier_bits needs an outlier_observer that flags tokens")
        if outlier_observer is not None and outlier_bits is None:
            outlier_bits = 8
        fields: dict[str, Any] = {
            "method": method,
            "bit_allocation": bit_allocation,
            "value_bits": value_bits,
            "outlier_observer": outlier_observer,
            "outlier_bits": outlier_bits,
            "distortion_observer": distortion_observer,
            "sinks": sinks,
            "window": made.default_window if window is None else window,
            "seed": seed,
            "fused": fused,
            "fused_backend": fused_backend,
            "options": made,
        }
        for name, field in fields.items():
            object.__setattr__(self, name, field)
        for name, bits in (("value_bits", value_bits), ("outlier_bits", outlier_bits)):
            if bits is not None:
                self._check_width(name, bits)
        if bit_allocation is not None:
            self._check_allocation(bit_allocation)
        elif made.needs_allocation:
            raise ValueError(f"method {method!r} needs a bit_allocation")
        if outlier_bits is not None:
            self._check_outlier_bits(outlier_bits)

    def _check_width(self, name: str, bits: object) -> None:
        widths = self.options.widths
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"{name} must be an int, got {bits!r}")
        if bits not in widths:
            raise ValueError(f"{name} must be within {widths.start}..{widths.stop - 1} for {self.method}, got {bits}")

    def _check_outlier_bits(self, outlier_bits: int) -> None:
        widths: dict[str, int | None] = {name: getattr(self.options, name, None) for name in ("code_bits", "max_bits")}
        if self.bit_allocation is not None:
            widths = {f"bit_allocation[{unit!r}]": bits for unit, bits in self.bit_allocation.items()}
        for name, bits in {**widths, "value_bits": self.value_bits}.items():
            if bits is not None and outlier_bits < bits:
                raise ValueError(
                    f"outlier_bits={outlier_bits} is below {name}={bits}: flagged tokens would lose more than others"
                )

    def _check_allocation(self, allocation: Mapping[str, int]) -> None:
        if not self.options.allocatable:
            raise ValueError(f"method {self.method!r} has no width that a bit_allocation could set")
        for unit, bits in allocation.items():
            if _UNIT.fullmatch(unit) is None:
                raise ValueError(
                    f"bit_allocation names {unit!r}; units are layer_3, layer_3.keys or layer_3.keys.head_0"
                )
            self._check_width(f"bit_allocation[{unit!r}]", bits)
        if self.value_bits is not None and any(".values" in unit for unit in allocation):
            raise ValueError("value_bits and a bit_allocation that names values exclude each other")
        if isinstance(allocation, BitAllocation):
            self._check_claim(allocation)

    def _check_claim(self, allocation: BitAllocation) -> None:
        """What the allocation's bits_per_value counts is what the caches will hold."""
        bits = next(iter(allocation.values()))
        keys, values = (self.options.quantizer(role, bits, self.seed) for role in get_args(Role))
        claims: list[tuple[str, object, object]] = [
            ("quantizer", pair_name(keys, values), allocation.quantizer),
            ("sinks", self.sinks, allocation.sinks),
            ("window", self.window, allocation.window),
            ("value_bits", self.value_bits, None),
            ("outlier_observer", self.outlier_observer, None),
        ]
        for role, made, counted_coding in zip(get_args(Role), (keys, values), allocation.codings or (), strict=False):
            claims.append((f"quantizer of {role}", Coding.of(made).name, counted_coding.name))
        for name, configured, counted in claims:
            if configured != counted:
                raise ValueError(
                    f"{name} is {configured!r} here, but the bit_allocation was made for {counted!r}, so its "
                    f"bits_per_value would not hold; make both equal, or pass dict(bit_allocation) to claim no cost"
                )

    def layer_widths(self, quantized: list[bool]) -> list[tuple[Widths, Widths]]:
        """Widths of keys and values per layer.

        Args:
            quantized: for each layer of the model, whether its cache can be quantized.

        Raises:
            ValueError: the allocation names a layer that the model does not have or that cannot be quantized,
                or misses one that can.
        """
        n_layers = len(quantized)
        if self.bit_allocation is None:
            return [(None, self.value_bits)] * n_layers
        units: list[dict[str, dict[int | None, int]]] = [{} for _ in range(n_layers)]
        unknown = []
        for unit, bits in self.bit_allocation.items():
            match = _UNIT.fullmatch(unit)
            assert match is not None  # checked on construction
            layer = int(match["layer"])
            if layer >= n_layers or not quantized[layer]:
                unknown.append(unit)
                continue
            head = None if match["head"] is None else int(match["head"])
            units[layer].setdefault(match["role"] or "both", {})[head] = bits
        if unknown:
            raise ValueError(
                f"bit_allocation names {', '.join(map(repr, unknown))}, but the model has {n_layers} layers "
                f"(layer_0 to layer_{n_layers - 1}), {sum(quantized)} of which can be quantized"
            )
        missing = [f"layer_{i}" for i in range(n_layers) if quantized[i] and not units[i]]
        if missing:
            raise ValueError(f"bit_allocation misses {', '.join(map(repr, missing))}")
        return [self._sides(f"layer_{i}", unit) if unit else (None, None) for i, unit in enumerate(units)]

    def _sides(self, layer: str, units: dict[str, dict[int | None, int]]) -> tuple[Widths, Widths]:
        if "both" in units:
            if len(units) > 1:
                raise ValueError(f"bit_allocation names {layer!r} and parts of it")
            bits = units["both"][None]
            return bits, bits if self.value_bits is None else self.value_bits
        if "values" not in units and self.value_bits is not None:
            units = {**units, "values": {None: self.value_bits}}
        for role in ("keys", "values"):
            if role not in units:
                raise ValueError(f"bit_allocation misses '{layer}.{role}'")
        return _side_widths(f"{layer}.keys", units["keys"]), _side_widths(f"{layer}.values", units["values"])

    def quantizer(self, role: Role, widths: Widths) -> Quantizer:
        """The quantizer of one side of a layer."""
        if isinstance(widths, tuple):
            return PerHead(tuple(self.options.quantizer(role, bits, self.seed) for bits in widths))
        return self.options.quantizer(role, widths, self.seed)

    def layer_spec(self, layer: int, keys: Widths, values: Widths, max_size: int | None) -> LayerSpec:
        """How to store one attention layer, ``max_size`` its sliding window if it has one."""
        outliers: dict[str, Quantizer] = {}
        if self.outlier_bits is not None:
            outliers = {
                "outlier_keys": self.options.outlier_quantizer("keys", self.outlier_bits, self.seed),
                "outlier_values": self.options.outlier_quantizer("values", self.outlier_bits, self.seed),
            }
        return LayerSpec(
            keys=self.quantizer("keys", keys),
            values=self.quantizer("values", values),
            sinks=0 if max_size is not None else self.sinks,
            window=self.window,
            max_size=max_size,
            layer=layer,
            **outliers,
        )


def _side_widths(name: str, heads: dict[int | None, int]) -> Widths:
    if None in heads:
        if len(heads) > 1:
            raise ValueError(f"bit_allocation names {name!r} and heads of it")
        return heads[None]
    for head in range(len(heads)):
        if head not in heads:
            raise ValueError(f"bit_allocation misses '{name}.head_{head}'")
    return tuple(heads[head] for head in range(len(heads)))


class KVCacheBuilder:
    """Builds a model's caches from a configuration."""

    @staticmethod
    def build(model: Any, config: KVCacheConfig) -> list[Any]:
        """One cache per layer of ``model``, for ``prompt_cache=`` of mlx-lm.

        Full and sliding-window attention layers get a :class:`PackedKVCache`. A layer whose state is something
        else (convolution, recurrence) keeps mlx-lm's own cache; in a layer with several states, attention is packed.
        ``model.make_cache`` may be a function that builds these caches: the model's class is asked for its own.

        Raises:
            ValueError: the bit allocation does not fit the model's layers or their heads, or ``fused="on"`` and no
                layer can be.
            RuntimeError: the fused path is switched on for Metal, which is not MLX's default device.
        """
        own = own_caches(model)
        widths = config.layer_widths([bool(_attention_caches(cache)) for cache in own])
        if any(isinstance(side, tuple) for sides in widths for side in sides):
            _check_heads(model, widths)
        packed = [
            KVCacheBuilder._packed(config, layer, pair, cache)
            for layer, (pair, cache) in enumerate(zip(widths, own, strict=True))
        ]
        caches, _ = fuse(model, packed, mode=config.fused, backend=config.fused_backend)
        return caches

    @staticmethod
    def _packed(config: KVCacheConfig, layer: int, widths: tuple[Widths, Widths], own: Any) -> Any:
        if isinstance(own, CacheList):
            cache_list: Any = CacheList
            return cache_list(*(KVCacheBuilder._packed(config, layer, widths, part) for part in own.caches))
        if not _attention_caches(own):
            return own
        max_size = own.max_size if isinstance(own, RotatingKVCache) else None
        return PackedKVCache(
            config.layer_spec(layer, *widths, max_size),
            outlier_observer=config.outlier_observer,
            distortion_observer=config.distortion_observer,
        )


def _check_heads(model: Any, widths: list[tuple[Widths, Widths]]) -> None:
    """Every side of a layer that names heads names as many as it has, by the shapes of one token's pass."""
    trial = own_caches(model)
    model(mx.array([[0]]), cache=trial)  # not evaluated
    for layer, (sides, own) in enumerate(zip(widths, trial, strict=True)):
        for role, heads in zip(get_args(Role), sides, strict=True):
            for n_heads in {getattr(cache, role).shape[1] for cache in _attention_caches(own) if not cache.empty()}:
                if isinstance(heads, tuple) and len(heads) != n_heads:
                    raise ValueError(
                        f"bit_allocation names {len(heads)} heads of 'layer_{layer}.{role}', which has {n_heads}"
                    )


def _attention_caches(cache: Any) -> list[Any]:
    """The caches of keys and values, of the kinds that can be packed, that a layer's cache holds."""
    return [
        leaf for leaf in leaves([cache]) if type(leaf) is KVCache or (type(leaf) is RotatingKVCache and leaf.keep == 0)
    ]
