"""The rotation of every layer is read from the model itself, and can be undone and redone."""

from __future__ import annotations

import importlib
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from impl_inputs import gaussian, seeded
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, Llama3RoPE, SuScaledRoPE, YarnRoPE

from veloxquant_mlx.transforms.rope import Rope, angle_tolerance, probe_rope, probe_ropes

FP32 = 2e-5
"""Relative: two fp32 rotations, each two products and a sum of entries near 1, cosines to 1e-6."""

COMMON: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "vocab_size": 128,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "kv_lora_rank": 20,
    "v_head_dim": 24,
    "n_routed_experts": None,
    "num_key_value_heads": 4,
}
LONG = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 1024,
}
Expected = tuple[int, int, bool]
"""First rotated coordinate, how many rotate, whether neighbours are paired: from each architecture's definition."""

CASES: dict[str, tuple[str, dict[str, Any], list[Expected]]] = {
    "llama": ("llama", {}, [(0, 32, False)] * 3),
    "llama linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}, [(0, 32, False)] * 3),
    "llama yarn": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
        [(0, 32, False)] * 3,
    ),
    "llama llama3": (
        "llama",
        {
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
        [(0, 32, False)] * 3,
    ),
    "qwen2 with key bias": ("qwen2", {"hidden_size": 128}, [(0, 32, False)] * 3),
    "qwen3 with normalised keys": ("qwen3", {}, [(0, 32, False)] * 3),
    "phi3 longrope, partial": (
        "phi3",
        {"hidden_size": 128, "partial_rotary_factor": 0.5, "rope_scaling": LONG},
        [(0, 16, False)] * 3,
    ),
    "gpt_neox partial": (
        "gpt_neox",
        {"hidden_size": 128, "rotary_pct": 0.25, "rotary_emb_base": 10000},
        [(0, 8, False)] * 3,
    ),
    "cohere, neighbours paired": ("cohere", {"hidden_size": 128}, [(0, 32, True)] * 3),
    "smollm3, one layer of two without": (
        "smollm3",
        {"no_rope_layer_interval": 2},
        [(0, 32, False), (0, 0, False)] * 2,
    ),
    "olmo2": ("olmo2", {}, [(0, 32, False)] * 3),
    "glm4 partial, neighbours": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True}, [(0, 16, True)] * 3),
    "minicpm3, the last half": ("minicpm3", {**LATENT, "rope_scaling": LONG}, [(16, 16, False)] * 3),
    "nanochat, without a module": ("nanochat", {"hidden_size": 128}, [(0, 32, False)] * 3),
    "internlm3, long context scaled": ("internlm3", {"bias": False, "qkv_bias": False}, [(0, 24, False)] * 3),
}


def build(kind: str, settings: dict[str, Any]) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {**COMMON, "scale_depth": 1.0, "scale_emb": 1, "dim_model_base": 96, **settings, "model_type": kind}
    return seeded(module.Model(module.ModelArgs.from_dict(config)), 1)


def relative(got: mx.array, wanted: mx.array) -> float:
    return float((mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted)).item())


@pytest.mark.parametrize("name", CASES)
def test_each_architecture_is_read_as_it_is_defined(name: str) -> None:
    """Rotated coordinates and pairing are those of the architecture; keys at a far offset lose their position."""
    kind, settings, expected = CASES[name]
    model = build(kind, settings)
    ropes = probe_ropes(model)
    read = [(r.keys.start, r.keys.dims, r.keys.traditional) for r in ropes.values()]
    assert read == expected[: len(read)]
    assert all(r.values.dims == 0 for r in ropes.values())
    ids = mx.array([[5, 6, 7, 5, 6, 7]])
    caches = make_prompt_cache(model)
    model(ids, cache=caches)
    pre = ropes[0].keys.unrotate(caches[0].keys[:, :, :6], 0)
    assert relative(pre[:, :, 3:], pre[:, :, :3]) < FP32  # layer 0 sees the tokens alone: 5 is 5 at 0 and at 3
    for layer, rope in ropes.items():
        keys = caches[layer].keys[:, :, :6]
        assert relative(rope.keys.rotate(rope.keys.unrotate(keys, 12_345), 12_345), keys) < FP32


def test_a_model_may_rotate_its_layers_differently() -> None:
    """gemma3's sliding layers turn with base 10,000, its full ones with 1,000,000."""
    settings = {"rope_theta": 1e6, "sliding_window": 16, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32}
    ropes = probe_ropes(build("gemma3_text", settings))
    slowest = [r.keys.frequencies[-1] for r in ropes.values()]
    assert slowest == pytest.approx([1e4 ** -(30 / 32), 1e4 ** -(30 / 32), 1e6 ** -(30 / 32)], rel=1e-5)


def test_a_latent_cache_is_rotated_on_its_second_side() -> None:
    """deepseek_v3 caches the latent unrotated as keys and the shared rotated part as values."""
    ropes = probe_ropes(build("deepseek_v3", LATENT))
    assert [(r.keys.dim, r.keys.dims, r.values.dim, r.values.dims) for r in ropes.values()] == [(20, 0, 16, 16)] * 3


def test_positions_that_are_added_leave_nothing_to_undo() -> None:
    """GPT-2 learns positions in its embedding: no rotation."""
    settings = {"n_ctx": 64, "n_embd": 96, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5}
    assert all(r.keys.dims == 0 for r in probe_ropes(build("gpt2", settings)).values())


