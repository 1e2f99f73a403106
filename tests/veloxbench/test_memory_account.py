"""The memory suite on a model of its own: head_dim 256, one sliding-window layer and one of full attention."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from veloxbench.errors import ExitCode, VeloxError
from veloxbench.measure import memory

WINDOW, TOKENS, DECODED = 64, 128, 4
VOCABULARY = 512
GIB = 2**30

PAGE = 16 * 1024
"""Metal's allocator rounds each buffer up to a page."""


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gemma3 of two layers with random weights, as mlx-lm loads it; the tokenizer is never asked."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import gemma3_text

    from veloxbench.inputs.models import resolve_model

    config = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "max_position_embeddings": 1024,
    }
    mx.random.seed(0)
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config))
    folder = tmp_path_factory.mktemp("models") / "sliding"
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model("smollm2-135m").directory / name, folder / name)
    return folder


def request(model: Path, folder: Path, method: str, target: float | None) -> memory.Request:
    """What the memory process is asked on the sliding model."""
    return memory.Request(
        model=str(model),
        n_layers=None,
        name=method,
        target=target,
        cache_folder=folder,
        tokens=[i % VOCABULARY for i in range(TOKENS + DECODED)],
        prefill_tokens=TOKENS,
    )


@pytest.mark.parametrize(("method", "target"), [("fp16", None), ("turboquant_mse", 8), ("turboquant_prod", 3)])
def test_a_sliding_layer_costs_its_window_only_and_the_account_is_whole(sliding_model, tmp_path, method, target):
    """Beyond the window a token costs one layer of two; MLX holds what is counted, neither more nor less."""
    reply = memory.measure(request(sliding_model, tmp_path, method, target))
    assert reply.max_tokens == [WINDOW, None]
    sliding, full = reply.final
    assert sliding.used_bytes == full.used_bytes / full.tokens * WINDOW
    room = GIB - reply.weight_bytes - reply.static_bytes - sliding.used_bytes
    found, _ = memory.metrics(reply, method, budget_gib=1.0)
    assert found["tokens_in_budget"].value == pytest.approx(room / (full.used_bytes / full.tokens), abs=1)
    assert 0 <= found["unaccounted_bytes"].value < PAGE


def test_a_failed_memory_process_keeps_its_exit_code(tmp_path, monkeypatch):
    """A name that does not exist is a usage error (4) there as here, said in the child's words: it imports what its
    parent does, and nothing of a working directory whose files bear the names of libraries.
    """
    for name in ("numpy", "random", "veloxbench"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the working directory is on the path')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VeloxError, match="memory process of fp16 failed: unknown model 'smollm3'") as caught:
        memory.measure(request(Path("smollm3"), tmp_path, "fp16", None))
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_killed_memory_process_is_an_unfit_environment(tmp_path, monkeypatch):
    """Killed (by the kernel, out of memory): exit code 5."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""))
    with pytest.raises(VeloxError, match="exit status -9") as caught:
        memory.measure(request(Path("smollm3"), tmp_path, "fp16", None))
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
