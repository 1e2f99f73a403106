"""The conversion against an independent forward pass in NumPy that reads the GGUF itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer

from veloxbench.errors import IntegrityError, UsageError
from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.inputs.gguf import convert_llama2c, gguf_config, halves_from_pairs
from veloxbench.inputs.models import known_models, load_model, resolve_model
from veloxbench.inputs.transfer_progress import SilentReporter

# Largest error of mlx-lm's fp32 logits against an fp64 pass. NumPy's own fp32 pass over the same tokens rounds as
# often, in another order, and is the noise floor (1.6e-4, 5.8e-5, 7.0e-5 on the three models); mlx-lm measured
# 1.1, 1.9 and 1.8 times that.
TOLERANCE = {"fp32 noise floors": 4.0, "largest fp32 noise floor": 5e-4}


@dataclass(frozen=True)
class Stored:
    """What a file says about a model: metadata without the architecture's prefix, and fp32 weights by GGUF's names."""

    arch: str
    meta: Mapping[str, float]
    names: frozenset[str]
    weight: Callable[[str], np.ndarray]


def read_gguf(path: Path) -> Stored:
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    arch = reader.fields["general.architecture"].contents()
    meta = {
        name.removeprefix(f"{arch}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{arch}.")
    }

    @cache
    def weight(name: str) -> np.ndarray:
        return gguf.dequantize(tensors[name].data, tensors[name].tensor_type)

    return Stored(arch, meta, frozenset(tensors), weight)


def read_llama2c(path: Path) -> Stored:
    """The layout that llama2.c's run.c maps into memory; rotation pairs neighbours, as in GGUF's llama."""
    data = path.read_bytes()
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, _ = np.frombuffer(data, "<i4", 7).tolist()
    kv_dim = dim // n_heads * n_kv_heads
    values = np.frombuffer(data, "<f4", (len(data) - 28) // 4, 28)
    layout = [("token_embd", (vocab, dim)), ("attn_norm", (n_layers, dim)), ("attn_q", (n_layers, dim, dim))]
    layout += [("attn_k", (n_layers, kv_dim, dim)), ("attn_v", (n_layers, kv_dim, dim))]
    layout += [("attn_output", (n_layers, dim, dim)), ("ffn_norm", (n_layers, dim))]
    layout += [("ffn_gate", (n_layers, hidden, dim)), ("ffn_down", (n_layers, dim, hidden))]
    layout += [("ffn_up", (n_layers, hidden, dim)), ("output_norm", (dim,))]
    weights = {}
    for name, shape in layout:
        array, values = values[: np.prod(shape)].reshape(shape), values[np.prod(shape) :]
        if shape[0] == n_layers:
            weights |= {f"blk.{layer}.{name}.weight": array[layer] for layer in range(n_layers)}
        else:
            weights[f"{name}.weight"] = array
    meta = {"attention.head_count": n_heads, "attention.head_count_kv": n_kv_heads, "embedding_length": dim}
    meta |= {"attention.layer_norm_rms_epsilon": 1e-5, "block_count": n_layers, "rope.freq_base": 10_000.0}
    return Stored("llama", meta, frozenset(weights), weights.__getitem__)


@dataclass(frozen=True)
class NumpyForward:
    """A transformer in plain NumPy, from llama.cpp's description of each architecture; no cache, one sequence."""

    stored: Stored
    dtype: type

    def logits(self, tokens: np.ndarray, last: int) -> np.ndarray:
        """``[last, vocabulary]`` logits at the last positions."""
        arch, meta, names = self.stored.arch, self.stored.meta, self.stored.names
        n_heads, n_kv_heads = meta["attention.head_count"], meta["attention.head_count_kv"]
        head_dim = meta.get("attention.key_length", meta["embedding_length"] // n_heads)
        eps = self.dtype(meta["attention.layer_norm_rms_epsilon"])

        def weight(name):
            return self.stored.weight(name).astype(self.dtype)

        def rms(x, name):
            return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight(name)

        def linear(x, name):
            y = x @ weight(f"{name}.weight").T
            return y + weight(f"{name}.bias") if f"{name}.bias" in names else y

        positions = np.arange(len(tokens))
        x = self.stored.weight("token_embd.weight")[tokens].astype(self.dtype)
        if arch == "gemma3":
            x = x * self.dtype(25.25)  # sqrt(640) in bfloat16, as Gemma was trained
        for layer in range(meta["block_count"]):
            block = f"blk.{layer}"
            is_local = arch == "gemma3" and (layer + 1) % 6 != 0
            base = 10_000.0 if is_local else meta["rope.freq_base"]
            h = rms(x, f"{block}.attn_norm.weight")
            q = linear(h, f"{block}.attn_q").reshape(-1, n_heads, head_dim)
            k = linear(h, f"{block}.attn_k").reshape(-1, n_kv_heads, head_dim)
            v = linear(h, f"{block}.attn_v").reshape(-1, n_kv_heads, head_dim)
            if arch == "gemma3":
                q, k = rms(q, f"{block}.attn_q_norm.weight"), rms(k, f"{block}.attn_k_norm.weight")
            q, k = (self._rotate(z, positions, base, interleaved=arch == "llama") for z in (q, k))
            distance = positions[:, None] - positions[None, :]
            visible = (distance >= 0) & (distance < (meta["attention.sliding_window"] if is_local else len(tokens)))
            heads = []
            for head in range(n_heads):
                group = head // (n_heads // n_kv_heads)
                scores = q[:, head] @ k[:, group].T / np.sqrt(self.dtype(head_dim))
                scores = np.where(visible, scores, -np.inf)
                p = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(p / p.sum(-1, keepdims=True) @ v[:, group])
            attended = linear(np.concatenate(heads, -1), f"{block}.attn_output")
            if arch == "gemma3":
                attended = rms(attended, f"{block}.post_attention_norm.weight")
            x = x + attended
            h = rms(x, f"{block}.ffn_norm.weight")
            gate = linear(h, f"{block}.ffn_gate")
            fed = linear(self._activation(gate, arch) * linear(h, f"{block}.ffn_up"), f"{block}.ffn_down")
            x = x + (rms(fed, f"{block}.post_ffw_norm.weight") if arch == "gemma3" else fed)
        x = rms(x[-last:], "output_norm.weight")
        return x @ weight("output.weight" if "output.weight" in names else "token_embd.weight").T

    def _rotate(self, x, positions, base, *, interleaved):
        """Rotary embedding of ``[T, H, D]``; llama's GGUF rows pair neighbours, the others pair halves."""
        half = x.shape[-1] // 2
        angle = positions[:, None] * base ** (-np.arange(half) / half)
        cos, sin = (f(angle)[:, None, :].astype(self.dtype) for f in (np.cos, np.sin))
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        first, second = a * cos - b * sin, a * sin + b * cos
        if interleaved:
            return np.stack([first, second], -1).reshape(x.shape)
        return np.concatenate([first, second], -1)

    @staticmethod
    def _activation(x, arch):
        if arch == "gemma3":
            return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.dtype) * (x + x.dtype.type(0.044715) * x**3)))
        return x / (1 + np.exp(-x))


