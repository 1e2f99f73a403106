"""Small real architectures with seeded random weights, and NumPy inputs."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import gemma3_text, lfm2, llama

from veloxquant_mlx.methods import METHODS


def seeded(model: Any, seed: int) -> Any:
    """Replace every weight by seeded NumPy normals of deviation 1/sqrt(fan-in); norms stay."""
    rng = np.random.default_rng(seed)

    def draw(weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return weight
        noise = rng.standard_normal(weight.shape).astype(np.float32)
        return mx.array(noise / np.sqrt(np.float32(weight.shape[-1])))

    model.update(tree_map(draw, model.parameters()))
    return model


def llama_of(**sizes: Any) -> Any:
    """A llama with the weights that mlx-lm gives it."""
    sizes = {"model_type": "llama", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 128} | sizes
    return llama.Model(llama.ModelArgs(**sizes))


def tiny_llama(n_layers: int = 3, head_dim: int = 64, n_heads: int = 4, n_kv_heads: int = 2) -> Any:
    """A llama of a few layers."""
    heads = {"num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads, "head_dim": head_dim}
    model = llama_of(hidden_size=96, num_hidden_layers=n_layers, intermediate_size=192, rope_theta=10000.0, **heads)
    return seeded(model, 1)


def gemma3_of(**sizes: Any) -> Any:
    """A gemma3 with the weights that mlx-lm gives it: every ``sliding_window_pattern``-th layer is global."""
    sizes = {"model_type": "gemma3_text", "num_key_value_heads": 1, "vocab_size": 128} | sizes
    return gemma3_text.Model(gemma3_text.ModelArgs(**sizes))


def tiny_gemma3(window: int = 16) -> Any:
    """A gemma3 with one global layer among sliding-window layers of ``window`` tokens."""
    windows = {"sliding_window": window, "sliding_window_pattern": 3}
    heads = {"num_attention_heads": 4, "head_dim": 64, "query_pre_attn_scalar": 64}
    return seeded(gemma3_of(hidden_size=96, num_hidden_layers=4, intermediate_size=192, **heads, **windows), 2)


def lfm2_of(**sizes: Any) -> Any:
    """An lfm2 with the weights that mlx-lm gives it: attention in the layers ``full_attn_idxs``, else convolutions."""
    sizes = {
        "model_type": "lfm2",
        "vocab_size": 128,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    } | sizes
    return lfm2.Model(lfm2.ModelArgs(**sizes))


def gaussian(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Seeded N(0, 1) in fp32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


_SMALL: dict[str, dict[str, Any]] = {
    "turboquant_mse": {"code_bits": 3},
    "turboquant_prod": {"code_bits": 3},
    "turboquant_prod_adaptive": {"block_size": 8, "distortion_threshold": 0.1},
    "rvq": {"code_bits": 2},
    "affine": {"code_bits": 4, "group_size": 16},
    "kivi": {"code_bits": 2, "group_size": 8, "window": 16},
    "turboquant_static": {"code_bits": 2, "calibration": 16},
    "ratequant": {"bit_allocation": {"layer_0": 2, "layer_1": 4, "layer_2": 1}},
}
"""Options with small blocks, so that short sequences (of a model of three layers) reach all code paths."""

ALL_METHODS: dict[str, dict[str, Any]] = {name: _SMALL.get(name, {}) for name in METHODS}
"""Every registered method, as it is by default where nothing smaller is named."""
