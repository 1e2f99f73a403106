"""The registry of caches under test. A method is one file in this package (or an entry point of the
group ``veloxbench.methods``) that decorates a factory with :func:`register`; nothing else changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, make_prompt_cache

from veloxbench.errors import UsageError, unknown_name
from veloxbench.methods.cache_under_test import CacheUnderTest, ForeignUnderTest, arrays_of
from veloxbench.records.arm import Arm
from veloxbench.records.plugins import load_plugins
from veloxbench.records.provenance import code_hash
from veloxbench.records.record import MethodRef

TargetMeaning = Literal["code_bits", "bits_per_value"]


@dataclass(frozen=True)
class BuildContext:
    """What a factory may use: the loaded model and, for methods that calibrate, its tokenizer and files."""

    model: Module
    tokenizer: Any
    model_id: str
    """Hash of the weights; with ``n_layers`` (None for all) it names the calibration artefacts."""
    n_layers: int | None
    cache_folder: Path


@dataclass(frozen=True)
class Geometry:
    """One attention layer's stored shape: what a storage formula needs besides the method."""

    n_kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def n_values(self) -> int:
        """Keys' and values' elements of one token."""
        return self.n_kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Method:
    """A registered way to hold keys and values.

    Attributes:
        factory: ``(context, target, **parameters) -> caches``, one per layer.
        cache_classes: the classes that hold the layers which the method claims.
        targets: the targets that it can meet; ``None`` for the fp16 reference, which has none.
        target_means: ``code_bits`` (the real cost is higher: scales count) or ``bits_per_value``.
        formula: ``(cache, tokens, geometry) -> bytes`` that a claimed layer's cache should hold after that many
            tokens of one sequence, from its configuration (and the widths it chose, where it chooses): the arrays
            must agree exactly.
        implementation: version or source hash, part of every record's key.
        foreign: whose implementation it is, where it is not ours: what it refuses when :func:`probe` asks is reported
            as "not supported" and is no crash.
    """

    name: str
    summary: str
    factory: Callable[..., list[Any]]
    cache_classes: tuple[type, ...]
    targets: tuple[float, ...] | None
    target_means: TargetMeaning | None
    formula: Callable[..., Fraction]
    implementation: Callable[[], str]
    foreign: str | None = None

    @property
    def takes_any(self) -> bool:
        """Whether the factory hands parameters that it does not name to somebody who knows them."""
        parameters = inspect.signature(self.factory).parameters.values()
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def parameter_defaults(self) -> dict[str, Any]:
        """The factory's own keyword parameters with their defaults."""
        parameters = inspect.signature(self.factory).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


_REGISTRY: dict[str, Method] = {}


