"""What the harness tests share: a real model cut to two layers, in a directory as a user would have it."""

import json
import shutil
from pathlib import Path

import pytest
from small_grids import IN_MEMORY, TIMED

TINY_GRID = """
summary = "seconds"
models = ["smollm2-135m"]
corpus = "bundled"
suites = ["perplexity", "throughput"]

[[arms]]
method = "mlx-affine"
targets = [4]

[[arms]]
method = "turboquant_mse"
targets = [4, 2]

[[protocols]]
name = "chunked"
sequences = 2
length = 96
chunk = 32
score_from = 32

[[protocols]]
name = "decode"
sequences = 2
prefix = 32
steps = 4
"""


@pytest.fixture(scope="session")
def cut_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlx-lm directory that the repository has never seen: smollm2's first two layers, saved in fp16."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from veloxbench.inputs.models import load_model, resolve_model

    handle = resolve_model("smollm2-135m")
    model, _ = load_model(handle, n_layers=2)
    folder = tmp_path_factory.mktemp("models") / "two-layers"
    folder.mkdir()
    weights = {name: array.astype(mx.float16) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((handle.directory / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(handle.directory / name, folder / name)
    return folder


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    """A grid of a few seconds, as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_GRID + TIMED + IN_MEMORY)
    return path
