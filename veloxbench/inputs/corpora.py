"""Texts by name; evaluation and calibration parts never overlap.

A name is one of :func:`known_corpora`, a local .txt / .jsonl / .parquet file, or a hub data set ``org/name`` (or
``org/name:configuration``), which alone is read through ``datasets``. A file is read by exactly its path, anew each
time: no part of it is a pattern or an address, and no cache stands between its content and the figure.

Pinned texts use the original's own splits (WikiText-2: test to evaluate, validation to calibrate) or different books; a
text with a single part is cut: the first 80% of its characters evaluate, the rest calibrates.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from veloxbench.errors import UnfitEnvironmentError, UsageError, unknown_name
from veloxbench.inputs.sources import (
    DATA,
    PinnedFile,
    cache_dir,
    catalogue,
    fetch,
    first_line,
    path_of,
    pinned_file,
    writable_cache,
)
from veloxbench.inputs.transfer_progress import Reporter, default_reporter
from veloxbench.records.journal import kind_of

Role = Literal["evaluation", "calibration"]

EVALUATION_SHARE = 0.8  # of a text that has no parts of its own
MAX_CHARACTERS = 16 * 2**20  # of a text are used; more only costs tokenization time

MAX_FILE_NBYTES = 2**30  # of a local file; the characters above are a small part of it

_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_HUB_TIMEOUT_S = 5.0
_SPLITS: dict[Role, tuple[str, ...]] = {
    "evaluation": ("test", "validation", "train"),
    "calibration": ("validation", "train", "test"),
}


class SupportsEncode(Protocol):
    """What is asked of a tokenizer: mlx-lm's ``TokenizerWrapper`` and transformers' tokenizers have it."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True)
class Text:
    """One part of a text. ``"".join(documents)`` is the text that is tokenized; ``sha256`` is of its UTF-8 bytes.

    ``licence`` is None where nobody states one (a local file).
    """

    name: str
    role: Role
    documents: tuple[str, ...]
    licence: str | None
    source: str

    @cached_property
    def joined(self) -> str:
        """The documents as one string."""
        return "".join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """Hash of the joined text."""
        return hashlib.sha256(self.joined.encode()).hexdigest()


@dataclass(frozen=True)
class TokenBlock:
    """Windows of one text, ready to be fed in one batch.

    ``tokens`` is ``[S, L]`` int32; ``sha256`` covers its shape and little-endian bytes; ``starts`` are the windows'
    first tokens, counted in the whole text's tokens; ``has_bos`` says that column 0 is the beginning-of-sequence
    token and not text; ``licence`` is the text's, if known.
    """

    tokens: npt.NDArray[np.int32]
    sha256: str
    text: str
    role: Role
    starts: tuple[int, ...]
    has_bos: bool
    licence: str | None


NO_TEXT = TokenBlock(
    tokens=np.zeros((0, 0), np.int32),
    sha256=hashlib.sha256(b"").hexdigest(),
    text="none",
    role="evaluation",
    starts=(),
    has_bos=False,
    licence=None,
)
"""What suites that read no text are fed."""


@dataclass(frozen=True)
class CorpusSpec:
    """A text that is known by name. ``files`` maps each role to its own pinned file, or both to one that is cut."""

    name: str
    licence: str
    description: str
    files: Mapping[Role, PinnedFile | Path]

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        file = self.files["evaluation"]
        return file.source if isinstance(file, PinnedFile) else "in this package"

    @property
    def download_nbytes(self) -> int:
        """Bytes of the files that are kept."""
        return sum(file.nbytes for file in self.files.values() if isinstance(file, PinnedFile))

    @property
    def is_cached(self) -> bool:
        """Whether every part is on this machine."""
        return all((file.path if isinstance(file, PinnedFile) else file).is_file() for file in self.files.values())


_ALIASES = {"wikitext-2-raw": "wikitext-2", "wikitext-2-raw-v1": "wikitext-2", "wikitext2": "wikitext-2"}


def known_corpora() -> Mapping[str, CorpusSpec]:
    """The texts that are known by name, the default first."""
    return {name: _spec(name, **fields) for name, fields in catalogue("corpora").items()}


