"""Language models by name: real weights, pinned by hash, ready for ``mlx_lm.load``.

A name is one of :func:`known_models`, a directory that mlx-lm can load, or a hub id ``org/name``. Known models are
fetched once (:mod:`veloxbench.inputs.sources`), converted once (:mod:`veloxbench.inputs.gguf`), and then only read:
each time through the hash of every byte, since a record states what was measured on, not what a note says. A converted
model that changed is converted again; :func:`load_model` reads the hash once more, beside the weights themselves.
All are 4-bit weights dequantized to fp32: compare cache methods on them with the same weights' fp16 cache, never with
published perplexities.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_config
from mlx_lm.utils import load_model as mlx_load_model
from mlx_lm.utils import load_tokenizer as mlx_load_tokenizer

from veloxbench.errors import IntegrityError, UnfitEnvironmentError, UsageError, VeloxError, unknown_name
from veloxbench.inputs.gguf import CONVERSION_VERSION, convert_gguf, convert_llama2c
from veloxbench.inputs.sources import (
    REPLACED,
    PinnedFile,
    cache_dir,
    cache_lock,
    catalogue,
    fetch,
    first_line,
    move_into_place,
    path_of,
    pinned_file,
    sha256_of,
    writable_cache,
)
from veloxbench.inputs.transfer_progress import Reporter, default_reporter, step

_HANDLE_FILE = "veloxbench.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_TIMEOUT_S = 5.0
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_MOST_LAYERS = 10_000  # of a config.json that is not damaged
UNKNOWN_CONTEXT = 2**31 - 1  # a config.json that states no length sets no limit


@dataclass(frozen=True)
class ModelHandle:
    """A model on disk, ready for ``mlx_lm.load``.

    ``weights_sha256`` covers the safetensors files in name order, ``tokenizer_sha256`` the tokenizer's files,
    ``config_sha256`` config.json; ``context`` is the longest sequence that the model was made for, in tokens;
    ``licence`` is None where nobody states one (a directory); ``vocabulary`` is the number of tokens that have an
    embedding, None where config.json does not state it.
    """

    name: str
    directory: Path
    weights_sha256: str
    tokenizer_sha256: str
    config_sha256: str
    licence: str | None
    source: str
    context: int
    vocabulary: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A model that is known by name: where its weights are, under which licence, what it is.

    ``weights_nbytes`` is the size of the converted fp32 weights; ``opt_in`` says that the licence must be accepted
    before the first download.
    """

    name: str
    weights: PinnedFile
    licence: str
    licence_url: str
    architecture: str
    context: int
    weights_nbytes: int
    tokenizer: PinnedFile | None = None
    opt_in: bool = False

    @property
    def download_nbytes(self) -> int:
        """Bytes of the files that are kept (the archives around them are a little larger)."""
        return self.weights.nbytes + (self.tokenizer.nbytes if self.tokenizer else 0)

    @property
    def source(self) -> str:
        """Where the weights come from, for people."""
        return self.weights.source

    @property
    def directory(self) -> Path:
        """The converted model's directory, whether it exists yet or not."""
        return cache_dir() / "models" / f"{self.name}-v{CONVERSION_VERSION}"

    @property
    def is_cached(self) -> bool:
        """Whether the converted model is on this machine."""
        return (self.directory / _HANDLE_FILE).is_file()


def known_models() -> Mapping[str, ModelSpec]:
    """The models that are known by name, the default first."""
    return {name: _spec(name, **fields) for name, fields in catalogue("models").items()}


