"""Every method of the reference implementation at uniform code widths, from the implementation's own list.

The parameters are the fields of a method's options class, and what all have: ``sinks=N`` and ``window=N`` keep the
first and the last N tokens in fp16, ``value_bits=N`` gives all values a width of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import veloxquant_kernels
import veloxquant_mlx
from veloxbench.errors import EngagementError
from veloxbench.methods.registry import BuildContext, Geometry, TargetMeaning, register
from veloxbench.records.arm import Arm
from veloxbench.records.provenance import source_hash
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.methods import METHODS, MethodOptions
from veloxquant_mlx.quantizers.mixed import MixedQuantizer


class Saved(Protocol):
    """What a method learns of a model, as it is kept on disk."""

    def save(self, path: Path) -> object:
        """Write it whole to a file."""


Artefact = TypeVar("Artefact", bound=Saved)


def implementation() -> str:
    """Hash of the reference implementation's and the kernels' source."""
    return f"veloxquant_mlx {source_hash(veloxquant_mlx, veloxquant_kernels)[:16]}"


def storage_formula(cache: PackedKVCache, tokens: int, geometry: Geometry) -> Fraction:
    """Bytes of one layer after ``tokens`` tokens, from its quantizers' costs, sinks and window.

    Where the data decide (a width per block, flagged tokens, a scale calibrated anew), from the costs and counts of
    what was decided.

    Raises:
        EngagementError: the data decide, and the cache holds another number of tokens.
    """
    spec = cache.spec
    sides = (spec.keys, spec.values)
    decided = any(isinstance(side, MixedQuantizer) or side.calibration_tokens for side in sides)
    if decided or spec.outlier_keys is not None:
        return counted_formula(cache, tokens, geometry)
    shape = {"n_kv_heads": geometry.n_kv_heads, "key_dim": geometry.head_dim, "value_dim": geometry.value_dim}
    return Fraction(spec.expected_nbytes(tokens, **shape))


def counted_formula(cache: PackedKVCache, tokens: int, geometry: Geometry) -> Fraction:
    """Bytes of one layer from the costs and counts of what the data decided.

    Raises:
        EngagementError: it does not hold the tokens that came, or as many of them as its window takes.
    """
    wanted = min(tokens, cache.max_size or tokens)
    if cache.tokens_held() != (wanted, wanted):
        raise EngagementError(
            f"layer {cache.spec.layer} holds {cache.tokens_held()} tokens of keys and values after {tokens}, "
            f"not {wanted}"
        )
    return cache.formula_nbytes()


def kept(path: Path, load: Callable[[Path], Artefact], make: Callable[[], Artefact]) -> Artefact:
    """The artefact at ``path``, made where there is none: whole or not at all, for a run may be killed."""
    if not path.exists():
        partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
        make().save(partial)
        partial.replace(path)
    return load(path)


def _aim(name: str, options: type[MethodOptions]) -> tuple[str | None, tuple[float, ...]]:
    """The field that a target sets, and the targets."""
    if hasattr(options, "targets"):
        return options.target_field, options.targets
    # an earlier revision, which `veloxbench compare` imports: its options name neither
    earlier = {"ternary": (None, (1.6,)), "turboquant_prod_adaptive": ("max_bits", tuple(map(float, range(8, 1, -1))))}
    return earlier.get(name, ("code_bits", tuple(map(float, range(8, 0, -1)))))


def configuration(arm: Arm) -> list[str] | None:
    """The arguments of ``KVCacheConfig(...)`` that build an arm, as Python text; None where they are not enough."""
    if arm.name not in METHODS or METHODS[arm.name].needs_allocation:
        return None
    target_field, _ = _aim(arm.name, METHODS[arm.name])
    given = dict(arm.parameters)
    if target_field is not None and arm.target is not None:
        given = {target_field: _target_value(METHODS[arm.name].target_means, arm.target), **given}
    return [repr(arm.name), *(f"{name}={value!r}" for name, value in given.items())]


def _target_value(means: TargetMeaning, target: float) -> float:
    return int(target) if means == "code_bits" else target


def _register(name: str, options: type[MethodOptions]) -> None:
    """Register a method from what its options class says of it."""
    target_field, targets = _aim(name, options)
    means: TargetMeaning = getattr(options, "target_means", "code_bits")

    def factory(context: BuildContext, target: float, **parameters: Any) -> list[Any]:
        if target_field is not None:
            parameters[target_field] = _target_value(means, target)
        return KVCacheBuilder.build(context.model, KVCacheConfig(name, **parameters))

    defaults: dict[str, Any] = {"sinks": 0, "value_bits": None, "window": options.default_window}
    defaults |= {field.name: field.default for field in dataclasses.fields(options) if field.name != target_field}
    signature = inspect.signature(factory)
    factory.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            *list(signature.parameters.values())[:2],
            *(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=each) for key, each in defaults.items()),
        ]
    )
    register(
        name,
        summary=getattr(options, "summary", name),
        cache_classes=(PackedKVCache,),
        targets=targets,
        target_means=means,
        formula=storage_formula,
        implementation=implementation,
    )(factory)


for _name in METHODS:
    if not METHODS[_name].needs_allocation:  # one that needs calibration first has a module of its own here
        _register(_name, METHODS[_name])
