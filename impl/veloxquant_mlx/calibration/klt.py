"""Calibration of the Fisher-weighted transform over a whole model, and the file that holds it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from veloxquant_mlx.allocators.sensitivity import bundled_texts, calibration_sequences, model_sha256
from veloxquant_mlx.calibration.fit import FP16_TABLES, FittedLayer, TableBits, fit_layer
from veloxquant_mlx.calibration.gradients import DEFAULT_SPLIT, Split, fisher_matrices, window_sizes
from veloxquant_mlx.calibration.vectors import captured_vectors
from veloxquant_mlx.transforms.klt import SCOPES, CachedShape, LayerKLT, Scope
from veloxquant_mlx.transforms.rope import LayerRopes, probe_ropes

FORMAT: Final = "veloxquant-klt-1"
"""Of the file; a reader refuses any other."""

DEFAULT_STEP: Final = 0.0075
"""The operating step in √nats: about 1.5 bits a value on smollm2-135m with scope ``below``."""

GROUP_NBYTES: Final = 2 << 30
"""Fisher matrices, gradients and vectors of a group of layers stay below this; further groups take further passes."""

LINE_CHARACTERS: Final = 40
"""Lines at least this long are compared when calibration and evaluation text are to share nothing."""


@dataclass(frozen=True)
class Progress:
    """How far a calibration is.

    Attributes:
        stage: ``gradients``, ``vectors`` or ``fit``.
        done: work done so far, as a part of all.
        seconds: since the start.
    """

    stage: str
    done: float
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """Estimate of what is left, None before anything is done."""
        return None if self.done <= 0 else self.seconds * (1 - self.done) / self.done


OnProgress = Callable[[Progress], None]
OnLayer = Callable[[FittedLayer], None]


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
        settings: scope, step, epsilon, split and bits.
    """

    model_sha256: str
    model_type: str
    tokens_sha256: str
    gradient_tokens: int
    vector_tokens: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)


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

    @cached_property
    def by_layer(self) -> Mapping[int, LayerKLT]:
        """Transforms by index of the model's caches."""
        return {layer.layer: layer for layer in self.layers}

    def static_bits_per_value(self, tokens: int) -> float:
        """What the tables add to a value of a cache of ``tokens`` tokens of one sequence."""
        return 8 * self.nbytes / (tokens * sum(layer.shape.size for layer in self.layers))

    def shared_lines(self, text: str) -> list[str]:
        """Lines of ``text`` that the calibration has seen: what an evaluation must not contain."""
        known = set(self.line_hashes.tolist())
        return [line for line in text.splitlines() if (h := _line_hash(line)) is not None and h in known]

    def check_model(self, model: Module, *, sha256: str | None = None) -> None:
        """Refuse another model than the calibration's.

        Args:
            model: about to be served.
            sha256: its :func:`model_sha256` where the caller has it (it takes a pass over the weights).

        Raises:
            ValueError: another model, or one whose caches are not those of the calibration.
        """
        digest = model_sha256(model) if sha256 is None else sha256
        if digest != self.provenance.model_sha256:
            raise ValueError(
                f"the calibration is of a {self.provenance.model_type} model with hash "
                f"{self.provenance.model_sha256[:12]}, this model's is {digest[:12]}: calibrate it"
            )

    def save(self, path: str | Path) -> None:
        """Write one ``.safetensors`` file, to :meth:`load`."""
        mx.save_safetensors(str(path), *self.parts())

    def parts(self) -> tuple[dict[str, mx.array], dict[str, str]]:
        """Arrays and metadata of its file."""
        arrays = {f"{layer.layer}.{name}": a for layer in self.layers for name, a in layer.arrays().items()}
        arrays["line_hashes"] = mx.array(self.line_hashes)
        metadata = {
            "format": FORMAT,
            "scope": self.scope,
            "step": repr(self.step),
            "layers": json.dumps([layer.description() for layer in self.layers]),
            "provenance": json.dumps(asdict(self.provenance)),
            "arrays_sha256": arrays_sha256(arrays),
        }
        return arrays, metadata

    @classmethod
    def load(cls, path: str | Path, *, scope: Scope | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            scope: refuse a calibration of another scope.

        Raises:
            ValueError: not such a file, damaged, another version or scope, in one sentence.
        """
        try:
            loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
            arrays, metadata = loaded
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no calibration of this version ({FORMAT})")
            if metadata["arrays_sha256"] != arrays_sha256(arrays):
                raise ValueError(f"{path} is damaged: its tables do not have the hash it states; calibrate again")
            made = cls.from_parts(arrays, metadata)
        except FileNotFoundError:
            raise
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or no calibration: {error}") from error
        if scope is not None and made.scope != scope:
            raise ValueError(f"{path} is a calibration of scope {made.scope!r}, not {scope!r}")
        return made

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


def _groups(sizes: Mapping[int, int], gradient_rows: int, vector_rows: int) -> list[list[int]]:
    """Layers in the model's order, as many at a time as :data:`GROUP_NBYTES` holds."""
    groups: list[list[int]] = [[]]
    held = 0
    for layer, size in sizes.items():
        needed = 4 * (3 * size * size + 4 * gradient_rows * size + 3 * vector_rows * size)
        if groups[-1] and held + needed > GROUP_NBYTES:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += needed
    return groups


class _Meter:
    """Turns steps of work into calls with a share and the time since the start."""

    def __init__(self, total: float, on_progress: OnProgress | None) -> None:
        self.total, self.on_progress = total, on_progress
        self.done, self.start = 0.0, time.monotonic()

    def step(self, stage: str, work: float) -> None:
        self.done += work
        if self.on_progress is not None:
            self.on_progress(Progress(stage, min(1.0, self.done / self.total), time.monotonic() - self.start))


GRADIENT_WORK: Final = 6.0
VECTOR_WORK: Final = 1.0
FIT_WORK: Final = 2.0
"""Work of one gradient sequence, one sequence of vectors and one layer's fit, in about the same unit."""


def calibrate_klt(
    model: Module,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    *,
    scope: Scope = "below",
    step: float = DEFAULT_STEP,
    gradient_sequences: int = 18,
    vector_sequences: int = 24,
    split: Split = DEFAULT_SPLIT,
    epsilon: float = 0.1,
    bits: TableBits = FP16_TABLES,
    on_layer: OnLayer | None = None,
    on_progress: OnProgress | None = None,
    weights_sha256: str | None = None,
) -> KLTCalibration:
    """Fit the transforms of a model's layers.

    Two kinds of passes over the model (:func:`~veloxquant_mlx.calibration.gradients.fisher_matrices`,
    :func:`~veloxquant_mlx.calibration.vectors.captured_vectors`) and a fit of each layer, in groups of layers whose
    matrices fit :data:`GROUP_NBYTES`.

    Args:
        model: an mlx-lm model; quantized weights are fine.
        tokenizer: its tokenizer.
        texts: long texts to calibrate on, best a mix like what will be served and none that is evaluated; sequences
            are cut from each. Absent: the bundled books, which are too short for the default counts.
        scope: ``head``, ``layer`` or ``below``.
        step: the operating step in √nats, where layers are decoded to predict the next.
        gradient_sequences: of ``split.tokens`` tokens; one forward pass and two backward ones each.
        vector_sequences: of as many tokens; one forward pass each.
        split: how gradients cut a sequence.
        epsilon: regularisation of Fisher matrices.
        bits: of the tables.
        on_layer: is handed each fitted layer, with its coefficients, in the model's order: to fit codes to.
        on_progress: is told how far it is.
        weights_sha256: :func:`model_sha256` of the model, where the caller has it.

    Raises:
        TypeError: one string in place of several texts.
        ValueError: a scope or number out of range, texts too short, a rope that cannot be probed, a model without KV
            caches, numbers that are not finite, naming the layer.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"step must be finite and above 0, got {step!r}")
    if not (np.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be finite and above 0, got {epsilon!r}")
    start = time.monotonic()
    ropes = probe_ropes(model)
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of documents, got one string: pass [text]")
    documents = list(bundled_texts() if texts is None else texts)
    sequences = calibration_sequences(
        tokenizer,
        documents,
        num_samples=gradient_sequences + vector_sequences,
        seq_len=split.tokens,
    )
    # Both kinds spread over all texts.
    chosen = np.zeros(len(sequences), dtype=bool)
    chosen[np.linspace(0, len(sequences), gradient_sequences, endpoint=False).astype(int)] = True
    for_gradients, for_vectors = sequences[chosen], sequences[~chosen]
    layers = list(ropes)
    windows = window_sizes(model, layers)
    sizes = {layer: shape.size for layer, shape in cached_shapes(model, layers).items()}
    groups = _groups(sizes, split.prefix, for_vectors.size)
    passes = GRADIENT_WORK * gradient_sequences + VECTOR_WORK * vector_sequences
    meter = _Meter(len(groups) * passes + FIT_WORK * len(layers), on_progress)
    made: list[LayerKLT] = []
    decoded: dict[int, NDArray[np.float32]] = {}
    for group in groups:
        fishers = fisher_matrices(
            model,
            for_gradients,
            group,
            ropes,
            split=split,
            on_sequence=lambda: meter.step("gradients", GRADIENT_WORK),
        )
        vectors = captured_vectors(
            model, for_vectors, group, ropes, on_sequence=lambda: meter.step("vectors", VECTOR_WORK)
        )
        for layer in group:
            shape, x = vectors.pop(layer)
            source = source_below(layer, windows) if scope == "below" else None
            fitted = fit_layer(
                layer,
                shape,
                ropes[layer],
                fishers.pop(layer),
                x,
                scope=scope,
                step=step,
                below=None if source is None else (source, decoded[source]),
                epsilon=epsilon,
                bits=bits,
            )
            made.append(fitted.transform)
            if on_layer is not None:
                on_layer(fitted)
            decoded[layer] = fitted.decoded
            needed = {source_below(later, windows) for later in layers if later > layer}
            decoded = {i: d for i, d in decoded.items() if i in needed}
            meter.step("fit", FIT_WORK)
    provenance = KLTProvenance(
        model_sha256=model_sha256(model) if weights_sha256 is None else weights_sha256,
        model_type=str(getattr(model, "model_type", type(model).__module__.rsplit(".", 1)[-1])),
        tokens_sha256=hashlib.sha256(
            for_gradients.astype("<i4").tobytes() + for_vectors.astype("<i4").tobytes()
        ).hexdigest(),
        gradient_tokens=int(for_gradients.size),
        vector_tokens=int(for_vectors.size),
        seconds=round(time.monotonic() - start, 1),
        settings={"epsilon": epsilon, "split": asdict(split), "bits": asdict(bits)},
    )
    return KLTCalibration(scope, step, tuple(made), provenance, text_line_hashes(documents))


def cached_shapes(model: Module, layers: Sequence[int]) -> dict[int, CachedShape]:
    """What each layer caches, by one token's pass that is never evaluated."""
    caches = make_prompt_cache(model)
    model(mx.array([[0]]), cache=caches)
    shapes: dict[int, CachedShape] = {}
    for layer in layers:
        inner = getattr(caches[layer], "caches", [caches[layer]])
        part = next(p for p in inner if getattr(p, "keys", None) is not None)
        shapes[layer] = CachedShape.of(part.keys, part.values)
    return shapes


__all__ = ["KLTCalibration", "KLTProvenance", "LayerRopes", "Progress", "calibrate_klt", "text_line_hashes"]