def _spec(name: str, weights: dict[str, Any], tokenizer: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
    pinned = None if tokenizer is None else pinned_file(tokenizer)
    return ModelSpec(name=name, weights=pinned_file(weights), tokenizer=pinned, **fields)


def resolve_model(name: str, *, reporter: Reporter | None = None, accept_licence: bool = False) -> ModelHandle:
    """Find a model, fetching and converting it first when it is not on this machine.

    Args:
        name: a known name, a directory that mlx-lm can load, or a hub id ``org/name``.
        reporter: told about downloads; by default a progress bar (or plain lines) on stderr.
        accept_licence: consent to a licence that asks for it (``ModelSpec.opt_in``); shown and needed only before
            the first download.
    Raises:
        UsageError: an unknown name (near matches listed), a directory that mlx-lm cannot load, a licence not accepted.
        UnfitEnvironmentError: no network, no space.
        IntegrityError: a download that is not the pinned file.
    """
    spec = known_models().get(name)
    if spec is not None:
        return _resolve_known(spec, reporter or default_reporter(), accept_licence)
    directory = path_of(name)
    try:
        there = directory.exists()
        if directory.is_dir():
            directory = directory.resolve()
            return _describe(directory.name, directory, source="local directory", licence=None)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name[:100]!r}: {first_line(error)}") from error
    if _HUB_ID.fullmatch(name) and not there:
        return _resolve_hub(name)
    if there or any(mark in name for mark in (os.sep, "~", "/")):
        raise UsageError(f"model {name!r} is not a directory; it needs config.json and model*.safetensors (mlx-lm)")
    raise unknown_name("model", name, known_models())


def _resolve_known(spec: ModelSpec, reporter: Reporter, accept_licence: bool) -> ModelHandle:
    handle = _converted(spec)
    if handle is not None:
        return handle
    if spec.is_cached:
        reporter.message(f"{spec.directory} is not what was converted any more; {spec.name} is converted again")
    else:
        reporter.message(f"{spec.name}: licence {spec.licence} ({spec.licence_url}); source {spec.source}")
    if spec.opt_in and not accept_licence and not spec.is_cached:
        raise UsageError(
            f"{spec.name} is under the {spec.licence} ({spec.licence_url}); "
            "read them and repeat with --accept-licence to download it"
        )
    with cache_lock(spec.directory.name, reporter):
        handle = _converted(spec)  # another process had the lock and did it
        if handle is None:
            weights = fetch(spec.weights, reporter)
            tokenizer = fetch(spec.tokenizer, reporter) if spec.tokenizer else None
            handle = _convert(spec, weights, tokenizer, reporter)
    return handle


def _converted(spec: ModelSpec) -> ModelHandle | None:
    """The handle of a converted model whose every byte has the hashes that its conversion noted; else None."""
    try:
        noted = json.loads((spec.directory / _HANDLE_FILE).read_text(encoding="utf-8"))
        hashes = _hashes(spec.directory)
        if any(noted[name] != digest for name, digest in hashes.items()):
            return None
        return _handle(spec, hashes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a damaged note says nothing


def _handle(spec: ModelSpec, hashes: Mapping[str, str]) -> ModelHandle:
    """The handle of a converted model, which the program describes, not a note beside it."""
    _, vocabulary = _stated_sizes(spec.directory)
    return ModelHandle(
        name=spec.name,
        directory=spec.directory,
        licence=spec.licence,
        source=spec.source,
        context=spec.context,
        vocabulary=vocabulary,
        **hashes,
    )


def _hashes(directory: Path) -> dict[str, str]:
    """The hashes of a handle, from the bytes."""
    return {
        "weights_sha256": sha256_of(*_weight_files(directory)),
        "tokenizer_sha256": sha256_of(*_tokenizer_files(directory)),
        "config_sha256": sha256_of(directory / "config.json"),
    }


def _convert(spec: ModelSpec, weights: Path, tokenizer: Path | None, reporter: Reporter) -> ModelHandle:
    """Into a directory beside the final one, which then takes its place."""
    unfinished = spec.directory.with_name(spec.directory.name + ".unfinished")
    with writable_cache():
        for left in (unfinished, *spec.directory.parent.glob(f"{REPLACED}*")):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with step(reporter, f"converting {spec.name}", spec.weights_nbytes):
            if weights.suffix == ".gguf":
                convert_gguf(weights, unfinished, reporter, tokenizer_json=tokenizer)
            else:
                convert_llama2c(weights, unfinished, reporter)
        hashes = _hashes(unfinished)
        note = {"name": spec.name, "source": spec.source, "licence": spec.licence, **hashes}
        (unfinished / _HANDLE_FILE).write_text(json.dumps(note, indent=2), encoding="utf-8")
        move_into_place(unfinished, spec.directory)
    return _handle(spec, hashes)


def _resolve_hub(name: str) -> ModelHandle:
    # Imported here: needed only for hub ids.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot = Path(
            snapshot_download(name, allow_patterns=[*DEFAULT_ALLOW_PATTERNS, "README.md"], etag_timeout=_HUB_TIMEOUT_S)
        )
    except GatedRepoError as error:
        raise UsageError(f"hub model {name!r} is gated: accept its licence on the hub and log in") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"the hub has no model {name!r} (or it is private), and it is no directory here") from error
    except (LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise _no_hub(name) from error
    except Exception as error:  # the hub's client changes its transport errors between versions
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "huggingface_hub"):
            raise
        raise _no_hub(name) from error
    _check_blobs(snapshot)
    return _describe(name, snapshot, source=f"hub {name}", licence=_card_licence(snapshot))


