"""Every architecture of mlx-lm in a tiny size: one value per field name, and a table of what else a model needs."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Final

import mlx_lm.models
from impl_inputs import seeded

WINDOW: Final = 8
"""Tokens that a sliding layer sees."""

LAYERS: Final = 4
VOCABULARY: Final = 128

_SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_MAMBA = {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_d_conv": 4}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
}

COMMON: Final[dict[str, Any]] = {
    # sizes, by the names that models give them
    **dict.fromkeys(("hidden_size", "hidden_dim", "model_dim", "n_embd", "d_model", "block_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "num_query_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "hidden_size_per_head", "global_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "model_max_length", "n_positions", "n_ctx", "block_size"), 512),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ff_intermediate_size", "block_ff_dim", "n_inner"), 96),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW),
    # every expert is chosen: a choice that flips by rounding is no error of a cache
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_layer_freq", "decoder_sparse_step"), 1),
    **dict.fromkeys(("routed_scaling_factor", "logits_scaling", "attention_multiplier"), 1.0),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "scale_depth", "scale_emb"), 1.0),
    **dict.fromkeys(("norm_topk_prob", "use_qk_norm", "qk_norm"), True),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "tie_word_embeddings"), False),
    **dict.fromkeys(("conv_bias", "use_conv_bias", "post_norm", "mamba_proj_bias", "use_expert_bias"), False),
    **dict.fromkeys(("mlp_only_layers", "first_k_dense_replace", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "layernorm_epsilon"), 1e-5),
    "mlp_only_layers": [],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "sliding_window_pattern": 2,
    "layer_types": _SLIDING,
    "query_pre_attn_scalar": 16,
    "dim_model_base": 64,
    "conv_L_cache": 3,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    **_MAMBA,
    **_LATENT,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 512,
}
"""Small values by field name; a field that is not named keeps its model's own default."""

_GROUPED = {"layer_group_size": 2, "group_norm_size": 4}
_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_BY_TYPE = {"sliding_attention": _PLAIN, "full_attention": _PLAIN}
_STATE = {"state_size": 16, "conv_kernel": 4, "time_step_rank": 4, "n_groups": 1, "time_step_limit": [0.001, 100.0]}
_LINEAR = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 1,
    "moe_topk": 3,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "num_layers": 2,
}
_LFM2 = {
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "layer_types": None,
    "full_attn_idxs": [1, 3],
    "num_dense_layers": 1,
}
OVERRIDES: Final[dict[str, dict[str, Any]]] = {
    "afm7": {"num_kv_reuse_layers": 2},
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "bailing_hybrid": _GROUPED,
    "bailing_moe_linear": _GROUPED,
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True] * 2},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "rope_local_base_freq": 1000.0,
        "final_logit_softcapping": 10.0,
        "activation_sparsity_pattern": [0.95] * LAYERS,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 4,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
    "gemma4_text": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": _PLAIN},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_groups": 1,
        "mamba_conv_bias": False,
        "mamba_n_heads": 8,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_k3": {"linear_attn_config": _LINEAR},
    "kimi_linear": {"linear_attn_config": _LINEAR},
    "lfm2": _LFM2,
    "lfm2-vl": _LFM2,
    "lfm2_moe": _LFM2,
    "llama4": {
        "attention_chunk_size": 2 * WINDOW,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "rope_scaling": None,
    },
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mamba": _STATE,
    "mamba2": {**_STATE, "hidden_size": 32},
    "mellum": {"rope_parameters": _BY_TYPE},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1] * 2,
        "moe_layer_freq": [0, 1] * 2,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "minicpm3": {"rope_scaling": _LONG},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1] * 2,
        "dense_intermediate_size": 96,
        "index_block_size": 8,
        "index_topk_blocks": 64,
        "layer_types": ["full_attention", "sparse"] * 2,
    },
    "ministral3": {"rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "muse_spark": {
        "post_norm_eps": 1e-5,
        "rope_parameters": _PLAIN,
        "layer_rope_theta": [1000.0, 0.0] * 2,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 1.0,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.5}},
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "*"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
    },
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {
        "ffn_dim_divisor": 16,
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [1, 2, 2, 4],
        "ffn_multipliers": [1.0] * LAYERS,
    },
    "phi3small": {"dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, "blocksparse_block_size": 64},
    "plamo": {"n_shared_head": 2},
    "recurrent_gemma": {"conv1d_width": 4, "logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "spark2_5": {"rope_parameters": _BY_TYPE},
}
"""What one model needs besides, or otherwise."""


def architectures() -> list[str]:
    """Names of the modules of ``mlx_lm.models`` that hold a model, whether it builds or not."""
    names = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [name for name in names if name not in PARTS]


PARTS: Final = frozenset(
    [
        "activations",
        "base",
        "bitlinear_layers",
        "cache",
        "gated_delta",
        "mla",
        "pipeline",
        "rope_utils",
        "ssm",
        "switch_layers",
    ]
)
"""Modules that hold parts of models."""


def configuration(name: str) -> dict[str, Any]:
    """The configuration of a tiny model; one of text beside images holds its own under ``text_config``."""
    own = OVERRIDES.get(name, {})
    inner = {"model_type": name, **COMMON, **own}
    return {**inner, "text_config": inner}


def tiny(name: str) -> Any:
    """A tiny model of an architecture, with seeded weights.

    Raises:
        Whatever the model raises where its configuration does not build.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    return seeded(module.Model(module.ModelArgs.from_dict(configuration(name))), 1)