@pytest.fixture
def on_cpu():
    """fp32 weights: on Metal a model would be loaded in fp16."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def check_against_numpy(name: str, n_tokens: int) -> None:
    handle = resolve_model(name, accept_licence=True)
    model, tokenizer = load_model(handle)
    tokens = token_block(load_text("bundled"), tokenizer, n_sequences=1, length=n_tokens).tokens[0]
    ours = np.array(model(mx.array(tokens)[None])[0, -64:].astype(mx.float32))
    path = known_models()[name].weights.path
    stored = read_gguf(path) if path.suffix == ".gguf" else read_llama2c(path)
    exact = NumpyForward(stored, np.float64).logits(tokens, last=64)
    noise = np.abs(NumpyForward(stored, np.float32).logits(tokens, last=64) - exact).max()
    error = np.abs(ours - exact).max()
    print(f"{name}: logits up to {np.abs(exact).max():.1f}, fp32 noise {noise:.2e}, mlx-lm {error:.2e}")
    assert noise <= TOLERANCE["largest fp32 noise floor"]
    assert error <= TOLERANCE["fp32 noise floors"] * noise


@pytest.mark.usefixtures("on_cpu")
def test_smollm2_logits_match_numpy():
    """64 real tokens: mlx-lm on the conversion agrees with NumPy on the GGUF to fp32 rounding."""
    check_against_numpy("smollm2-135m", 64)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("name", "n_tokens"), [("qwen2.5-coder-0.5b", 64), ("gemma3-270m", 576), ("stories15m", 64)])
def test_other_architectures_match_numpy(name, n_tokens):
    """Biases and untied outputs (qwen2), the 512-token window and both rotation bases (gemma3) are converted right."""
    check_against_numpy(name, n_tokens)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_transformers_reads_the_same_gguf():
    """transformers' own GGUF reader and SmolLM2 give mlx-lm's logits on 64 real tokens."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    handle = resolve_model("smollm2-135m")
    model, tokenizer = load_model(handle)
    tokens = token_block(load_text("bundled"), tokenizer, n_sequences=1, length=64).tokens
    ours = np.array(model(mx.array(tokens)))
    path = known_models()["smollm2-135m"].weights.path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(ours - expected).max() <= TOLERANCE["fp32 noise floors"] * TOLERANCE["largest fp32 noise floor"]


