"""The transforms of a whole model's layers, where they come from, and their part of a calibration's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxquant_mlx.allocators.sensitivity import model_sha256
from veloxquant_mlx.transforms.klt import LayerKLT, Scope

LINE_CHARACTERS: Final = 40
"""Lines at least this long are compared when calibration and evaluation text are to share nothing."""


@dataclass(frozen=True)
class KLTProvenance:
    """Where a calibration came from.

    Attributes:
        model_sha256: of the parameters' names, dtypes and bytes.
        model_type: the model's own name of its architecture.
        tokens_sha256: of the token sequences, gradients' then vectors'.
        gradient_tokens: tokens of the sequences that gradients were taken on.
        vector_tokens: tokens whose vectors were collected.
        seconds: that the calibration took.
        settings: how sequences were cut.
    """

    model_sha256: str
    model_type: str
    tokens_sha256: str
    gradient_tokens: int
    vector_tokens: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check_model(self, model: Module, *, sha256: str | None = None) -> None:
        """Refuse another model than the calibration's.

        Args:
            model: about to be served.
            sha256: its :func:`model_sha256` where the caller has it (it takes a pass over the weights).

        Raises:
            ValueError: another model, or one whose caches are not those of the calibration.
        """
        digest = model_sha256(model) if sha256 is None else sha256
        if digest != self.model_sha256:
            raise ValueError(
                f"the calibration is of a {self.model_type} model with hash "
                f"{self.model_sha256[:12]}, this model's is {digest[:12]}: calibrate it"
            )


@dataclass(frozen=True, eq=False)
class KLTCalibration:
    """The transforms of a model's layers.

    Attributes:
        scope: what shares a transform.
        step: the operating step in √nats; other steps work, the forecast from below is fitted to this one.
        layers: one for every layer with a KV cache, in the model's order, which is the order of prediction.
        provenance: model, text and settings.
        line_hashes: ``[n]`` uint64, of the lines of all texts that were given (:meth:`shared_lines`).
    """

    scope: Scope
    step: float
    layers: tuple[LayerKLT, ...]
    provenance: KLTProvenance
    line_hashes: NDArray[np.uint64]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tables: static, whatever is cached."""
        return sum(layer.nbytes for layer in self.layers)

    def static_bits_per_value(self, tokens: int) -> float:
        """What the tables add to a value of a cache of ``tokens`` tokens of one sequence."""
        return 8 * self.nbytes / (tokens * sum(layer.shape.size for layer in self.layers))

    def shared_lines(self, text: str) -> list[str]:
        """Lines of ``text`` that the calibration has seen: what an evaluation must not contain."""
        known = set(self.line_hashes.tolist())
        return [line for line in text.splitlines() if (h := _line_hash(line)) is not None and h in known]

    def parts(self) -> tuple[dict[str, mx.array], dict[str, str]]:
        """Arrays and metadata of its file."""
        arrays = {f"{layer.layer}.{name}": a for layer in self.layers for name, a in layer.arrays().items()}
        arrays["line_hashes"] = mx.array(self.line_hashes)
        metadata = {
            "scope": self.scope,
            "step": repr(self.step),
            "layers": json.dumps([layer.description() for layer in self.layers]),
            "provenance": json.dumps(asdict(self.provenance)),
        }
        return arrays, metadata

    @classmethod
    def from_parts(cls, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> Self:
        """The calibration of what :meth:`parts` gave.

        Raises:
            KeyError: something is missing.
        """
        layers = tuple(
            LayerKLT.from_arrays(_under(arrays, f"{description['layer']}."), description)
            for description in json.loads(metadata["layers"])
        )
        scope: Any = metadata["scope"]
        return cls(
            scope=scope,
            step=float(metadata["step"]),
            layers=layers,
            provenance=KLTProvenance(**json.loads(metadata["provenance"])),
            line_hashes=np.array(arrays["line_hashes"]),
        )


def _under(arrays: Mapping[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def arrays_sha256(arrays: Mapping[str, mx.array]) -> str:
    """Hash of arrays with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = mx.contiguous(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.array(array.view(mx.uint8)).data if array.size else b"")
    return digest.hexdigest()


def _line_hash(line: str) -> int | None:
    """64 bits of a line's hash, spaces at its ends and case aside; None for one too short to say anything."""
    line = " ".join(line.lower().split())
    if len(line) < LINE_CHARACTERS:
        return None
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "little")


def text_line_hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Sorted hashes of the lines of at least :data:`LINE_CHARACTERS` characters."""
    hashes = {h for text in texts for line in text.splitlines() if (h := _line_hash(line)) is not None}
    return np.array(sorted(hashes), dtype=np.uint64)


def source_below(layer: int, windows: Mapping[int, int | None]) -> int | None:
    """The layer that another is predicted from: the nearest one below whose cache keeps every token of its own.

    A layer with full attention is predicted from one with full attention, a sliding one from any whose window is at
    least as long; shapes may differ.
    """
    own = windows[layer]
    lower = [i for i, size in windows.items() if i < layer and (size is None or (own is not None and size >= own))]
    return max(lower, default=None)
