"""How much the loss of a model minds an error in each head's keys and values, from gradients.

The weight of a head is ``w = E[(1/T) Σ_t ‖∂L/∂k_t‖²]`` (RateQuant, arXiv 2605.06675, §3), likewise for its
values, with L the summed negative log-likelihood of a sequence of T tokens. To second order, an isotropic
error of mean square D per coordinate raises the loss by ``w·D/2`` nats per token; allocators minimise that.

Gradients run through the unedited model: :class:`ProbeCache` takes the place of its caches and adds a zero δ
to keys and values in ``update_and_fetch``; the derivative with respect to δ is the gradient wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.losses import cross_entropy
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from rich.progress import track

from veloxquant_mlx.files import reading
from veloxquant_mlx.hook import own_caches
from veloxquant_mlx.probes import ProbeCache, attention_part, probe_layers, probed_caches

Floats = NDArray[np.float64]
KINDS = ("keys", "values")


@dataclass(frozen=True)
class Provenance:
    """Where sensitivities came from: enough to tell two of them apart, and to repeat them.

    Attributes:
        model_sha256: of the parameters' names, dtypes and bytes.
        text_sha256: of the token sequences that were run.
        num_samples: sequences.
        seq_len: tokens of each, a leading BOS included.
        model_type: the model's own name of its architecture.
        n_layers: caches of the model, quantizable or not.
    """

    model_sha256: str
    text_sha256: str
    num_samples: int
    seq_len: int
    model_type: str
    n_layers: int


@dataclass(frozen=True, eq=False)
class HeadSensitivities:
    """Keys or values of one layer.

    Attributes:
        layer: index of the layer's cache.
        kind: ``keys`` or ``values``.
        squared_gradients: ``[S, H, T]`` ‖∂L/∂x_t‖² of every token of the S calibration sequences.
        vectors: ``[S', H, T, D]`` fp16, what the model cached on the first S' of them.
        gradients: ``[S', H, T, D]`` bf16, ∂L/∂x of the same tokens.
        max_size: the layer's sliding window in tokens, None for full attention.
    """

    layer: int
    kind: str
    squared_gradients: Floats
    vectors: mx.array
    gradients: mx.array
    max_size: int | None = None

    @property
    def weights(self) -> Floats:
        """``[S, H]``: (1/T) Σ_t ‖∂L/∂x_t‖² of each sequence; their mean over S is RateQuant's w."""
        return np.asarray(self.squared_gradients.mean(axis=-1))

    @property
    def n_kv_heads(self) -> int:
        """Heads of the layer's cache."""
        return int(self.vectors.shape[1])

    @property
    def head_dim(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[3])


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """Gradient weights of every head of a model, with a sample of the keys and values they belong to.

    Attributes:
        heads: two entries per layer that has a KV cache, keys then values, in the model's order.
        provenance: model, text and sizes.
    """

    heads: tuple[HeadSensitivities, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        for entry in self.heads:
            squares = entry.squared_gradients
            bad = np.argwhere(~(np.isfinite(squares) & (squares >= 0)))
            if bad.size:
                raise ValueError(
                    f"sensitivity of layer_{entry.layer}.{entry.kind}.head_{bad[0][1]} must be finite and not "
                    f"negative, got {squares[tuple(bad[0])]}"
                )

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a KV cache."""
        return tuple(dict.fromkeys(entry.layer for entry in self.heads))

    def save(self, path: str | Path) -> None:
        """Write everything to one ``.safetensors`` file."""
        arrays: dict[str, mx.array] = {}
        for entry in self.heads:
            name = f"{entry.layer}.{entry.kind}"
            arrays[f"{name}.squared_gradients"] = mx.array(entry.squared_gradients.astype(np.float32))
            arrays[f"{name}.vectors"], arrays[f"{name}.gradients"] = entry.vectors, entry.gradients
        metadata = {
            "provenance": json.dumps(asdict(self.provenance)),
            "max_sizes": json.dumps({str(entry.layer): entry.max_size for entry in self.heads}),
        }
        mx.save_safetensors(str(path), arrays, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, or holds no sensitivities.
        """
        with reading(path, "sensitivities"):
            loaded: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = loaded
            mx.eval(arrays)  # whatever happens to the file
            names = {tuple(name.split(".")[:2]) for name in arrays}
            max_sizes = json.loads(metadata["max_sizes"])
            heads = tuple(
                HeadSensitivities(
                    layer=int(layer),
                    kind=kind,
                    squared_gradients=np.array(arrays[f"{layer}.{kind}.squared_gradients"], dtype=np.float64),
                    vectors=arrays[f"{layer}.{kind}.vectors"],
                    gradients=arrays[f"{layer}.{kind}.gradients"],
                    max_size=max_sizes[layer],
                )
                for layer, kind in sorted(names, key=lambda name: (int(name[0]), name[1]))
            )
            return cls(heads, Provenance(**json.loads(metadata["provenance"])))


def model_sha256(model: Module) -> str:
    """Hash of all parameters: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore
    for name, value in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.array(mx.contiguous(value).view(mx.uint8)).data)
    return digest.hexdigest()


@cache
def bundled_texts() -> tuple[str, ...]:
    """The default calibration text: excerpts of nine public-domain books in English, about 55 kB."""
    text = resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    return tuple(part.strip() for part in text.split("\n* * *\n"))


def calibration_sequences(tokenizer: Any, texts: Iterable[str], *, num_samples: int, seq_len: int) -> NDArray[np.int32]:
    """Cut texts into sequences, evenly spaced over all of them.

    Args:
        tokenizer: with transformers' ``encode``; a BOS that it prepends is put before every sequence.
        texts: documents; a sequence never spans two of them.
        num_samples: sequences wanted.
        seq_len: tokens of each, BOS included.

    Returns:
        ``[num_samples, seq_len]`` token ids.

    Raises:
        ValueError: sizes below 1 and 2, or texts too short, naming how many sequences they hold.
        TypeError: one string in place of several.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of documents, got one string: pass [text]")
    if num_samples < 1 or seq_len < 2:
        raise ValueError(f"num_samples={num_samples} and seq_len={seq_len} must be at least 1 and 2")
    bos = getattr(tokenizer, "bos_token_id", None)
    chunks: list[list[int]] = []
    for text in texts:
        tokens = list(tokenizer.encode(text, verbose=False))  # a document may be longer than the context
        prefix = tokens[:1] if bos is not None and tokens[:1] == [bos] else []
        body, step = tokens[len(prefix) :], seq_len - len(prefix)
        chunks += [prefix + body[i : i + step] for i in range(0, len(body) - step + 1, step)]
    if len(chunks) < num_samples:
        raise ValueError(f"num_samples={num_samples}: texts hold only {len(chunks)} sequences of {seq_len} tokens")
    picked = np.linspace(0, len(chunks), num_samples, endpoint=False).astype(int)
    return np.array([chunks[i] for i in picked], dtype=np.int32)


def sequence_loss(
    model: Module,
    tokens: mx.array,
    deltas: Sequence[tuple[mx.array, mx.array]] | None,
    layers: Sequence[int],
) -> tuple[mx.array, list[tuple[mx.array, mx.array]]]:
    """Summed negative log-likelihood of one sequence, with errors added to its cached keys and values.

    Args:
        model: an mlx-lm model.
        tokens: ``[T]`` ids.
        deltas: for each of ``layers`` the errors ``[1, H, T, D]`` of keys and values; absent for none.
        layers: indices of the caches to probe.

    Returns:
        The loss in nats (a scalar, fp32), and for each layer the keys and values ``[1, H, T, D]`` before the
        errors.
    """
    probes = [ProbeCache(delta) for delta in (deltas if deltas is not None else [None] * len(layers))]
    caches = probed_caches(model, dict(zip(layers, probes, strict=True)))
    logits = model(tokens[None], cache=caches)[0, :-1].astype(mx.float32)
    loss = cross_entropy(logits, tokens[1:], reduction="sum")
    seen = []
    for layer, probe in zip(layers, probes, strict=True):
        if probe.seen is None:
            raise ValueError(f"layer {layer} of the model never called update_and_fetch")
        seen.append(probe.seen)
    return loss, seen


def sequence_gradients(model: Module, tokens: mx.array, layers: Sequence[int]) -> tuple[list[mx.array], list[mx.array]]:
    """Cached vectors of one sequence and the gradients of :func:`sequence_loss` with respect to them.

    Args:
        model: an mlx-lm model.
        tokens: ``[T]`` ids.
        layers: indices of the caches to probe.

    Returns:
        Keys and values of each of ``layers`` in turn, ``[1, H, T, D]``, and the fp32 gradients in the same order.
    """
    _, shapes = sequence_loss(model, tokens[:2], None, layers)
    # fp32 zeros: gradients arrive in fp32 even where the model computes in fp16.
    deltas = [tuple(mx.zeros((*x.shape[:2], tokens.size, x.shape[3])) for x in pair) for pair in shapes]

    def loss_of(deltas: Any) -> tuple[mx.array, list[tuple[mx.array, mx.array]]]:
        return sequence_loss(model, tokens, deltas, layers)

    (_, seen), gradients = mx.value_and_grad(loss_of)(deltas)
    return [x for pair in seen for x in pair], [g for pair in gradients for g in pair]


def calibrate_layer_sensitivities(
    model: Module,
    tokenizer: Any,
    num_samples: int = 32,
    *,
    seq_len: int = 256,
    texts: Iterable[str] | None = None,
    kept_sequences: int | None = None,
    quiet: bool = False,
) -> Sensitivities:
    """Measure, by gradients, how much the loss minds errors in every head's keys and values.

    One forward and one backward pass per sequence through the unedited model. Source: RateQuant (arXiv
    2605.06675), §3, which uses 16 sequences of 512 tokens.

    Args:
        model: an mlx-lm model; quantized weights are fine.
        tokenizer: its tokenizer.
        num_samples: calibration sequences.
        seq_len: tokens of each.
        texts: documents to calibrate on, best like what will be served; by default :func:`bundled_texts`.
        kept_sequences: how many sequences' keys, values and gradients are kept to measure distortion on;
            absent: up to 16.
        quiet: no progress bar.

    Returns:
        Squared gradients per head and token, keys and values apart, with the kept vectors; ``save`` writes them.

    Raises:
        ValueError: texts too short, a model without a KV cache, a gradient that is not finite (named).
    """
    sequences = calibration_sequences(
        tokenizer, bundled_texts() if texts is None else texts, num_samples=num_samples, seq_len=seq_len
    )
    layers = probe_layers(model)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no layer with a KV cache")
    kept_sequences = min(16, num_samples) if kept_sequences is None else kept_sequences
    if not 1 <= kept_sequences <= num_samples:
        raise ValueError(f"kept_sequences={kept_sequences} must lie in 1..num_samples={num_samples}")
    # The kept ones first, evenly spaced over the texts.
    kept_rows = np.linspace(0, num_samples, kept_sequences, endpoint=False).astype(int)
    sequences = np.concatenate([sequences[kept_rows], np.delete(sequences, kept_rows, axis=0)])
    own = [attention_part(cache) for cache in own_caches(model)]
    max_sizes = [getattr(own[layer], "max_size", None) for layer in layers]
    squares: list[list[mx.array]] = [[] for _ in range(2 * len(layers))]
    kept: list[list[tuple[mx.array, mx.array]]] = [[] for _ in range(2 * len(layers))]
    for index, sequence in enumerate(track(sequences, "calibrating", disable=quiet)):
        vectors, gradients = sequence_gradients(model, mx.array(sequence), layers)
        for slot, (x, g) in enumerate(zip(vectors, gradients, strict=True)):
            squares[slot].append(mx.sum(mx.square(g[0]), axis=-1))
            if index < kept_sequences:
                kept[slot].append((x[0].astype(mx.float16), g[0].astype(mx.bfloat16)))
        mx.eval(squares, kept)
    heads = tuple(
        HeadSensitivities(
            layer=layer,
            kind=kind,
            squared_gradients=np.stack([np.array(s, dtype=np.float64) for s in squares[2 * i + j]]),
            vectors=mx.stack([x for x, _ in kept[2 * i + j]]),
            gradients=mx.stack([g for _, g in kept[2 * i + j]]),
            max_size=max_sizes[i],
        )
        for i, layer in enumerate(layers)
        for j, kind in enumerate(KINDS)
    )
    provenance = Provenance(
        model_sha256=model_sha256(model),
        text_sha256=hashlib.sha256(sequences.tobytes()).hexdigest(),
        num_samples=num_samples,
        seq_len=seq_len,
        model_type=str(getattr(model, "model_type", type(model).__name__)),
        n_layers=len(own_caches(model)),
    )
    return Sensitivities(heads, provenance)