def test_halves_from_pairs_by_hand():
    """One head of dimension 4: rows stored as pairs (0, 2), (1, 3) come back as halves 0, 1 | 2, 3."""
    stored = np.array([[0.0], [2.0], [1.0], [3.0]], dtype=np.float32)
    assert halves_from_pairs(stored, 1).ravel().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_unknown_architecture_is_named():
    """A GGUF of another architecture is refused with the list of known ones."""
    with pytest.raises(UsageError, match="'mamba' cannot be converted; known: llama, qwen2, gemma3"):
        gguf_config({"general.architecture": "mamba"}.get, set())


def test_truncated_llama2c_file(tmp_path):
    """A llama2.c file that ends early is refused, naming the tensor that it ends in."""
    header = np.array([8, 16, 1, 2, 2, 32, 16], dtype="<i4").tobytes()
    (tmp_path / "short.data").write_bytes(header + bytes(4 * 32 * 8))
    with pytest.raises(IntegrityError, match=r"short\.data ends inside input_layernorm"):
        convert_llama2c(tmp_path / "short.data", tmp_path, SilentReporter())


SMOLLM2_CHAT = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712]


def test_smollm2_tokens_are_the_published_ones():
    """The system prompt of SmolLM2's chat template has the token ids of the model's own tokenizer on the hub."""
    handle = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(handle.directory)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert ids[: len(SMOLLM2_CHAT)] == SMOLLM2_CHAT
    assert tokenizer.eos_token_id == 2


def test_smollm2_round_trip_on_real_text():
    """Text that is tokenized comes back byte for byte, and mlx-lm's tokenizer is tokenizer.json itself."""
    handle = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(handle.directory)
    text = load_text("bundled").joined + " caf\u00e9, na\u00efve \u65e5\u672c\n\n\t1234567  x"
    ids = tokenizer.encode(text, verbose=False)
    assert tokenizer.decode(ids) == text
    assert Tokenizer.from_file(str(handle.directory / "tokenizer.json")).encode(text).ids == ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ids"),
    [("qwen2.5-coder-0.5b", [9707, 1879]), ("gemma3-270m", [2, 9259, 1902]), ("stories15m", [1, 15043, 3186])],
)
def test_hello_world(name, ids):
    """'Hello world' has the ids of Qwen2's, Gemma's and Llama's own tokenizers; Gemma and Llama begin with BOS."""
    handle = resolve_model(name, accept_licence=True)
    assert load_tokenizer(handle.directory).encode("Hello world") == ids
