"""What all tests share: a real model cut to two layers; a C++ compiler for the emulator, or a skip that says why."""

import json
import os
import shutil
from pathlib import Path

import pytest

from veloxquant_kernels.emulator import CompilerNotFound, find_compiler


def _missing(tool: str):
    """Skips; VELOXBENCH_REQUIRE_COMPILER=1 (set in CI) makes that a failure."""
    if os.environ.get("VELOXBENCH_REQUIRE_COMPILER") == "1":
        pytest.fail(tool)
    pytest.skip(tool)


LONGEST = (
    "test_tutorials.py",
    "veloxbench/test_run.py",
    "test_contributing.py",
    "veloxbench/test_use.py",
    "veloxbench/test_gate_travels.py",
    "veloxbench/test_compare.py",
    "impl/test_cache_walk.py",
    "veloxbench/test_strangers_walk.py",
    "veloxbench/test_gate_end_to_end.py",
    "impl/test_ratequant_examples.py",
    "veloxbench/trials/test_timing_trial.py",
    "veloxbench/test_peers.py",
    "impl/test_architectures.py",
    "kernels/test_verify.py",
)
"""The longest files, begun first, so that at the end no process is at work on one while others are done."""


def pytest_collection_modifyitems(items):
    """The longest files first, the others as they were."""
    place = {Path(__file__).parent / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


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


@pytest.fixture(scope="session")
def compiler():
    """A C++ compiler for the emulator: its path and version."""
    try:
        return find_compiler()
    except CompilerNotFound as error:
        return _missing(str(error))


@pytest.fixture(scope="session")
def gcov():
    """The coverage tool that comes with the compiler."""
    return shutil.which("gcov") or _missing("gcov is not installed")
