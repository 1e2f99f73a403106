"""The gate judges this code, and nothing else: a stranger's repository with a cache of its own is measured, approved,
edited and committed; the gate turns red.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_grids import LINES, quality_grid

ROOT = Path(__file__).parents[2]
CACHE = '''
"""Codes of four bits in a byte, and one fp16 scale for every eight channels."""

from fractions import Fraction

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from veloxbench.methods.registry import plain_caches, register

GROUP = 8


def encode(x):
    x = x.reshape(*x.shape[:-1], -1, GROUP)
    scales = (mx.max(mx.abs(x), axis=-1) / 7 + 1e-4).astype(mx.float16)
    return mx.round(x / scales[..., None]).astype(mx.int8).flatten(-2), scales


def decode(codes, scales):
    x = codes.reshape(*codes.shape[:-1], -1, GROUP) * scales[..., None]
    return x.flatten(-2)


class NibbleCache(KVCache):
    def __init__(self):
        super().__init__()
        self.held = None

    def update_and_fetch(self, keys, values):
        new = [*encode(keys), *encode(values)]
        self.held = new if self.held is None else [mx.concatenate(p, axis=2) for p in zip(self.held, new)]
        self.offset += keys.shape[2]
        return decode(*self.held[:2]), decode(*self.held[2:])

    @property
    def state(self):
        return *(self.held or ()), self.offset


@register(
    "nibble",
    summary="a stranger's cache",
    cache_classes=(NibbleCache,),
    targets=(4.0,),
    target_means="code_bits",
    formula=lambda cache, tokens, geometry: Fraction(tokens * geometry.n_values * (GROUP + 2), GROUP),
)
def nibble(context, target):
    return plain_caches(context.model, lambda layer: NibbleCache())
'''
GRID = quality_grid(["nibble@4"], layers="n_layers = 4")
FILES = {
    "src/stranger/__init__.py": "",
    "src/stranger/nibble.py": CACHE,
    # what `pip install --editable` leaves of [project.entry-points."veloxbench.methods"]
    "src/stranger-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
    "src/stranger-1.0.dist-info/entry_points.txt": "[veloxbench.methods]\nnibble = stranger.nibble\n",
    "grid.toml": GRID,
    ".gitignore": "results/\n__pycache__/\n",
}
PLACES = "--profile grid.toml --records results --baseline baselines"


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with an approved baseline, and behind it the commit of a decoder that takes the wrong axis."""
    repository = tmp_path_factory.mktemp("stranger")
    for name, text in FILES.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    for name in ("test_perplexity.py", "test_gate.py"):
        shutil.copy(ROOT / "suites" / name, repository / name)
    git(repository, "init", "--quiet")
    commit(repository)
    first = veloxbench(
        repository,
        "run --profile grid.toml --out results",
        f"baseline approve --reason first {PLACES}",
        f"gate {PLACES}",
    )
    assert codes_of(first) == [0, 0, 0], first.stderr
    file = repository / "src" / "stranger" / "nibble.py"
    file.write_text(CACHE.replace("* scales[..., None]", "* scales[..., None, :]"))
    commit(repository)
    return repository


def git(repository: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a stranger", "-c", "user.email=stranger@example.org")
    subprocess.run(["git", *who, *arguments], cwd=repository, check=True)


def commit(repository: Path) -> None:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "a state of the cache")


def environment(repository: Path) -> dict[str, str]:
    paths = [str(repository / "src"), *(str(ROOT / part) for part in ("", "impl", "kernels"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def veloxbench(repository: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINES, *lines]
    return subprocess.run(command, cwd=repository, env=environment(repository), capture_output=True, text=True)


def codes_of(done: subprocess.CompletedProcess[str]) -> list[int]:
    return json.loads(done.stdout.splitlines()[-1])


def test_an_edited_cache_is_measured_again_and_is_a_regression(edited):
    """The same commands into the same folder: no record of the old code serves, and the gate ends with exit 1."""
    done = veloxbench(edited, "run --profile grid.toml --out results", f"gate --json {PLACES}")
    assert codes_of(done) == [0, 1], done.stderr
    report = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    (kld,) = (
        finding
        for finding in json.loads(report)["findings"]
        if finding["metric"] == "kld_mean" and finding["verdict"] == "regress"
    )
    assert "nibble@4" in kld["subject"]


def test_the_same_in_pytest(edited):
    """``pytest --benchmark`` through the installed plugin: it measures, the gate's item fails, exit 1."""
    places = "--veloxbench-profile grid.toml --veloxbench-out results --veloxbench-baseline baselines"
    command = [sys.executable, "-m", "pytest", "--benchmark", "-q", "-p", "no:cacheprovider", *places.split()]
    done = subprocess.run(command, cwd=edited, env=environment(edited), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "FAILED test_gate.py::test_gate_is_open" in done.stdout
    assert "FAILED test_perplexity.py" not in done.stdout  # it was measured
    assert "nibble@4" in done.stdout
