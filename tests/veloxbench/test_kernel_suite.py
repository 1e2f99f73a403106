"""The kernel suite's records: counted, exact, the same in every run, and refused where nothing can count."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from veloxbench.cli.app import _run as veloxbench
from veloxbench.inputs.models import load_model, resolve_model
from veloxbench.measure.account import engagement
from veloxbench.measure.kernels import HeadShape, Traffic, count, head_shape, refusal
from veloxbench.methods.cache_under_test import CacheUnderTest
from veloxbench.records.store import read_records
from veloxquant_kernels import emulator
from veloxquant_kernels.emulator import build
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.cache.fused import remove_route

KINDS = ("partials", "codebooks", "signs", "mask", "queries", "output")


@pytest.fixture
def kernel_grid(grid_file):
    """The few seconds' grid with one width of kernels at 4096 tokens."""
    grid_file.write_text(grid_file.read_text() + "\n[kernels]\ntokens = 4096\ncode_bits = [2]\n")
    return grid_file


def test_a_run_records_traffic_and_the_page_shows_it(compiler, cut_model, kernel_grid, tmp_path):
    """At 4096 tokens and 2 bits packed bytes are read once, all else is within a tenth, and two runs agree exactly."""
    found = []
    for name in ("first", "second"):
        out = tmp_path / name
        arguments = ["run", "--profile", str(kernel_grid), "--models", str(cut_model), "--suites", "kernels"]
        assert veloxbench([*arguments, "--out", str(out)]) == 0
        found += read_records(out)
    first, second = found
    assert first.metrics == second.metrics
    assert first.key == second.key
    figures = {name: estimate.value for name, estimate in first.metrics.items()}
    assert figures["packed_bytes"] == 4096 * 2 * (64 * 2 // 8 + 2)
    assert figures["packed_reads"] == 1.0
    assert figures["other_percent"] <= 10.0
    assert sum(figures[f"{kind}_percent"] for kind in KINDS) == pytest.approx(figures["other_percent"], rel=1e-12)
    assert figures["mask_percent"] == pytest.approx(100 / 36)  # one byte a token beside 2 x (16 + 2)
    page = (tmp_path / "first" / "BENCHMARK_RESULTS.md").read_text()
    assert "### Kernels, fused decode attention over 4096 packed tokens" in page
    assert re.search(r"\| turboquant_mse@2 +\| +147,456 \| +1\.000x \|", page)


def test_the_shape_comes_from_the_models_configuration(tmp_path):
    """Stated, derived, or below text_config; a configuration that does not say is refused with the reason."""
    configurations = {
        HeadShape(64, 3): {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576},
        HeadShape(256, 4): {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}},
        HeadShape(48, 1): {"num_attention_heads": 6, "hidden_size": 288},
        None: {"n_head": 12, "n_embd": 768},
    }
    for expected, configuration in configurations.items():
        (tmp_path / "config.json").write_text(json.dumps(configuration))
        assert head_shape(tmp_path) == expected
    assert "does not say num_attention_heads" in refusal(None, 4)


def test_what_cannot_be_counted_is_unsupported(compiler, monkeypatch):
    """A head that fits no kernel, and a machine without a compiler, each with its reason."""
    assert "got 72" in refusal(HeadShape(72, 1), 4)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    emulator.find_compiler.cache_clear()
    try:
        assert "install g++" in refusal(HeadShape(64, 3), 4)
    finally:
        emulator.find_compiler.cache_clear()


def test_a_mask_is_one_byte_a_token_and_everything_else_stays(compiler):
    """The record counts a step with a bool mask; packed bytes are read once with it as without."""
    metrics = count(Traffic(64), HeadShape(64, 2), 4)
    assert metrics["packed_reads"].value == 1.0
    assert metrics["mask_percent"].value == pytest.approx(100 * 64 / (64 * 68))


def test_counts_do_not_depend_on_the_compilers_optimisation(compiler, monkeypatch):
    """No load is merged or dropped before it is counted: -O0 and -O2 give the figures of -O1, so any machine does."""
    expected = count(Traffic(64), HeadShape(64, 2), 4)
    for level in ("-O0", "-O2"):
        flags = {"checked": tuple(level if flag == "-O1" else flag for flag in build._KERNEL_FLAGS["checked"])}
        monkeypatch.setattr(build, "_KERNEL_FLAGS", flags)
        build._build.cache_clear()
        assert count(Traffic(64), HeadShape(64, 2), 4) == expected
        monkeypatch.undo()
    build._build.cache_clear()


def test_a_fused_method_through_the_harness_says_so_per_layer(compiler):
    """The executed kernel behind the harness' adapter: the default model's first two layers give the plain path's
    logits, and each layer's engagement names the path and its reasons (none for fp16, which has no choice)."""
    model, _ = load_model(resolve_model("smollm2-135m"), n_layers=2)
    tokens = mx.array([[504, 1789, 29, 8, 21, 30, 44]])

    def run(config):
        caches = [CacheUnderTest(cache) for cache in KVCacheBuilder.build(model, config)]
        model(tokens[:, :4], cache=caches)
        logits = [model(tokens[:, i : i + 1], cache=caches) for i in range(4, 7)]
        layers = engagement(caches, [True, True], PackedKVCache)
        return np.array(mx.concatenate(logits, axis=1)), layers

    turboquant = {"method": "turboquant_mse", "code_bits": 4}
    expected, plain = run(KVCacheConfig(**turboquant, fused="off"))
    logits, fused = run(KVCacheConfig(**turboquant, fused="on", fused_backend="emulator"))
    remove_route()
    # fp32 sums in another order; a code that flips on it would show as 1e-2
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(np.std(expected)))
    assert [layer.attention for layer in plain] == ["plain (switched off)"] * 2
    assert [layer.attention for layer in fused] == ["fused 3, plain 1 (several new tokens)"] * 2
    assert [layer.used_bytes for layer in fused] == [layer.used_bytes for layer in plain]
    fp16 = [CacheUnderTest(cache) for cache in make_prompt_cache(model)]
    model(tokens, cache=fp16)
    assert [layer.attention for layer in engagement(fp16, [True, True], KVCache)] == [None, None]
