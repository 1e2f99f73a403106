"""What a text says of a model, measured once for every scope and target: gradients and vectors of its layers."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from veloxquant_mlx.allocators.sensitivity import bundled_texts, calibration_sequences, model_sha256
from veloxquant_mlx.calibration.gradients import DEFAULT_SPLIT, Split, fisher_matrices, window_sizes
from veloxquant_mlx.calibration.klt import KLTProvenance, text_line_hashes
from veloxquant_mlx.calibration.vectors import captured_vectors
from veloxquant_mlx.hook import own_caches
from veloxquant_mlx.transforms.klt import CachedShape
from veloxquant_mlx.transforms.rope import LayerRopes, probe_ropes

HELD_OUT: Final = 2
"""Sequences of vectors that rates are measured on and nothing is fitted to."""

GROUP_NBYTES: Final = 3 << 30
"""Fisher matrices, gradients and vectors of a group of layers stay below this; further groups take further passes."""

GRADIENT_WORK: Final = 10.0
"""Time of a gradient sequence on a CPU, beside that of a sequence of vectors."""


@dataclass(frozen=True)
class Progress:
    """How far a calibration is.

    Attributes:
        stage: ``gradients`` or ``vectors``.
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


@dataclass(frozen=True, eq=False)
class Measurements:
    """What a text says of a model: all that fitting needs.

    Attributes:
        fishers: by layer ``[N, N]``.
        vectors: by layer ``[sequences, tokens, N]``, sinks left out; the last :data:`HELD_OUT` are for rates alone.
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
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no measurements of this model: {error}") from error
        windows = window_sizes(model, list(ropes))
        return cls(fishers, vectors, cached_shapes(model, list(ropes)), ropes, windows, provenance, line_hashes)


def measure_model(
    model: Module,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    *,
    gradient_sequences: int = 10,
    vector_sequences: int = 24,
    split: Split = DEFAULT_SPLIT,
    on_progress: OnProgress | None = None,
    weights_sha256: str | None = None,
) -> Measurements:
    """Gradients and vectors of texts; minutes for a model of 135M parameters.

    Two kinds of passes over the model (:func:`~veloxquant_mlx.calibration.vectors.captured_vectors`,
    :func:`~veloxquant_mlx.calibration.gradients.fisher_matrices`), each in groups of layers whose arrays fit
    :data:`GROUP_NBYTES`.

    Args:
        model: an mlx-lm model; quantized weights are fine.
        tokenizer: its tokenizer.
        texts: long texts to calibrate on, best a mix like what will be served and none that is evaluated; sequences
            are cut from each. Absent: the bundled books, which are too short for the default counts.
        gradient_sequences: of ``split.tokens`` tokens; one forward pass and two backward ones each.
        vector_sequences: of as many tokens; one forward pass each.
        split: how gradients cut a sequence.
        on_progress: is told how far it is.
        weights_sha256: :func:`model_sha256` of the model, where the caller has it.

    Raises:
        TypeError: one string in place of several texts.
        ValueError: texts too short, a rope that cannot be probed, a model without KV caches, numbers that are not
            finite, naming the layer.
    """
    if gradient_sequences < 1:
        raise ValueError(f"gradient_sequences must be at least 1, got {gradient_sequences}")
    if vector_sequences <= HELD_OUT:
        raise ValueError(f"vector_sequences must be above {HELD_OUT}, which are held out, got {vector_sequences}")
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of documents, got one string: pass [text]")
    start = time.monotonic()
    ropes = probe_ropes(model)
    layers = list(ropes)
    documents = list(bundled_texts() if texts is None else texts)
    count = gradient_sequences + vector_sequences
    sequences = calibration_sequences(tokenizer, documents, num_samples=count, seq_len=split.tokens)
    chosen = np.zeros(count, dtype=bool)  # both kinds are spread over all texts
    chosen[np.linspace(0, count, gradient_sequences, endpoint=False).astype(int)] = True
    shapes = cached_shapes(model, layers)
    sizes = {layer: shape.size for layer, shape in shapes.items()}
    vector_groups = _groups({i: 2 * 4 * vector_sequences * split.tokens * size for i, size in sizes.items()})
    gradient_groups = _groups({i: 4 * size * (3 * size + 4 * split.prefix) for i, size in sizes.items()})
    total = len(gradient_groups) * GRADIENT_WORK * gradient_sequences + len(vector_groups) * vector_sequences
    done = 0.0

    def told(stage: str, work: float) -> Callable[[], None]:
        def tell() -> None:
            nonlocal done
            done += work
            if on_progress is not None:
                on_progress(Progress(stage, min(1.0, done / total), time.monotonic() - start))

        return tell

    fishers: dict[int, NDArray[np.floating]] = {}
    vectors: dict[int, NDArray[np.floating]] = {}
    tell = told("vectors", 1.0)
    for group in vector_groups:
        for layer, x in captured_vectors(model, sequences[~chosen], group, ropes, on_sequence=tell).items():
            vectors[layer] = x.reshape(vector_sequences, -1, x.shape[1]).astype(np.float16)
    tell = told("gradients", GRADIENT_WORK)
    for group in gradient_groups:
        for layer, f in fisher_matrices(model, sequences[chosen], group, ropes, split=split, on_sequence=tell).items():
            fishers[layer] = f.astype(np.float32)
    provenance = KLTProvenance(
        model_sha256=model_sha256(model) if weights_sha256 is None else weights_sha256,
        model_type=str(getattr(model, "model_type", type(model).__module__.rsplit(".", 1)[-1])),
        tokens_sha256=hashlib.sha256(sequences.astype("<i4").tobytes()).hexdigest(),
        gradient_tokens=int(sequences[chosen].size),
        vector_tokens=int(sequences[~chosen].size),
        seconds=round(time.monotonic() - start, 1),
        settings={"split": asdict(split)},
    )
    windows = window_sizes(model, layers)
    return Measurements(fishers, vectors, shapes, ropes, windows, provenance, text_line_hashes(documents))


def cached_shapes(model: Module, layers: Sequence[int]) -> dict[int, CachedShape]:
    """What each layer caches, by one token's pass that is never evaluated."""
    caches = own_caches(model)
    model(mx.array([[0]]), cache=caches)
    shapes: dict[int, CachedShape] = {}
    for layer in layers:
        inner = getattr(caches[layer], "caches", [caches[layer]])
        part = next(p for p in inner if getattr(p, "keys", None) is not None)
        shapes[layer] = CachedShape.of(part.keys, part.values)
    return shapes


def _groups(nbytes: Mapping[int, int]) -> list[list[int]]:
    """Layers in the model's order, as many at a time as :data:`GROUP_NBYTES` holds."""
    groups: list[list[int]] = [[]]
    held = 0
    for layer, needed in nbytes.items():
        if groups[-1] and held + needed > GROUP_NBYTES:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += needed
    return groups
