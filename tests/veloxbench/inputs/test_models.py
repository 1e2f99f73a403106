"""Models by name, by directory and by hub id; what the user is told when one cannot be had."""

import json
import os

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_load_model
from mlx_lm.utils import quantize_model, save_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from veloxbench.errors import ExitCode, UnfitEnvironmentError, UsageError
from veloxbench.inputs import models as models_module
from veloxbench.inputs.models import UNKNOWN_CONTEXT, known_models, load_model, resolve_model
from veloxbench.inputs.sources import cache_dir, sha256_of
from veloxbench.inputs.transfer_progress import SilentReporter

HIDDEN, LAYERS, VOCABULARY = 32, 3, 64


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
    """A llama with three layers as any tool might have saved it: bfloat16 weights, config, tokenizer, model card."""
    directory = tmp_path / "my-llama"
    directory.mkdir()
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 48}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY}
    config |= {"max_position_embeddings": 777, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
    shapes |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}
    shapes |= {"mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,)}
    weights = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    weights |= {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    random = np.random.default_rng(3)
    arrays = {name: mx.array(random.normal(size=shape)).astype(mx.bfloat16) for name, shape in weights.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return directory


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


def tiny_llama2c(path):
    """A llama2.c file with one layer and 300 pieces."""
    dim, hidden, vocabulary, context = 8, 16, 300, 16
    count = vocabulary * dim + 3 * dim + 4 * dim * dim + 3 * dim * hidden + context * dim // 2
    header = np.array([dim, hidden, 1, 2, 2, vocabulary, context], dtype="<i4").tobytes()
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(bytes([i]) for i in range(256)), b" ", b"a", b" a"]
    pieces += [b"piece%d" % i for i in range(vocabulary - len(pieces))]
    tokenizer = np.array([9], "<i4").tobytes()
    tokenizer += b"".join(
        np.array([-i], "<f4").tobytes() + np.array([len(piece)], "<i4").tobytes() + piece
        for i, piece in enumerate(pieces)
    )
    path.write_bytes(header + np.random.default_rng(5).normal(size=count).astype("<f4").tobytes() + tokenizer)
    return path