def _spec(name: str, files: Mapping[Role, Any], **fields: str) -> CorpusSpec:
    parts = {role: DATA / file if isinstance(file, str) else pinned_file(file) for role, file in files.items()}
    return CorpusSpec(name=name, files=parts, **fields)


def load_text(name: str, role: Role = "evaluation", *, reporter: Reporter | None = None) -> Text:
    """Read one part of a text, fetching it first when it is not on this machine.

    Args:
        name: a known name, a local .txt / .jsonl / .json / .parquet file, or a hub data set ``org/name[:config]``.
        role: which part; the two parts of a text share no character.
        reporter: told about downloads; by default a progress bar (or plain lines) on stderr.
    Raises:
        UsageError: an unknown name (near matches listed) or a file that cannot be read as text.
        UnfitEnvironmentError: no network, no space.
        IntegrityError: a download that is not the pinned file.
    """
    spec = known_corpora().get(_ALIASES.get(name, name))
    if spec is not None:
        return _load_known(spec, role, reporter or default_reporter())
    path = path_of(name)
    mode = _mode(path, name)
    if mode is not None and stat.S_ISREG(mode):
        documents = _part(_read_file(path), role)
        return _text(name, role, documents, licence=None, source="local file")
    if mode is not None:
        raise UsageError(
            f"corpus {name!r} is not a file but {kind_of(mode)}; known names: {', '.join(known_corpora())}"
        )
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in _SUFFIXES:
        return _load_hub(name, role)
    if path.suffix.lower() in _SUFFIXES or any(mark in name for mark in (os.sep, "~", "/")):
        raise UsageError(f"corpus {name!r} is not a file")
    raise unknown_name("corpus", name, known_corpora())


def _mode(path: Path, name: str) -> int | None:
    """What stands at a path that a user named; None where nothing does."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"corpus {_shown(name)}: {first_line(error)}") from error


def token_block(
    text: Text,
    tokenizer: SupportsEncode,
    *,
    n_sequences: int,
    length: int,
    start: int = 0,
    contiguous: bool = False,
    vocabulary: int | None = None,
) -> TokenBlock:
    """Disjoint windows of a text's tokens, chosen without chance.

    The text is tokenized once, as a whole. Where the tokenizer itself starts a text with a beginning-of-sequence
    token (Gemma; not SmolLM2 or Qwen), each window starts with it and holds one token of text less.

    Args:
        text: from :func:`load_text`.
        tokenizer: the model's.
        n_sequences: S, windows.
        length: L, tokens per window.
        start: tokens of the text to leave out at its beginning.
        contiguous: windows one after the other from ``start``; otherwise spread evenly over the rest of the text.
        vocabulary: tokens that the model knows (``ModelHandle.vocabulary``); a token beyond has no embedding, and MLX
            would read other memory in its place.
    Raises:
        UsageError: the text is too short (names what it has and what is needed), or the tokenizer fails on it or is
            not the model's.
    """
    if n_sequences < 1 or length < 2 or start < 0:
        raise UsageError(
            f"n_sequences={n_sequences}, length={length}, start={start}: need n_sequences >= 1, length >= 2, start >= 0"
        )
    ids, bos = _token_ids(text, tokenizer, vocabulary)
    width = length - len(bos)
    if start + n_sequences * width > len(ids):
        raise UsageError(
            f"text {text.name!r} ({text.role}) has {len(ids)} tokens; {n_sequences} windows of {width} tokens "
            f"from token {start} need {start + n_sequences * width}"
        )
    stride = width if contiguous else (len(ids) - start) // n_sequences
    starts = tuple(start + i * stride for i in range(n_sequences))
    tokens = np.stack([ids[first : first + width] for first in starts])
    tokens = np.concatenate([np.tile(np.asarray(bos, np.int32), (n_sequences, 1)), tokens], axis=1, dtype="<i4")
    tokens.flags.writeable = False
    digest = hashlib.sha256(repr(tokens.shape).encode() + tokens.tobytes()).hexdigest()
    return TokenBlock(tokens, digest, text.name, text.role, starts, bool(bos), text.licence)


def _token_ids(
    text: Text, tokenizer: SupportsEncode, vocabulary: int | None
) -> tuple[npt.NDArray[np.int32], list[int]]:
    """The whole text's tokens, and what the tokenizer begins every text with."""
    try:
        ids = np.asarray(tokenizer.encode(text.joined, add_special_tokens=False, verbose=False), dtype=np.int64)
        bos = _leading_bos(tokenizer)
    except BaseException as error:  # tokenizers' own panics are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise UsageError(f"the tokenizer fails on text {text.name!r}: {first_line(error)}") from error
    limit = 2**31 if vocabulary is None else vocabulary
    outside = [int(each) for each in (*bos, *ids[(ids < 0) | (ids >= limit)][:1]) if not 0 <= each < limit]
    if outside:
        raise UsageError(
            f"text {text.name!r} has token {outside[0]}, the model knows {limit}: the tokenizer is another model's"
        )
    return ids.astype(np.int32), bos


