"""Models by name, by directory and by hub id; what is cached of them is verified; what the user is told when one cannot
be had.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_load_model
from mlx_lm.utils import quantize_model, save_model
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tiny_models import LAYERS, VOCABULARY, tiny_llama, tiny_llama2c

from veloxbench.errors import ExitCode, IntegrityError, UnfitEnvironmentError, UsageError, VeloxError
from veloxbench.inputs import models as models_module
from veloxbench.inputs.models import UNKNOWN_CONTEXT, known_models, load_model, load_tokenizer, resolve_model
from veloxbench.inputs.sources import cache_dir, sha256_of
from veloxbench.inputs.transfer_progress import SilentReporter


class Told(SilentReporter):
    """A reporter that remembers what the user was told."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def local_model(tmp_path, empty_cache):
    """A directory as any tool might have saved it."""
    return tiny_llama(tmp_path / "my-llama")


def test_default_model_is_pinned_and_described():
    """The default model's handle: the context from its GGUF, hashes of the files that mlx-lm reads."""
    handle = resolve_model("smollm2-135m")
    assert (
        handle.context == json.loads((handle.directory / "config.json").read_text())["max_position_embeddings"] == 8192
    )
    assert handle.licence == "Apache-2.0"
    assert handle.config_sha256 == sha256_of(handle.directory / "config.json")
    assert known_models()["smollm2-135m"].is_cached


def test_conversion_is_deterministic(tmp_path, monkeypatch):
    """Converting the same GGUF again, in another cache, gives the same three hashes."""
    first = resolve_model("smollm2-135m")
    weights = known_models()["smollm2-135m"].weights
    source = weights.path
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))
    weights.path.parent.mkdir(parents=True)
    weights.path.symlink_to(source)
    again = resolve_model("smollm2-135m", reporter=SilentReporter())
    assert again.directory != first.directory
    for field in ("weights_sha256", "tokenizer_sha256", "config_sha256"):
        assert getattr(again, field) == getattr(first, field)


def test_first_layers_are_the_models_own():
    """Cut to two layers, the weights that stay are those of the file; a cache is made for two layers."""
    handle = resolve_model("smollm2-135m")
    model, _ = load_model(handle, n_layers=2)
    stored = load_file(handle.directory / "model.safetensors")
    kept = dict(tree_flatten(model.parameters()))
    assert {name.split(".")[2] for name in kept if ".layers." in name} == {"0", "1"}
    name = "model.layers.1.self_attn.k_proj.weight"
    assert np.array_equal(np.array(kept[name]), stored[name].astype(np.array(kept[name]).dtype))
    assert len(model.layers) == 2


@pytest.mark.parametrize("n_layers", [0, 4])
def test_impossible_cut(local_model, n_layers):
    """A cut to no layers, or to more than there are, names the argument, the value and the range."""
    with pytest.raises(UsageError, match=rf"n_layers={n_layers}: .* can be cut to 1\.\.3 layers"):
        load_model(resolve_model(str(local_model)), n_layers=n_layers)


def test_local_directory(local_model):
    """Any mlx-lm directory: its own context, fp32 on CPU whatever was stored, and a forward pass."""
    handle = resolve_model(str(local_model))
    assert (handle.context, handle.directory, handle.source) == (777, local_model, "local directory")
    model, tokenizer = load_model(handle)
    logits = model(mx.array([tokenizer.encode("w1 w2 w3")]))
    assert logits.shape == (1, 3, VOCABULARY)
    if not mx.metal.is_available():
        assert logits.dtype == mx.float32
    assert bool(mx.isfinite(logits).all())


def test_quantized_directory(local_model):
    """A 4-bit mlx-lm directory keeps its codes; only its scales change dtype for the CPU."""
    model, _ = mlx_load_model(local_model)
    model, config = quantize_model(model, json.loads((local_model / "config.json").read_text()), 32, 4)
    save_model(local_model, model)
    (local_model / "config.json").write_text(json.dumps(config))
    codes = {
        name: array
        for name, array in mx.load(str(local_model / "model.safetensors")).items()
        if array.dtype == mx.uint32
    }
    model, _ = load_model(resolve_model(str(local_model)))
    loaded = dict(tree_flatten(model.parameters()))
    assert len(codes) >= 6 * LAYERS
    assert all(bool((loaded[name] == array).all()) for name, array in codes.items())
    assert bool(mx.isfinite(model(mx.array([[1, 2, 3]]))).all())


