"""GGUF (and llama2.c) files to mlx-lm directories: fp32 weights, config.json, tokenizer.json.

The dequantized weights are exact: fp32 holds every value that a 4-bit code times its scale can take. Facts of the
format that matter here (llama.cpp, ``convert_hf_to_gguf.py`` and ``gguf`` 0.17):

- *llama*: rows of q and k are stored for interleaved rotation (pairs 2i, 2i+1); mlx-lm rotates halves
  (i, i + head_dim/2), so the rows are put back. Other architectures are stored as they are.
- *gemma3*: norm weights are stored as 1 + w; mlx-lm's RMSNorm adds the 1 itself, so w is written. The period of the
  sliding window (6) and the local rotation base (10000) are constants of the architecture, absent from the file.
- *qwen2*: q, k and v have biases. Output weights are kept when the file has its own, else tied to the embedding.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from veloxbench.errors import IntegrityError, UsageError
from veloxbench.inputs.transfer_progress import Reporter

CONVERSION_VERSION = 1  # part of the directory's name: raising it makes every model convert again

_SHARD_NBYTES = 1 << 30  # bounds the memory that a conversion needs

Array = npt.NDArray[np.float32]

_BLOCK_NAMES = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "qwen2": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    },
}
_COMMON_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_GEMMA3_WINDOW_PATTERN = 6
_GEMMA3_LOCAL_ROPE_BASE = 10_000.0

# Split rules that the pre-tokenizer names of GGUF stand for.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOKEN_CONTROL, _TOKEN_USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def convert_gguf(path: Path, directory: Path, reporter: Reporter, *, tokenizer_json: Path | None = None) -> None:
    """Write an mlx-lm directory from a GGUF file.

    Args:
        path: the GGUF file (architectures llama, qwen2, gemma3).
        directory: an existing directory to write into.
        reporter: told about bytes of fp32 weights written.
        tokenizer_json: a `tokenizers` file to use in place of the GGUF's vocabulary.
    Raises:
        UsageError: an architecture or a tokenizer that this conversion does not know.
    """
    from gguf import GGUFReader  # half a second, which only a conversion needs

    reader = GGUFReader(path)

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(key)
        return default if field is None else field.contents()

    config = gguf_config(value, tensor_names={tensor.name for tensor in reader.tensors})
    tensors = ((_mlx_name(tensor.name, config), _mlx_weight(tensor, config)) for tensor in reader.tensors)
    _write_weights(tensors, directory, reporter)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(tokenizer_json)) if tokenizer_json else _bpe_tokenizer(value)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokens = value("tokenizer.ggml.tokens")
    special = {
        name: tokens[value(f"tokenizer.ggml.{key}_token_id")]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if value(f"tokenizer.ggml.{key}_token_id") is not None
    }
    _write_tokenizer_config(
        directory,
        special,
        context=config["max_position_embeddings"],
        chat_template=value("tokenizer.chat_template"),
        add_bos=bool(value("tokenizer.ggml.add_bos_token", False)),
    )


def gguf_config(value: Callable[..., Any], tensor_names: set[str]) -> dict[str, Any]:
    """mlx-lm's config.json from GGUF metadata.

    Args:
        value: ``value(key, default=None)`` reads one metadata entry.
        tensor_names: what the file holds; without ``output.weight`` the embedding is tied.
    Raises:
        UsageError: an unknown architecture.
    """
    arch = value("general.architecture")
    if arch not in _BLOCK_NAMES:
        raise UsageError(f"GGUF architecture {arch!r} cannot be converted; known: {', '.join(_BLOCK_NAMES)}")

    def of_arch(key: str, default: Any = None) -> Any:
        return value(f"{arch}.{key}", default)

    n_heads = of_arch("attention.head_count")
    config = {
        "model_type": {"gemma3": "gemma3_text"}.get(arch, arch),
        "hidden_size": of_arch("embedding_length"),
        "intermediate_size": of_arch("feed_forward_length"),
        "num_hidden_layers": of_arch("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": of_arch("attention.head_count_kv", n_heads),
        "head_dim": of_arch("attention.key_length", of_arch("embedding_length") // n_heads),
        "rms_norm_eps": _short(of_arch("attention.layer_norm_rms_epsilon")),
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "max_position_embeddings": of_arch("context_length"),
        "rope_theta": _short(of_arch("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }
    if arch == "gemma3":
        config |= {
            "sliding_window": of_arch("attention.sliding_window"),
            "sliding_window_pattern": _GEMMA3_WINDOW_PATTERN,
            "rope_local_base_freq": _GEMMA3_LOCAL_ROPE_BASE,
            "query_pre_attn_scalar": config["head_dim"],
        }
    return config


def _short(number: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _mlx_name(name: str, config: Mapping[str, Any]) -> str:
    """GGUF's tensor name as mlx-lm's parameter name."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    arch = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    part = match and (_COMMON_NAMES | _BLOCK_NAMES[arch]).get(match[2])
    if match is None or part is None:
        raise UsageError(f"GGUF tensor {name!r} has no place in mlx-lm's {config['model_type']}")
    return f"model.layers.{match[1]}.{part}.{kind}"


def _mlx_weight(tensor: Any, config: Mapping[str, Any]) -> Array:
    from gguf import dequantize

    weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if config["model_type"] == "llama" and re.fullmatch(r"blk\.\d+\.attn_[qk]\.\w+", tensor.name):
        n_heads = config["num_attention_heads" if "attn_q" in tensor.name else "num_key_value_heads"]
        return halves_from_pairs(weight, n_heads)
    if config["model_type"] == "gemma3_text" and tensor.name.endswith("norm.weight"):
        return weight - np.float32(1.0)
    return weight