def register(
    name: str,
    *,
    summary: str,
    cache_classes: tuple[type, ...],
    targets: tuple[float, ...] | None,
    target_means: TargetMeaning | None,
    formula: Callable[..., Fraction],
    implementation: Callable[[], str] | None = None,
    foreign: str | None = None,
) -> Callable[[Callable[..., list[Any]]], Callable[..., list[Any]]]:
    """Register the decorated factory as a method.

    Args:
        name: under which grids and the command line find it.
        summary: one line for ``veloxbench methods``.
        cache_classes: the classes that hold the layers which the method claims.
        targets: those that it can meet; None for a method without any.
        target_means: whether a target is a code width or an upper limit of bits_per_value.
        formula: ``(cache, tokens, geometry) -> bytes``, see :class:`Method`.
        implementation: what tells one state of the code from another, part of every record's key. Left out, it is a
            hash of everything in the packages that define the factory and the cache classes, so that an edited cache
            is measured again; a version string that stays while the code changes makes old records pass for new ones.
        foreign: whose implementation it is, where a refusal is a finding and not a crash.

    Raises:
        ValueError: a second method of the same name.
    """

    def decorate(factory: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        if name in _REGISTRY:
            raise ValueError(f"method {name!r} is registered twice")
        made = implementation or functools.partial(_code_of, factory, cache_classes)
        _REGISTRY[name] = Method(name, summary, factory, cache_classes, targets, target_means, formula, made, foreign)
        return factory

    return decorate


def _code_of(factory: Callable[..., list[Any]], cache_classes: tuple[type, ...]) -> str:
    package = factory.__module__.partition(".")[0]
    theirs = [cls for cls in cache_classes if cls.__module__.partition(".")[0] not in ("mlx_lm", "mlx")]
    return f"{package} {code_hash(factory, *theirs)[:16]}"


def all_methods() -> dict[str, Method]:
    """Every registered method by name."""
    load_plugins("veloxbench.methods", "veloxbench.methods")
    return dict(_REGISTRY)


def get_method(name: str) -> Method:
    """The method of that name (``peer/method`` for a peer's); ``UsageError`` with near matches otherwise."""
    if is_foreign(name):
        from veloxbench.methods.peers import peer_method  # it makes methods, and so stands on this module

        return peer_method(name)
    if name not in _REGISTRY:  # a peer's worker has the reference alone, without the packages of the others
        all_methods()
    if name not in _REGISTRY:
        raise unknown_name("method", name, _REGISTRY)
    return _REGISTRY[name]


def is_foreign(name: str) -> bool:
    """Whether a method of that name is a peer's, to be measured in the peer's own environment."""
    return "/" in name


def checked(arm: Arm) -> Arm:
    """The arm without parameters that are the method's defaults.

    Raises:
        UsageError: unknown method or parameter, or a target that the method cannot meet.
    """
    method = get_method(arm.name)
    defaults = method.parameter_defaults()
    for key, value in arm.parameters.items():
        if key not in defaults and not method.takes_any:
            raise (
                unknown_name(f"parameter of {arm.name}", key, defaults)
                if defaults
                else UsageError(f"{arm.name} has no parameters, but {key}={value} was given")
            )
    if (arm.target is None) != (method.targets is None):
        problem = "needs a target" if arm.target is None else f"has no targets, but {arm.target:g} was given"
        raise UsageError(f"{arm.name} {problem}")
    if arm.target is not None and method.targets is not None and arm.target not in method.targets:
        reachable = ", ".join(f"{target:g}" for target in method.targets)
        raise UsageError(f"{arm.name} cannot meet target {arm.target:g} ({method.target_means}); it has {reachable}")
    given = {key: value for key, value in arm.parameters.items() if key not in defaults or value != defaults[key]}
    return Arm(name=arm.name, target=arm.target, parameters=given)


def reference_of(arm: Arm) -> MethodRef:
    """The arm as it stands in a record's key: with what its target means and which code implements it."""
    method = get_method(arm.name)
    return MethodRef(**arm.model_dump(), target_means=method.target_means, implementation=method.implementation())


def build(context: BuildContext, arm: Arm) -> tuple[list[CacheUnderTest], list[bool]]:
    """The arm's caches, wrapped, and for each layer whether the method claims to hold it.

    Raises:
        UsageError: the model has no attention layer that the method can hold.
    """
    method = get_method(arm.name)
    caches = method.factory(context, arm.target, **{**method.parameter_defaults(), **arm.parameters})
    claimed = [isinstance(cache, method.cache_classes) for cache in caches]
    if not any(claimed):
        kinds = ", ".join(sorted({type(cache).__name__ for cache in caches}))
        raise UsageError(
            f"{arm.name}: the model has no standard attention layers that it can hold (its caches: {kinds})"
        )
    under_test = ForeignUnderTest if is_foreign(arm.name) else CacheUnderTest
    return [under_test(cache) for cache in caches], claimed


def plain_caches(model: Module, replace: Callable[[int], Any]) -> list[Any]:
    """The model's own caches, each plain ``KVCache`` replaced by ``replace(layer)``."""
    own = make_prompt_cache(model)
    return [replace(layer) if type(cache) is KVCache else cache for layer, cache in enumerate(own)]


def probe(context: BuildContext, arm: Arm) -> str | None:
    """Feed two tokens, one at a time, through the arm; the reason if a foreign implementation refuses them."""
    method = get_method(arm.name)
    caches, _ = build(context, arm)
    try:
        for token in (0, 1):
            logits = context.model(mx.array([[token]]), cache=caches)
            mx.eval(logits, [arrays_of(cache) for cache in caches])
    except (ValueError, RuntimeError, TypeError) as error:
        if method.foreign is None:
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"not supported by {method.foreign}: {first}"
    return None


def geometry(caches: Sequence[CacheUnderTest], model: Module) -> list[Geometry | None]:
    """The stored shape of each attention layer, None for layers of another kind; one token is fed to read it."""
    own = [CacheUnderTest(cache) for cache in make_prompt_cache(model)]
    mx.eval(model(mx.array([[0]]), cache=own))
    shapes: list[Geometry | None] = []
    for cache in own:
        keys, values = getattr(cache.inner, "keys", None), getattr(cache.inner, "values", None)
        if isinstance(keys, mx.array) and isinstance(values, mx.array):
            shapes.append(Geometry(keys.shape[1], keys.shape[-1], values.shape[-1]))
        else:
            shapes.append(None)
    return shapes
