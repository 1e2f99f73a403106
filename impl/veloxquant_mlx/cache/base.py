"""Configure and build caches: ``KVCacheBuilder.build(model, KVCacheConfig(method=..., ...))``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from veloxquant_mlx.cache.packed import LayerSpec, PackedKVCache
from veloxquant_mlx.cache.storage import HeldArray
from veloxquant_mlx.methods import METHODS, MethodOptions, Role
from veloxquant_mlx.quantizers.base import Quantizer
from veloxquant_mlx.registry import near_matches

__all__ = ["HeldArray", "KVCacheBuilder", "KVCacheConfig", "LayerSpec", "PackedKVCache"]


@dataclasses.dataclass(frozen=True, init=False, eq=True)
class KVCacheConfig:
    """A method, what all methods share, and the chosen method's own options.

    Args:
        method: a name of ``veloxquant_mlx.methods.METHODS``.
        bit_allocation: code width per layer, ``{"layer_0": 4, ...}`` with every layer of the model named once;
            absent: the method's ``code_bits`` everywhere.
        value_bits: code width of all values; absent: the layer's width.
        sinks: first tokens kept in fp16, paid for in bytes.
        window: last tokens kept in fp16, paid for in bytes; absent: the method's default (0 for most).
        seed: of rotations and projections.
        **options: fields of the method's options class.

    Raises:
        ValueError: an unknown method, or a value outside its range, naming it.
        TypeError: a field that the method does not have, with near matches.
    """

    method: str
    bit_allocation: Mapping[str, int] | None
    value_bits: int | None
    sinks: int
    window: int
    seed: int
    options: MethodOptions

    def __init__(
        self,
        method: str,
        *,
        bit_allocation: Mapping[str, int] | None = None,
        value_bits: int | None = None,
        sinks: int = 0,
        window: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        options_class = METHODS[method]
        known = {field.name for field in dataclasses.fields(options_class)}  # type: ignore[arg-type]
        common = {field.name for field in dataclasses.fields(KVCacheConfig)} - {"options"}
        for name in options:
            if name not in known:
                raise TypeError(
                    f"method {method!r} has no field {name!r}; did you mean {near_matches(name, known | common)}?"
                )
        for name, value in (("sinks", sinks), ("window", window), ("seed", seed)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
        made = options_class(**options)
        fields: dict[str, Any] = {
            "method": method,
            "bit_allocation": bit_allocation,
            "value_bits": value_bits,
            "sinks": sinks,
            "window": made.default_window if window is None else window,
            "seed": seed,
            "options": made,
        }
        for name, field in fields.items():
            object.__setattr__(self, name, field)
        self._check_width("code_bits", made.code_bits)
        if value_bits is not None:
            self._check_width("value_bits", value_bits)
        for layer, bits in (bit_allocation or {}).items():
            self._check_width(f"bit_allocation[{layer!r}]", bits)

    def _check_width(self, name: str, bits: object) -> None:
        widths = self.options.widths
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"{name} must be an int, got {bits!r}")
        if bits not in widths:
            raise ValueError(f"{name} must be within {widths.start}..{widths.stop - 1} for {self.method}, got {bits}")

    def layer_bits(self, n_layers: int) -> list[int]:
        """Code width per layer of a model with ``n_layers`` layers.

        Raises:
            ValueError: the allocation names a layer that the model does not have, or misses one.
        """
        if self.bit_allocation is None:
            return [self.options.code_bits] * n_layers
        names = [f"layer_{i}" for i in range(n_layers)]
        unknown = [name for name in self.bit_allocation if name not in names]
        if unknown:
            raise ValueError(
                f"bit_allocation names {', '.join(map(repr, unknown))}, but the model has {n_layers} layers "
                f"(layer_0 to layer_{n_layers - 1})"
            )
        missing = [name for name in names if name not in self.bit_allocation]
        if missing:
            raise ValueError(f"bit_allocation misses {', '.join(map(repr, missing))}")
        return [self.bit_allocation[name] for name in names]

    def quantizer(self, role: Role, layer_bits: int) -> Quantizer:
        """The quantizer of one side of a layer whose allocated width is ``layer_bits``."""
        bits = layer_bits
        if role == "values" and self.value_bits is not None:
            bits = self.value_bits
        return self.options.quantizer(role, bits, self.seed)


class KVCacheBuilder:
    """Builds a model's caches from a configuration."""

    @staticmethod
    def build(model: Any, config: KVCacheConfig) -> list[Any]:
        """One cache per layer of ``model``, for ``prompt_cache=`` of mlx-lm.

        Full and sliding-window attention layers get a :class:`PackedKVCache`; a layer whose state is something else
        (convolution, recurrence) keeps mlx-lm's own cache.

        Raises:
            ValueError: the bit allocation does not fit the model's layers.
        """
        own = make_prompt_cache(model)
        return [
            KVCacheBuilder.build_layer(config, bits, cache)
            for bits, cache in zip(config.layer_bits(len(own)), own, strict=True)
        ]

    @staticmethod
    def build_layer(config: KVCacheConfig, bits: int, own: Any) -> Any:
        """The cache that stands in for mlx-lm's ``own`` on a layer of code width ``bits``."""
        if type(own) is KVCache:
            max_size = None
        elif type(own) is RotatingKVCache and own.keep == 0:
            max_size = own.max_size
        else:
            return own
        return PackedKVCache(
            LayerSpec(
                keys=config.quantizer("keys", bits),
                values=config.quantizer("values", bits),
                sinks=0 if max_size is not None else config.sinks,
                window=config.window,
                max_size=max_size,
            )
        )