def _leading_bos(tokenizer: SupportsEncode) -> list[int]:
    """``[bos]`` where the tokenizer starts every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def _load_known(spec: CorpusSpec, role: Role, reporter: Reporter) -> Text:
    file = spec.files[role]
    if isinstance(file, PinnedFile):
        if not file.path.exists():
            reporter.message(f"{spec.name}: licence {spec.licence}; source {file.source}")
        file = fetch(file, reporter)
    documents = _read_file(file)
    if spec.files["evaluation"] == spec.files["calibration"]:
        documents = _part(documents, role)
    return _text(spec.name, role, documents, licence=spec.licence, source=spec.source)


def _text(name: str, role: Role, documents: Sequence[str], *, licence: str | None, source: str) -> Text:
    kept: list[str] = []
    room = MAX_CHARACTERS
    for document in documents:
        if room <= 0:
            break
        kept.append(document[:room])
        room -= len(document)
    if not any(document.strip() for document in kept):
        raise UsageError(f"corpus {_shown(name)}: the {role} part is empty")
    try:
        "".join(kept).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"corpus {_shown(name)}: it holds half a character: {first_line(error)}") from error
    return Text(name, role, tuple(kept), licence, source)


def _separated(documents: Sequence[str]) -> list[str]:
    """Documents that can be joined: one that does not end its line gets a blank line (WikiText's rows stay as is)."""
    return [document if not document or document.endswith("\n") else document + "\n\n" for document in documents]


def _part(documents: Sequence[str], role: Role) -> list[str]:
    """The first 80% of the characters, or the rest, cut at the next white space."""
    total = sum(len(document) for document in documents)
    ahead = int(EVALUATION_SHARE * total)
    for index, document in enumerate(documents):
        if len(document) <= ahead:
            ahead -= len(document)
            continue
        gap = re.compile(r"\s").search(document, ahead)
        cut = gap.end() if gap else len(document)
        if role == "evaluation":
            return [*documents[:index], document[:cut]]
        return [document[cut:], *documents[index + 1 :]]
    return list(documents) if role == "evaluation" else []


@contextmanager
def _quiet_datasets() -> Iterator[Callable[..., Any]]:
    """``datasets.load_dataset`` without progress bars, telemetry or a cache outside ours."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Imported here: it takes seconds.
    from datasets.load import load_dataset
    from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    folder = str(cache_dir() / "datasets")
    try:
        with writable_cache():
            yield partial(load_dataset, cache_dir=folder)
    finally:
        if shown:
            enable_progress_bars()


def _read_file(path: Path) -> list[str]:
    """The documents of a local file.

    Raises:
        UsageError: an unknown suffix, a file that cannot be read or parsed, or no column of text.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(f"corpus {_shown(path)}: suffix {path.suffix!r} is none of {', '.join(_SUFFIXES)}")
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(suffix, "text")
    try:
        nbytes = path.stat().st_size
        if nbytes > MAX_FILE_NBYTES:
            raise ValueError(
                f"it has {nbytes} bytes, {MAX_FILE_NBYTES} at most are read (and {MAX_CHARACTERS} characters used): "
                "cut out a part"
            )
        content = path.read_bytes()
        if not content:
            raise ValueError("it is empty")
        if kind == "parquet":
            documents = _parquet_documents(content)
        elif kind == "json":
            documents = _json_documents(_decoded(content))
        else:
            documents = [_decoded(content)]
    except _NoTextColumn as error:
        raise UsageError(f"corpus {_shown(path)} {error}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"corpus {_shown(path)} cannot be read as {kind}: {first_line(error)}") from error
    return _separated(documents)


def _decoded(content: bytes) -> str:
    """Text of UTF-8 bytes, without a byte order mark, its lines ended by ``\\n``."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    if b"\0" in content:
        raise ValueError("it is binary (it holds a zero byte); text is UTF-8")
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


class _NoTextColumn(ValueError):
    """A table without a column that is the text."""


def _json_documents(content: str) -> list[str]:
    """The text column of JSON lines, or of one JSON list, of objects."""
    lines = [line for line in content.split("\n") if line.strip()]
    if content.lstrip().startswith("["):
        rows = json.loads(content)
    else:
        rows = [_json_line(number, line) for number, line in enumerate(lines, start=1)]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is no JSON object")
    columns: dict[str, list[Any]] = {name: [] for row in rows for name in row}
    for name, values in columns.items():
        values.extend(row.get(name) for row in rows)
    column = _text_column(columns, [name for name, values in columns.items() if _are_strings(values)])
    return [document or "" for document in columns[column]]


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _are_strings(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, str) for value in values) and any(values)


def _parquet_documents(content: bytes) -> list[str]:
    """The text column of a Parquet file; no other column is unpacked."""
    # Imported here: it takes a quarter of a second.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        schema = file.schema_arrow
        strings = [each.name for each in schema if pa.types.is_string(each.type) or pa.types.is_large_string(each.type)]
        column = _text_column(schema.names, strings)
        documents: list[str] = []
        n_characters = 0
        for batch in file.iter_batches(columns=[column]):
            rows = [document or "" for document in batch.column(0).to_pylist()]
            documents += rows
            n_characters += sum(map(len, rows))
            if n_characters > MAX_FILE_NBYTES:
                raise ValueError(f"it unpacks to more than {MAX_FILE_NBYTES} characters")
    except pa.ArrowException as error:
        raise ValueError(first_line(error)) from error
    return documents


def _text_column(columns: Iterable[str], strings: Sequence[str]) -> str:
    """``text``, or the only column of strings."""
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise _NoTextColumn(f"has no column 'text' and not one column of strings: {_shown(list(columns))}")
    return strings[0]


def _shown(name: object) -> str:
    """A name as it stands in a sentence, however long."""
    text = repr(str(name)) if isinstance(name, Path) else repr(name)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-60:]}"


_STRINGS = ("string", "large_string")  # what `datasets` calls columns of text


def _load_hub(name: str, role: Role) -> Text:
    repo, _, configuration = name.partition(":")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # One attempt first: load_dataset itself would retry for half a minute without a network.
        information = HfApi().dataset_info(repo, timeout=_HUB_TIMEOUT_S)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UsageError(f"the hub has no open data set {repo!r}, and it is no file here") from error
    except Exception as error:  # the hub's client changes its transport errors between versions
        raise UnfitEnvironmentError(
            f"corpus {name!r} is no file here and the hub cannot be reached to download it; "
            f"known offline: {', '.join(known_corpora())}"
        ) from error
    with _quiet_datasets() as load_dataset:
        try:
            parts = load_dataset(repo, configuration or None)
        except Exception as error:
            raise UsageError(f"corpus {name!r} cannot be loaded from the hub: {str(error).splitlines()[0]}") from error
    chosen: dict[Role, str] = {}
    for part in ("evaluation", "calibration"):
        free = [split for split in _SPLITS[part] if split in parts and split not in chosen.values()]
        if free:
            chosen[part] = free[0]
    if "evaluation" not in chosen:
        raise UsageError(f"corpus {name!r} has none of the splits test, validation, train: {list(parts)}")
    split = chosen.get(role, chosen["evaluation"])
    table = parts[split]
    strings = [column for column, feature in table.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    try:
        column = _text_column(table.features, strings)
    except _NoTextColumn as error:
        raise UsageError(f"corpus {name!r} {error}") from error
    documents = _separated([document or "" for document in table[column]])
    if len(chosen) == 1:
        documents = _part(documents, role)
    card = getattr(information, "card_data", None)
    licence = card.get("license") if card is not None else None
    return _text(name, role, documents, licence=str(licence) if licence else None, source=f"hub {repo} ({split})")