def test_context_that_is_not_stated(local_model):
    """A config.json without a maximum length sets no limit."""
    config = json.loads((local_model / "config.json").read_text())
    del config["max_position_embeddings"]
    (local_model / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(local_model)).context == UNKNOWN_CONTEXT


def test_local_hash_follows_the_content(local_model):
    """The weights' hash is the file's sha256, whatever its size and time say, and whatever a note of old says."""
    file = local_model / "model.safetensors"
    before, stat = resolve_model(str(local_model)).weights_sha256, file.stat()
    assert before == sha256_of(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cache_dir().mkdir(parents=True, exist_ok=True)
    key = json.dumps([[str(file), stat.st_size, stat.st_mtime_ns]])
    (cache_dir() / "hashes.json").write_text(json.dumps({key: "0" * 64}))
    assert resolve_model(str(local_model)).weights_sha256 == sha256_of(file) != before


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", r"model\*\.safetensors"),
        ("tokenizer.json", r"a tokenizer \(tokenizer\.json\)"),
    ],
)
def test_incomplete_directory(local_model, file, named):
    """A directory that lacks a file is refused, naming the file."""
    (local_model / file).unlink()
    with pytest.raises(UsageError, match=f"lacks {named}"):
        resolve_model(str(local_model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "no-such-architecture"}, "no-such-architecture"),
        ({"hidden_size": 64}, "Expected shape"),
    ],
)
def test_directory_that_mlx_lm_refuses(local_model, change, reason):
    """An architecture that mlx-lm does not know, or weights of other shapes: one sentence with mlx-lm's reason."""
    config = json.loads((local_model / "config.json").read_text())
    (local_model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=f"mlx-lm cannot load model .*{reason}") as caught:
        load_model(resolve_model(str(local_model)))
    assert "\n" not in str(caught.value)


def test_damaged_config(local_model):
    """A config.json that is no JSON is named."""
    (local_model / "config.json").write_text("{half")
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        resolve_model(str(local_model))


def test_unknown_name_lists_near_ones():
    """A typing error gets the name that was meant."""
    with pytest.raises(UsageError, match="unknown model 'smolm2-135'; did you mean smollm2-135m") as caught:
        resolve_model("smolm2-135")
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("name", ["./no/such/dir", "/no/such/dir", "~/no-such-dir"])
def test_missing_directory(name):
    """A path that is not there is called a path, not an unknown name."""
    with pytest.raises(UsageError, match=r"is not a directory; it needs config\.json"):
        resolve_model(name)


@pytest.mark.usefixtures("empty_cache")
def test_licence_is_shown_and_must_be_accepted():
    """Gemma's terms are shown before the first download, which needs consent; nothing is fetched without it."""
    told = Told()
    with pytest.raises(UsageError, match=r"Gemma Terms of Use .*--accept-licence"):
        resolve_model("gemma3-270m", reporter=told)
    assert "Gemma Terms of Use" in told.messages[0]
    assert not cache_dir().exists()