def test_a_rope_that_depends_on_the_length_is_refused() -> None:
    """Dynamic NTK scaling turns early tokens otherwise once the sequence is long: one sentence says so."""
    model = build("llama", {"rope_scaling": {"type": "dynamic", "factor": 3.0}})
    with pytest.raises(ValueError, match=r"layer 0 rotates its keys .* depends on the length of the sequence"):
        probe_ropes(model)


MODULES = {
    "plain": (nn.RoPE(64), 64),
    "neighbours": (nn.RoPE(64, traditional=True, base=1e6), 64),
    "slower by 3": (nn.RoPE(48, scale=1 / 3), 48),
    "partial": (nn.RoPE(32), 80),
    "llama3": (
        Llama3RoPE(
            128,
            base=500000.0,
            scaling_config={"factor": 32.0, "original_max_position_embeddings": 8192, "high_freq_factor": 4.0},
        ),
        128,
    ),
    "yarn": (YarnRoPE(64, scaling_factor=8.0, mscale=1.2, mscale_all_dim=0.5), 64),
    "longrope": (SuScaledRoPE(64, long_factor=[1.0 + i / 4 for i in range(32)]), 96),
    "widest": (nn.RoPE(256), 256),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("position", [0, 1, 333, 8191, 30_000])
def test_a_module_and_what_was_read_of_it_agree(name: str, position: int) -> None:
    """Entries differ by no more than fp32 angles can, at any position up to 30,000."""
    module, dim = MODULES[name]
    rope = probe_rope(module, dim)
    x = mx.array(gaussian((2, 3, 7, dim)))
    allowed = 6 * rope.scale * angle_tolerance(position + 6, rope.frequencies)  # |x| of a pair below 6 deviations
    assert mx.abs(rope.rotate(x, position) - module(x, position)).max().item() <= allowed


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("position", [0, 30_000, 1_000_000])
def test_undoing_is_exact_wherever_the_module_was_probed(name: str, position: int) -> None:
    """Undo and redo use the same angles: what is left is fp32 rounding, also at a million tokens."""
    module, dim = MODULES[name]
    rope = probe_rope(module, dim)
    x = mx.array(gaussian((2, 3, 7, dim)))
    assert relative(rope.rotate(rope.unrotate(x, position), position), x) < FP32
    assert relative(rope.unrotate(module(x, 20), 20), x) < FP32


def test_each_row_may_stand_at_its_own_offset() -> None:
    """An array of offsets rotates row b as its own int offset does."""
    rope = probe_rope(YarnRoPE(32, scaling_factor=4.0), 40)
    x = mx.array(gaussian((3, 2, 5, 40)))
    offsets = [0, 17, 4000]
    together = rope.rotate(x, mx.array(offsets))
    for row, offset in enumerate(offsets):
        assert relative(together[row : row + 1], rope.rotate(x[row : row + 1], offset)) < FP32
    assert relative(rope.unrotate(together, mx.array(offsets)), x) < FP32


def test_a_turn_of_a_right_angle() -> None:
    """One pair at a quarter turn a token: (1, 0) becomes (0, 1), scaled by 2."""
    rope = Rope(4, start=1, dims=2, frequencies=(math.pi / 2,), scale=2.0)
    x = mx.array([[[[5.0, 1.0, 0.0, 7.0]]]])
    assert np.allclose(np.array(rope.rotate(x, 1)).ravel(), [5, 0, 2, 7], atol=1e-6)


class Mixing(nn.Module):
    """An orthogonal map of all coordinates, and not of pairs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        q, _ = np.linalg.qr(gaussian((dim, dim)))
        self.turn = mx.array(q.astype(np.float32))

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return x if offset == 0 else x @ self.turn


class Squaring(nn.Module):
    """A rotation by the square of the position."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        angles = (mx.arange(x.shape[2]) + offset).astype(mx.float32) ** 2 % 6.0
        a, b = x[..., 0], x[..., 1]
        return mx.stack([a * mx.cos(angles) - b * mx.sin(angles), a * mx.sin(angles) + b * mx.cos(angles)], axis=-1)


@pytest.mark.parametrize(
    ("module", "dim", "reason"),
    [
        (Mixing(8), 8, "depends on the length|mixes more than pairs"),
        (Squaring(), 2, "no scaled rotation by angles proportional"),
        (DynamicNTKScalingRoPE(16, 1024, False, 1e4, 2.0), 16, "depends on the length"),
        (lambda x, offset: x + 1, 4, "does not map position 0 to itself"),
        (lambda x, offset: 2 * x, 4, "scales its input and does not rotate it"),
        (lambda x, offset: x * float("nan"), 4, "depends on the length|not map position 0"),
    ],
)
def test_what_is_no_rotation_is_refused(module: Any, dim: int, reason: str) -> None:
    """A module that is no scaled rotation by angles proportional to the position is an error that says why."""
    with pytest.raises(ValueError, match=reason):
        probe_rope(module, dim)


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": 4, "dims": 3},
        {"dim": 4, "start": 2, "dims": 4, "frequencies": (1.0, 1.0)},
        {"dim": 4, "dims": 4, "frequencies": (1.0,)},
        {"dim": 4, "dims": 2, "frequencies": (math.nan,)},
        {"dim": 4, "dims": 2, "frequencies": (1.0,), "scale": 0.0},
    ],
)
def test_an_impossible_rope_is_refused(fields: dict[str, Any]) -> None:
    """Rotated coordinates are even, within the vector, each pair with its own finite frequency."""
    with pytest.raises(ValueError, match="must"):
        Rope(**fields)
