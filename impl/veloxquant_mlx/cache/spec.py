"""How one attention layer is stored: its quantizers, what stays in fp16, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from veloxquant_mlx.cache.sides import SidesStore
from veloxquant_mlx.cache.store import StorageSpec
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.quantizers.base import Coding, Quantizer, quantizer_from_spec
from veloxquant_mlx.quantizers.mixed import MixedQuantizer


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is stored.

    Attributes:
        keys: quantizer of the keys.
        values: quantizer of the values.
        sinks: first tokens kept in fp16 (0 on sliding-window layers, whose first tokens leave).
        window: last tokens kept in fp16.
        max_size: sliding window of the layer in tokens, None for full attention.
        outlier_keys: quantizer of the keys of flagged tokens, None without an outlier observer.
        outlier_values: likewise of their values.
        layer: index of the layer, for observers.
    """

    keys: Quantizer
    values: Quantizer
    sinks: int = 0
    window: int = 0
    max_size: int | None = None
    outlier_keys: Quantizer | None = None
    outlier_values: Quantizer | None = None
    layer: int = 0

    def __post_init__(self) -> None:
        for name in ("sinks", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
        if self.max_size is not None and self.sinks:
            raise ValueError(f"sinks must be 0 on a sliding-window layer, got {self.sinks}")
        if (self.outlier_keys is None) != (self.outlier_values is None):
            raise ValueError("outlier_keys and outlier_values go together")

    def new_store(
        self, outlier_observer: KeyNormObserver | None = None, distortion_observer: DistortionObserver | None = None
    ) -> SidesStore:
        """An empty storage of this kind."""
        return SidesStore(self, outlier_observer, distortion_observer)

    def expected_nbytes(
        self, tokens: int, *, n_batch: int = 1, n_kv_heads: int = 1, key_dim: int, value_dim: int
    ) -> int:
        """Bytes in use after ``tokens`` tokens were appended (none trimmed), from the quantizers' formulas alone.

        Raises:
            ValueError: the bytes also depend on the data (adaptive widths, outliers):
                :meth:`PackedSequence.formula_nbytes` knows them.
        """
        if self.outlier_keys is not None or isinstance(self.keys, MixedQuantizer):
            raise ValueError("adaptive widths and outliers make the bytes depend on the data; see formula_nbytes")
        per_head = Fraction(0)
        for quantizer, head_dim in ((self.keys, key_dim), (self.values, value_dim)):
            exact, coded = Coding.of(quantizer).exact_and_coded(
                tokens, sinks=self.sinks, window=self.window, max_size=self.max_size
            )
            per_head += exact * head_dim * 2
            per_head += coded * head_dim * quantizer.bits_per_value(head_dim) / 8 if head_dim else 0
        return int(per_head * n_batch * n_kv_heads)

    def to_json(self) -> str:
        """This spec as JSON text, for saved caches."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps({k: v.spec() if isinstance(v, Quantizer) else v for k, v in fields.items()})

    @staticmethod
    def from_json(text: str) -> LayerSpec:
        """The inverse of :meth:`to_json`."""
        fields: dict[str, Any] = {
            key: quantizer_from_spec(value) if isinstance(value, Mapping) else value
            for key, value in json.loads(text).items()
        }
        return LayerSpec(**fields)


def spec_from_json(text: str) -> StorageSpec:
    """The spec, of whatever storage, that wrote ``text`` into a saved cache.

    Raises:
        ValueError: a calibration that the caches were coded with cannot be had.
    """
    if "calibration_sha256" in json.loads(text):
        from veloxquant_mlx.cache.coded import CodedSpec  # imported here: its artefact builds caches

        return CodedSpec.from_json(text)
    return LayerSpec.from_json(text)