def _check_blobs(snapshot: Path) -> None:
    """The hub's cache names a file by its content: by its sha256, or by git's hash of it.

    Raises:
        IntegrityError: a file changed since it was downloaded; says what to delete.
    """
    for file in sorted(snapshot.rglob("*")):
        blob = file.resolve()
        if not file.is_symlink() or not blob.is_file() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue
        if len(blob.name) == 64:
            whole = sha256_of(blob) == blob.name
        else:
            content = blob.read_bytes()
            whole = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
        if not whole:
            raise IntegrityError(f"{file.name} in the hub's cache is damaged: delete {blob} and start again")


def _no_hub(name: str) -> UnfitEnvironmentError:
    return UnfitEnvironmentError(
        f"model {name!r} is no directory here and the hub cannot be reached to download it; "
        f"known offline: {', '.join(known_models())}"
    )


def _card_licence(snapshot: Path) -> str | None:
    """The licence that the model card's front matter declares."""
    card = snapshot / "README.md"
    match = (
        re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.M)
        if card.exists()
        else None
    )
    return match[1] if match else None


def _describe(name: str, directory: Path, *, source: str, licence: str | None) -> ModelHandle:
    """The handle of a directory that someone else made.

    Raises:
        UsageError: what it lacks to be loaded by mlx-lm.
    """
    try:
        odd = [file.name for file in directory.iterdir() if file.exists() and not (file.is_file() or file.is_dir())]
        if odd:
            raise UsageError(f"model directory {directory}: {odd[0]} is no regular file")
        lacks = [
            what
            for what, there in (
                ("config.json", (directory / "config.json").is_file()),
                ("model*.safetensors", bool(_weight_files(directory))),
                ("a tokenizer (tokenizer.json)", any((directory / file).is_file() for file in _VOCABULARIES)),
            )
            if not there
        ]
        if lacks:
            raise UsageError(f"model directory {directory} lacks {', '.join(lacks)}; mlx-lm cannot load it")
        context, vocabulary = _stated_sizes(directory)
        hashes = _hashes(directory)
    except OSError as error:
        raise UsageError(f"model directory {directory}: {error.filename}: {first_line(error)}") from error
    return ModelHandle(
        name=name,
        directory=directory,
        licence=licence,
        source=source,
        context=context,
        vocabulary=vocabulary,
        **hashes,
    )