def halves_from_pairs(weight: Array, n_heads: int) -> Array:
    """Rows of a q or k projection from interleaved rotation (2i, 2i+1) to rotation of halves (i, i + head_dim/2).

    Args:
        weight: ``[n_heads * head_dim, ...]``.
        n_heads: query heads for q, KV heads for k.
    """
    rows, *rest = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, *rest)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, *rest))


def _write_weights(tensors: Iterable[tuple[str, Array]], directory: Path, reporter: Reporter) -> None:
    """``model*.safetensors``, in pieces so that only one piece is in memory."""
    shards: list[Path] = []
    pending: dict[str, Array] = {}
    nbytes = 0

    def flush() -> None:
        nonlocal pending, nbytes
        shards.append(directory / f"model-{len(shards) + 1:05d}.safetensors")
        try:
            save_file(pending, shards[-1], metadata={"format": "mlx"})
        except SafetensorError as error:  # a full disk, said in its own way
            raise OSError(f"{shards[-1].name}: {error}") from error
        pending, nbytes = {}, 0

    for name, weight in tensors:
        if pending and nbytes + weight.nbytes > _SHARD_NBYTES:
            flush()
        pending[name] = weight
        nbytes += weight.nbytes
        reporter.advance(weight.nbytes)
    flush()
    if len(shards) == 1:
        shards[0].rename(directory / "model.safetensors")


def _bpe_tokenizer(value: Callable[..., Any]) -> Tokenizer:
    """The byte-level BPE that a GGUF describes (``tokenizer.ggml.model`` = gpt2)."""
    kind, rule = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in ("smollm", "qwen2"):
        raise UsageError(f"GGUF tokenizer {kind!r} with pre-tokenizer {rule!r} cannot be converted")
    tokens: list[str] = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = {"add_prefix_space": False, "trim_offsets": True}
    if rule == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**byte_level, use_regex=True)]
        )
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(**byte_level, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    types = value("tokenizer.ggml.token_type")
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_TOKEN_CONTROL, _TOKEN_USER_DEFINED):
            added = AddedToken(token, special=token_type == _TOKEN_CONTROL, normalized=False)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    if value("tokenizer.ggml.add_bos_token", False):
        bos_id = value("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = _starts_with(tokens[bos_id], bos_id)
    return tokenizer


def _starts_with(bos: str, bos_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)])


def _write_tokenizer_config(
    directory: Path, special: Mapping[str, str], *, context: int, chat_template: str | None, add_bos: bool
) -> None:
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        **special,
    }
    if chat_template is not None:
        content["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


# llama2.c (github.com/karpathy/llama2.c): seven int32, then fp32 tensors, each for all layers at once.
_LLAMA2C_HEADER = struct.Struct("<7i")


def convert_llama2c(path: Path, directory: Path, reporter: Reporter) -> None:
    """Write an mlx-lm directory from a llama2.c model followed by its tokenizer, in one file.

    Raises:
        IntegrityError: the file is too short for what its header announces.
    """
    data = path.read_bytes()
    dim, hidden, n_layers, n_heads, n_kv_heads, signed_vocab, context = _LLAMA2C_HEADER.unpack_from(data)
    vocab, head_dim = abs(signed_vocab), dim // n_heads  # a negative size announces untied output weights
    kv_dim = n_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, dim),
        "input_layernorm": (n_layers, dim),
        "self_attn.q_proj": (n_layers, dim, dim),
        "self_attn.k_proj": (n_layers, kv_dim, dim),
        "self_attn.v_proj": (n_layers, kv_dim, dim),
        "self_attn.o_proj": (n_layers, dim, dim),
        "post_attention_layernorm": (n_layers, dim),
        "mlp.gate_proj": (n_layers, hidden, dim),
        "mlp.down_proj": (n_layers, dim, hidden),
        "mlp.up_proj": (n_layers, hidden, dim),
        "model.norm": (dim,),
        "rotation tables, which mlx-lm computes itself": (2, context, head_dim // 2),
    }
    if signed_vocab < 0:
        shapes["lm_head"] = (vocab, dim)
    arrays: dict[str, Array] = {}
    offset = _LLAMA2C_HEADER.size
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        if offset + 4 * count > len(data):
            raise IntegrityError(f"{path.name} ends inside {name}: {len(data)} bytes")
        arrays[name] = np.frombuffer(data, "<f4", count, offset).reshape(shape)
        offset += 4 * count

    def tensors() -> Iterator[tuple[str, Array]]:
        for name, array in arrays.items():
            if name.startswith(("model.", "lm_head")):
                yield f"{name}.weight", array
            elif name.startswith(("self_attn", "mlp", "input", "post")):
                for layer in range(n_layers):
                    weight = array[layer]
                    if "q_proj" in name or "k_proj" in name:
                        weight = halves_from_pairs(weight, n_heads if "q_proj" in name else n_kv_heads)
                    yield f"model.layers.{layer}.{name}.weight", weight

    _write_weights(tensors(), directory, reporter)
    config = {
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": signed_vocab > 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer = _llama2c_tokenizer(data[offset:], vocab)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _write_tokenizer_config(directory, special, context=context, chat_template=None, add_bos=True)


def _llama2c_tokenizer(data: bytes, vocab_size: int) -> Tokenizer:
    """Llama's SentencePiece BPE; merges follow from the pieces and their scores."""
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4  # int32: the longest piece
    for _ in range(vocab_size):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        pieces.append(data[offset : offset + length].decode("utf-8", "replace").replace(" ", "▁"))
        scores.append(score)
        offset += length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]  # stored as the bare bytes
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (-scores[i], (piece[:cut], piece[cut:]))
        for i, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=[pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer.post_processor = _starts_with("<s>", 1)
    return tokenizer