def test_hub_without_network(monkeypatch):
    """A hub id without network: one sentence that names the id and what is known offline, exit code 5."""

    def unreachable(*args, **options):
        raise ConnectionError("[Errno -2] Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    name = "mlx-community/Llama-3.2-3B-Instruct-4bit"
    with pytest.raises(UnfitEnvironmentError, match=f"{name}.* hub cannot be reached.*smollm2-135m") as caught:
        resolve_model(name)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "\n" not in str(caught.value)


def test_hub_snapshot(local_model, monkeypatch):
    """A hub id that can be downloaded: its snapshot is the directory, its card gives the licence."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(local_model))
    handle = resolve_model("someone/tiny-llama")
    assert (handle.name, handle.directory, handle.licence) == ("someone/tiny-llama", local_model, "apache-2.0")


@pytest.mark.usefixtures("empty_cache")
def test_killed_conversion_is_done_again(monkeypatch):
    """What a killed conversion left is thrown away; a directory without its last file does not count as converted."""
    spec = known_models()["stories15m"]
    spec.directory.mkdir(parents=True)
    (spec.directory / "config.json").write_text("{}")
    leftovers = spec.directory.with_name(spec.directory.name + ".unfinished")
    leftovers.mkdir()
    (leftovers / "model.safetensors").write_bytes(b"half")
    assert not spec.is_cached
    monkeypatch.setattr(models_module, "fetch", lambda pinned, reporter: tiny_llama2c(cache_dir() / "tiny.data"))
    handle = resolve_model("stories15m", reporter=SilentReporter())
    assert not leftovers.exists()
    assert load_file(handle.directory / "model.safetensors")["model.embed_tokens.weight"].shape == (300, 8)


# What is cached is verified.


@pytest.fixture
def converted(empty_cache, monkeypatch):
    """The smallest known model, converted from a file of 300 words; counts its conversions."""
    source = tiny_llama2c(cache_dir().parent / "tiny.data")
    calls = []

    def fetch(pinned, reporter):
        calls.append(pinned.filename)
        return source

    monkeypatch.setattr(models_module, "fetch", fetch)
    return resolve_model("stories15m", reporter=SilentReporter()), calls


def flip_a_bit(path, keep_time=True):
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 4
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_conversion_is_made_again(converted, file):
    """One bit, size and time kept: the user is told, the model is converted again, and the bytes are as before."""
    before, calls = converted
    content, told = (before.directory / file).read_bytes(), Told()
    flip_a_bit(before.directory / file)
    assert resolve_model("stories15m", reporter=told) == before
    assert (before.directory / file).read_bytes() == content
    assert len(calls) == 2
    assert "converted again" in told.messages[0]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"weights_sha256": 1}', "[" * 5000, "\xff", '{"weights_sha256": "0"}'],
    ids=["empty", "list", "number", "other types", "deep", "latin", "short"],
)
def test_a_damaged_note_is_written_again(converted, text):
    """The note beside a conversion is no defect when it is damaged."""
    before, _ = converted
    (before.directory / "veloxbench.json").write_text(text, encoding="latin-1")
    assert resolve_model("stories15m", reporter=SilentReporter()) == before


def test_an_edited_note_is_not_believed(converted):
    """A hash, a name, a context, a licence of somebody's own: the handle's are the program's and the bytes'."""
    before, _ = converted
    note = before.directory / "veloxbench.json"
    lies = {"weights_sha256": "0" * 64, "name": "smollm2-135m", "context": 1, "licence": "none", "source": "me"}
    note.write_text(json.dumps(json.loads(note.read_text()) | lies))
    assert resolve_model("stories15m", reporter=SilentReporter()) == before
    note.write_text(json.dumps(json.loads(note.read_text()) | {"of a later version": [1]}))
    assert resolve_model("stories15m", reporter=SilentReporter()) == before


@pytest.mark.parametrize("extra", ["model-extra.safetensors", "vocab.json"])
def test_a_file_put_beside_a_conversion_is_noticed(converted, extra):
    """mlx-lm would load another ``model*.safetensors``, and transformers another vocabulary."""
    before, _ = converted
    (before.directory / extra).write_bytes(b"{}")
    assert resolve_model("stories15m", reporter=SilentReporter()) == before
    assert not (before.directory / extra).exists()


def test_two_processes_heal_at_once(converted):
    """Four callers find the damage: one converts, all get the same handle, nothing is left over."""
    before, calls = converted
    flip_a_bit(before.directory / "model.safetensors")
    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(lambda _: resolve_model("stories15m", reporter=SilentReporter()), range(4)))
    assert handles == [before] * 4
    assert len(calls) == 2
    assert [place.name for place in before.directory.parent.iterdir()] == [before.directory.name]


@pytest.mark.parametrize("what", ["a file", "a link to nothing", "a link to a directory"])
def test_whatever_stands_in_a_conversions_place_is_replaced(converted, tmp_path, what):
    """A file or a link where the directory was."""
    before, _ = converted
    shutil.rmtree(before.directory)
    if what == "a file":
        before.directory.write_text("")
    else:
        (tmp_path / "other").mkdir()
        before.directory.symlink_to(tmp_path / ("other" if what == "a link to a directory" else "nothing"))
    assert resolve_model("stories15m", reporter=SilentReporter()) == before
    assert not before.directory.is_symlink()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_changes_after_the_plan_is_not_measured(local_model, file):
    """The keys of a run come from the resolved hashes: other bytes at loading are refused."""
    handle = resolve_model(str(local_model))
    if file == "model.safetensors":
        flip_a_bit(local_model / file)
    else:
        (local_model / file).write_text((local_model / file).read_text() + " ")
    with pytest.raises(IntegrityError, match=r"changed in .* after the run began"):
        load_model(handle)


def test_a_read_only_cache_is_read(converted, monkeypatch):
    """A whole conversion needs no lock and no write."""
    before, _ = converted
    monkeypatch.setattr(models_module, "cache_lock", lambda *arguments: pytest.fail("a lock was taken"))
    assert resolve_model("stories15m", reporter=SilentReporter()) == before


def test_a_full_disk_while_converting_is_one_sentence(converted, monkeypatch):
    """What safetensors says of it in its own way is the cache's sentence."""
    before, _ = converted
    flip_a_bit(before.directory / "model.safetensors")

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("veloxbench.inputs.gguf.save_file", full)
    with pytest.raises(UnfitEnvironmentError, match=r"No space left on device .*set VELOXBENCH_CACHE"):
        resolve_model("stories15m", reporter=SilentReporter())


def test_a_damaged_file_of_the_hubs_cache_says_what_to_delete(local_model, tmp_path, monkeypatch):
    """The hub's cache names each file by its content's hash; a byte that changed is noticed before it is loaded."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in local_model.iterdir():
        content = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = blobs / (sha256_of(file) if file.suffix == ".safetensors" else git)
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(snapshot))
    assert resolve_model("someone/tiny").weights_sha256 == sha256_of(local_model / "model.safetensors")
    for name in ("model.safetensors", "tokenizer.json"):
        blob, content = (snapshot / name).resolve(), (snapshot / name).read_bytes()
        flip_a_bit(blob)
        with pytest.raises(IntegrityError, match=f"{name} in the hub's cache is damaged: delete {blob}"):
            resolve_model("someone/tiny")
        blob.write_bytes(content)


def test_the_hub_is_asked_for_every_file_that_mlx_lm_reads(local_model, monkeypatch):
    """Tokenizers come as tiktoken files and as Python (which is fetched, not run) as well."""
    asked = []

    def download(name, allow_patterns, **options):
        asked.extend(allow_patterns)
        return str(local_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve_model("org/model")
    files = ("tiktoken.model", "qwen.tiktoken", "tokenization_kimi.py", "tokenizer.model", "merges.txt", "config.json")
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in asked)] == []


# A user's directory is the user's.


@pytest.mark.parametrize("name", ["my[1]model", "what?", "a*b", "a::b", "~x", "with space", "-dash", "100%"])
def test_a_directory_is_taken_by_its_exact_name(tmp_path, monkeypatch, empty_cache, name):
    """Marks of patterns, addresses and homes are letters of a name; a neighbour that a pattern matches is not read."""
    other = tiny_llama(tmp_path / "my1model")
    save_file({"model.norm.weight": np.ones(32, np.float32)}, other / "model.safetensors")
    directory = tiny_llama(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for spelled in (name, str(directory)):
        handle = resolve_model(spelled)
        model, _ = load_model(handle)
        assert handle.weights_sha256 == sha256_of(directory / "model.safetensors")
        stored = mx.load(str(directory / "model.safetensors"))["model.norm.weight"]
        assert mx.array_equal(model.model.norm.weight, stored.astype(model.model.norm.weight.dtype))


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 5000, "a" * 300 + "/b", "\0", "a/\0", "\udcff", ""])
def test_a_name_that_no_path_can_have_is_one_sentence(name):
    """No such user, too long, a zero byte, no UTF-8, nothing."""
    with pytest.raises(VeloxError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 6000


def edited(**changes):
    return lambda text: json.dumps({**json.loads(text), **changes})


DAMAGED = {
    "config.json": {
        "empty": lambda text: "",
        "half": lambda text: text[: len(text) // 2],
        "a list": lambda text: "[1]",
        "deep": lambda text: text[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}",
        "huge number": lambda text: text[:-1] + ', "x": ' + "9" * 5000 + "}",
        "NaN": edited(rope_theta=float("nan")),
        "latin": lambda text: text[:-1] + ', "x": "\xff"}',
        "heads are a list": edited(num_attention_heads=[]),
        "tied by a list": edited(tie_word_embeddings=[], model_type={}),
        "eps is a word": edited(rms_norm_eps="x"),
        "theta is a list": edited(rope_theta=[1]),
        "no heads": edited(num_attention_heads=0),
        "a billion layers": edited(num_hidden_layers=10**9),
        "a million wide": edited(hidden_size=10**6),
        "infinite context": edited(max_position_embeddings=float("inf")),
        "text_config is a word": edited(text_config="x"),
        "other rope": edited(rope_scaling={"rope_type": "no-such-rope"}),
        "own code": edited(model_file="model.py"),
    },
    "tokenizer.json": {
        "empty": lambda text: "",
        "half": lambda text: text[: len(text) // 2],
        "deep": lambda text: "[" * 5000 + "]" * 5000,
        "an id is no integer": lambda text: text.replace(": 17,", ": 17.5,", 1).replace(":17,", ":17.5,", 1),
        "no model": lambda text: "{}",
        "latin": lambda text: text + "\xff",
    },
    "tokenizer_config.json": {
        "half": lambda text: text[: len(text) // 2],
        "a list": lambda text: "[]",
        "own code": edited(auto_map={"AutoTokenizer": [None, "tok.Evil"]}, tokenizer_class="Evil"),
        "no such class": edited(tokenizer_class=3),
    },
    "model.safetensors": {
        "empty": lambda text: "",
        "half": lambda text: text[: len(text) // 2],
        "text": lambda text: "x",
    },
}


@pytest.mark.parametrize(
    ("file", "kind"), [(file, kind) for file, kinds in DAMAGED.items() for kind in kinds], ids=lambda value: value
)
def test_a_damaged_directory_is_one_sentence(local_model, monkeypatch, file, kind):
    """Every kind of damage in every file: a usage error that names directory and file; nobody is asked anything."""
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("a question was asked"))
    text = (local_model / file).read_text(encoding="latin-1")
    (local_model / file).write_text(DAMAGED[file][kind](text), encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        load_model(resolve_model(str(local_model)))
    sentence = str(caught.value)
    assert str(local_model) in sentence
    assert file in sentence
    assert "\n" not in sentence
    assert "custom code" not in sentence


def test_a_tokenizer_that_panics_is_one_sentence(local_model, monkeypatch):
    """A panic of `tokenizers` is no Exception in Python; it is a damaged directory all the same."""

    class PanicException(BaseException):
        pass

    def panic(*arguments, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(models_module, "mlx_load_tokenizer", panic)
    with pytest.raises(UsageError, match=r"tokenizer\.json.*PanicException: index out of bounds"):
        load_tokenizer(resolve_model(str(local_model)))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_a_files_place(local_model, make):
    """Nobody waits for a pipe; a folder is no file."""
    (local_model / "tokenizer_config.json").unlink()
    (local_model / "tokenizer.json").unlink()
    make(local_model / "tokenizer.json")
    with pytest.raises(UsageError, match=r"model directory .*tokenizer"):
        resolve_model(str(local_model))


def test_the_source_names_who_made_it_first():
    """A mirror's package has an odd name; the list says first whose the file is, then what the mirror is."""
    for name, spec in known_models().items():
        own, _, copy = spec.source.partition("; ")
        assert own.startswith(("hub ", "github.com/")), name
        assert copy.startswith("a copy as data in "), name
        assert "never installed" in copy, name
