"""The calibration of ``fisher_klt``: transforms, steps for each age, entropy tables, and the caches that they make.

What takes minutes, gradients and vectors of a text, is measured once
(:func:`~veloxquant_mlx.calibration.measure.measure_model`) and serves every scope and target;
:func:`~veloxquant_mlx.calibration.fitting.fit_code` fits one.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, RotatingKVCache

from veloxquant_mlx.cache.coded import CodedSpec, CodedStore, Handoff
from veloxquant_mlx.cache.packed import PackedKVCache
from veloxquant_mlx.calibration.klt import KLTCalibration, arrays_sha256
from veloxquant_mlx.codes.deadzone import DeadZone
from veloxquant_mlx.codes.layer import LayerCode, SharedTables, TierCode
from veloxquant_mlx.hook import own_caches
from veloxquant_mlx.transforms.klt import LayerKLT, Scope

FORMAT: Final = "veloxquant-fisher-klt-1"
"""Of the calibration's file."""


@dataclass(frozen=True, eq=False)
class FisherCode:
    """A calibration: makes the caches of a model.

    Attributes:
        klt: the transforms.
        layers: by layer its code.
        sinks: first tokens kept in fp16.
        ages: pairs of an age in tokens and the divisor of the step below it, the oldest first; empty: one step.
        target: bits_per_value that were asked for, None where a step was.
        bits_per_value: realised on held-out calibration vectors at ``at_tokens`` tokens, everything counted.
        at_tokens: context of that figure.
        path: where it lies; None before it is saved.
        handoff: where layers meet of caches that were loaded one by one; caches made together have their own.
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
        _IN_MEMORY.add(self)

    @property
    def step(self) -> float:
        """Of the oldest tokens, in √nats."""
        return self.klt.step

    def spec(self, layer: int, max_size: int | None, handoff: Handoff | None = None) -> CodedSpec:
        """How to store one layer, ``max_size`` its sliding window, ``handoff`` where it meets the others."""
        return CodedSpec(
            calibration_sha256=self.sha256,
            path=self.path,
            layer=layer,
            sinks=0 if max_size is not None else self.sinks,
            ages=tuple(age for age, _ in self.ages),
            max_size=max_size,
            code=self.layers[layer],
            handoff=handoff or self.handoff,
        )

    def caches(self, model: Module, *, weights_sha256: str | None = None) -> list[Any]:
        """One cache per layer of the model, for ``prompt_cache=`` of mlx-lm.

        Args:
            model: the one that was calibrated.
            weights_sha256: its :func:`model_sha256`, or whatever it was calibrated under, where the caller has it.

        Raises:
            ValueError: another model.
        """
        self.klt.provenance.check_model(model, sha256=weights_sha256)
        own = own_caches(model)
        attention = {i for i, cache in enumerate(own) if isinstance(cache, (KVCache, RotatingKVCache))}
        if attention != set(self.layers):
            raise ValueError(
                f"the calibration has {len(self.layers)} layers and the model {len(attention)} that it could code: "
                "it is another model's"
            )
        handoff = Handoff()
        return [
            PackedKVCache(self.spec(i, getattr(cache, "max_size", None), handoff)) if i in self.layers else cache
            for i, cache in enumerate(own)
        ]

    def builder(self, model: Module) -> Callable[[], list[Any]]:
        """What makes a model's caches at every call, the model checked once: for ``veloxquant_mlx.attach``.

        Raises:
            ValueError: another model.
        """
        self.klt.provenance.check_model(model)
        return partial(self.caches, model, weights_sha256=self.klt.provenance.model_sha256)

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


_IN_MEMORY: Final[weakref.WeakSet[FisherCode]] = weakref.WeakSet()
"""Every calibration that somebody holds; two may have one hash, and one of them may go while the other stays."""


def find_calibration(sha256: str, path: str | None) -> FisherCode:
    """The calibration of a saved cache: one in memory, or its file.

    Raises:
        ValueError: it cannot be had, or another one lies there.
    """
    for known in list(_IN_MEMORY):
        if known.sha256 == sha256:
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
