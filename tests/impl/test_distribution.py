"""The caches as a distribution of their own: built, and used where nothing of the harness's is installed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CACHES, HARNESS = (
    tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for folder in (ROOT / "impl", ROOT)
)

WITHOUT = """
import sys
hidden = set(sys.argv[2].split(","))
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
sys.path.insert(0, sys.argv[1])
import pkgutil, importlib, veloxquant_kernels, veloxquant_mlx
for package in (veloxquant_kernels, veloxquant_mlx):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.generate import generate_step
import mlx.core as mx
sizes = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2, vocab_size=32)
model = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **sizes))
from veloxquant_mlx import KVCacheConfig, attach
attach(model, KVCacheConfig("turboquant_mse", code_bits=4))
assert len(list(generate_step(mx.array([1, 2, 3]), model, max_tokens=4))) == 4
print(type(make_prompt_cache(model)[0]).__name__)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of ``impl/``, unpacked into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, str(ROOT / "impl")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"veloxbench_caches-{HARNESS['version']}-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def needed(names: list[str]) -> set[str]:
    """Names of all distributions that some requirements bring, in this environment."""
    waiting = [Requirement(name) for name in names]
    seen: dict[str, set[str]] = {}
    while waiting:
        requirement = waiting.pop()
        key, extras = requirement.name.lower().replace("_", "-"), {"", *requirement.extras}
        new = extras - seen.setdefault(key, set())
        seen[key] |= extras
        try:
            theirs = [Requirement(each) for each in importlib.metadata.requires(key) or ()] if new else []
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        waiting += [r for r in theirs if r.marker is None or any(r.marker.evaluate({"extra": one}) for one in new)]
    return set(seen)


def test_the_wheel_works_without_the_harness_and_what_it_needs(unpacked: Path) -> None:
    """Every module imports and a model generates, with all that the caches do not declare hidden from the process."""
    kept = needed(CACHES["dependencies"])
    owners = importlib.metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not {n.lower().replace("_", "-") for n in names} & kept}
    hidden |= {"veloxbench"}
    assert {"datasets", "pyarrow", "pytest", "matplotlib", "gguf", "psutil"} <= hidden
    assert not {"mlx", "mlx_lm", "numpy", "scipy", "transformers"} & hidden
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT, str(unpacked), ",".join(sorted(hidden))],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=unpacked,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "PackedKVCache"


def test_the_wheel_holds_the_caches_and_nothing_of_the_harness(unpacked: Path) -> None:
    """The files of both packages, Metal sources and calibration text among them, as they are in the checkout."""
    for name, folder in (("veloxquant_mlx", ROOT / "impl"), ("veloxquant_kernels", ROOT / "kernels")):
        files = [path for path in (folder / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert len(files) > 15
        for path in files:
            assert (unpacked / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert not (unpacked / "veloxbench").exists()


def test_what_both_distributions_need_is_stated_alike() -> None:
    """Each requirement of the caches stands in the harness's list, version for version."""
    assert set(CACHES["dependencies"]) <= set(HARNESS["dependencies"])