def _stated_sizes(directory: Path) -> tuple[int, int | None]:
    """Context and vocabulary that config.json states.

    Raises:
        UsageError: it cannot be read, or states what no model has.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"), parse_constant=_constant)
        stated = config | config.get("text_config", {})
        context = next((int(stated[key]) for key in _CONTEXT_KEYS if stated.get(key)), UNKNOWN_CONTEXT)
        for key in _LAYER_KEYS:
            n_layers = stated.get(key)
            if n_layers is not None and not (isinstance(n_layers, int) and 1 <= n_layers <= _MOST_LAYERS):
                raise ValueError(f"{key} is {str(n_layers)[:50]}, not 1..{_MOST_LAYERS}")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"model directory {directory}: config.json cannot be read: {first_line(error)}") from error
    vocabulary = stated.get("vocab_size")
    return min(context, UNKNOWN_CONTEXT), vocabulary if isinstance(vocabulary, int) and vocabulary > 0 else None


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds a NaN")
    return float(name)


def _weight_files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("model*.safetensors") if file.is_file())


def _tokenizer_files(directory: Path) -> list[Path]:
    named = [directory / name for name in _TOKENIZER_FILES]
    return [file for file in (*named, *sorted(directory.glob("*.tiktoken"))) if file.is_file()]


def load_model(handle: ModelHandle, *, n_layers: int | None = None) -> tuple[Module, TokenizerWrapper]:
    """Load a model and its tokenizer through mlx-lm.

    On CPU all floating-point weights are fp32 (MLX's fp16 products do not pass through BLAS). On Metal they keep
    their dtype, except that fp32 becomes fp16.

    Args:
        handle: from :func:`resolve_model`.
        n_layers: keep only the first ``n_layers`` decoder layers (real weights); None keeps all.
    Raises:
        UsageError: mlx-lm cannot load the directory or pass a token through the model, or ``n_layers`` is out of range
            for this model.
        IntegrityError: the files are not those of the handle any more.
    """
    weights = _weight_files(handle.directory)
    files = ("config.json", *(file.name for file in weights))
    with ThreadPoolExecutor(1) as pool, _without_marks(handle.directory) as directory:
        reading = pool.submit(sha256_of, *weights)  # beside the loading, which reads the same bytes
        with _loading(handle, *files):
            model, _ = mlx_load_model(directory, lazy=True)
        if n_layers is not None:
            _cut(model, n_layers, handle.name)
        _set_compute_dtype(model)
        with _loading(handle, *files):
            _check_cut(model, directory, n_layers, handle.name)
            mx.eval(model.parameters())
            _check_unchanged(handle, "weights", handle.weights_sha256, reading.result())
            _check_unchanged(handle, "config", handle.config_sha256, sha256_of(handle.directory / "config.json"))
    return model, load_tokenizer(handle)


def load_tokenizer(handle: ModelHandle) -> TokenizerWrapper:
    """Load a model's tokenizer through mlx-lm; code that the directory brings is never run.

    Raises:
        UsageError: mlx-lm cannot load it; names the directory and the file.
        IntegrityError: the files are not those of the handle any more.
    """
    files = _tokenizer_files(handle.directory)
    with _loading(handle, *(file.name for file in files), "config.json"):
        tokenizer = _read_tokenizer(handle)
        _check_unchanged(handle, "tokenizer", handle.tokenizer_sha256, sha256_of(*files))
    return tokenizer


@functools.lru_cache(maxsize=1)
def _read_tokenizer(handle: ModelHandle) -> TokenizerWrapper:
    """Planning and measuring ask for the same one, which takes a second to build."""
    eos = load_config(handle.directory).get("eos_token_id")
    tokenizer: TokenizerWrapper = mlx_load_tokenizer(  # type: ignore[no-untyped-call]
        handle.directory, {"trust_remote_code": False}, eos_token_ids=eos
    )
    tokenizer.encode("a")
    return tokenizer


@contextmanager
def _loading(handle: ModelHandle, *files: str) -> Iterator[None]:
    """Turn whatever mlx-lm, transformers and tokenizers raise on a damaged directory into one sentence."""
    try:
        yield
    except (VeloxError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of `tokenizers` is no Exception
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which is never run"
        elif not isinstance(error, (ValueError, RuntimeError, OSError)):
            reason = f"{type(error).__name__}: {reason}"
        place = _damaged_json(handle.directory, files)
        raise UsageError(
            f"mlx-lm cannot load model {handle.name!r} from {handle.directory}: {place}{reason}"
        ) from error


def _damaged_json(directory: Path, files: Sequence[str]) -> str:
    """The first of the files that is no JSON though it should be, or all of them: where to look."""
    for file in files:
        try:
            if file.endswith(".json"):
                json.loads((directory / file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return f"{file} is damaged: "
    return f"({', '.join(files)}) "


def _check_unchanged(handle: ModelHandle, what: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise IntegrityError(
            f"the {what} of {handle.name} changed in {handle.directory} after the run began (sha256 {actual[:16]}…, "
            f"it was {expected[:16]}…): nothing was measured on it; start again"
        )


def _try_shapes(model: Module) -> None:
    """Pass two tokens through the model without computing anything: a config that does not fit fails here."""
    logits = model(mx.zeros((1, 2), dtype=mx.int32), cache=make_prompt_cache(model))
    if logits.shape[:2] != (1, 2) or logits.ndim != 3:
        raise ValueError(f"two tokens give logits of shape {logits.shape}")


def _check_cut(model: Module, directory: Path, n_layers: int | None, name: str) -> None:
    """Whether tokens pass through the model; where they pass through the whole one alone, the cut is what is wrong.

    Raises:
        UsageError: ``n_layers`` is below the fewest layers that work, which it names.
    """
    try:
        _try_shapes(model)
        return
    except Exception:
        if n_layers is None:
            raise
    whole, _ = mlx_load_model(directory, lazy=True)
    _try_shapes(whole)
    n_all = len(_layers_owner(whole).layers)
    for least in range(n_layers + 1, n_all + 1):
        try:
            longer, _ = mlx_load_model(directory, lazy=True)
            _cut(longer, least, name)
            _try_shapes(longer)
        except Exception:
            continue
        raise UsageError(f"n_layers={n_layers}: {name} can be cut to {least}..{n_all} layers")


@contextmanager
def _without_marks(directory: Path) -> Iterator[Path]:
    """A path to the directory that mlx-lm, which looks for weights with ``glob``, cannot take for a pattern."""
    if glob.escape(str(directory)) == str(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="veloxbench-") as folder:
        link = Path(folder) / "model"
        link.symlink_to(directory, target_is_directory=True)
        yield link


def _set_compute_dtype(model: Module) -> None:
    def floating(dtype: mx.Dtype) -> bool:
        return bool(mx.issubdtype(dtype, mx.floating))

    def fp32(dtype: mx.Dtype) -> bool:
        return bool(dtype == mx.float32)

    if mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu):
        model.set_dtype(mx.float16, predicate=fp32)
    else:
        model.set_dtype(mx.float32, predicate=floating)


def _cut(model: Module, n_layers: int, name: str) -> None:
    """Keep the first ``n_layers`` decoder layers, before any of the others is read from disk."""
    owner = _layers_owner(model)
    # Gemma 3 looks for a full-attention cache at the end of its first period.
    least = int(getattr(owner, "sliding_window_pattern", 1))
    if not least <= n_layers <= len(owner.layers):
        raise UsageError(f"n_layers={n_layers}: {name} can be cut to {least}..{len(owner.layers)} layers")
    owner.layers = owner.layers[:n_layers]
    for holder, field in ((owner, "num_hidden_layers"), (getattr(model, "args", None), "num_hidden_layers")):
        if hasattr(holder, field):
            setattr(holder, field, n_layers)


def _layers_owner(model: Module) -> Any:
    for _, module in model.named_modules():  # type: ignore[no-untyped-call]
        if isinstance(module.get("layers"), list):
            return module
    raise UsageError(f"{type(model).__name__} has no list of decoder layers")
