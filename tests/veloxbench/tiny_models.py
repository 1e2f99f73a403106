"""Models of a few kilobytes, in the two forms that are read."""

import json

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

HIDDEN, LAYERS, VOCABULARY = 32, 3, 64


def tiny_llama(directory):
    """A llama with three layers as any tool might have saved it: bfloat16 weights, config, tokenizer, model card."""
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
    save_tokenizer(directory, VOCABULARY)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return directory


def save_tokenizer(directory, vocabulary):
    """One token a word, the words w0, w1, …"""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


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
