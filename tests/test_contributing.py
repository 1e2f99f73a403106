"""CONTRIBUTING.md's own files and commands, written into a copy of the project and run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from contributing_steps import contributing_commands, contributing_files

from veloxbench.inputs.models import resolve_model

ROOT = Path(__file__).parents[1]
COPIED = ("veloxbench", "impl", "kernels", "tests", "suites", "docs", "examples", "conftest.py", "pyproject.toml")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy in which the steps are walked."""
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            # with what is compiled, but for what another process is about to rename
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.json.xz", "*.pyc.*"))
        else:
            shutil.copy(source, folder / name)
    resolve_model("smollm2-135m")
    return folder


def walk(folder: Path, title: str) -> list[subprocess.CompletedProcess[str]]:
    """Write a section's files and run its commands."""
    for path, text in contributing_files(title).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return [run(folder, command) for command in contributing_commands(title)]


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.split()
    module = {"pytest": "pytest", "veloxbench": "veloxbench.cli"}[program]
    path = os.pathsep.join(str(folder / part) for part in ("", "impl", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_method_is_added_by_its_steps(project):
    """One file, its tests, its measurement; and what decodes 1.5 times too long fails the promised test."""
    tests, measured = walk(project, "Add a method")
    assert tests.returncode == 0, tests.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", tests.stdout)[1]) >= 5
    assert measured.returncode == 0, measured.stderr[-3000:]
    assert "signs@1" in (project / "results-signs" / "BENCHMARK_RESULTS.md").read_text(encoding="utf-8")
    file = project / "impl" / "veloxquant_mlx" / "quantizers" / "signs.py"
    file.write_text(file.read_text().replace("return signs * sizes", "return 1.5 * signs * sizes"))
    wrong = run(project, "pytest tests/impl/test_quantizers.py -k signs")  # of the same tests, the distortion's file
    assert wrong.returncode == 1, wrong.stdout[-2000:]
    assert "distortion" in wrong.stdout


def test_a_kernel_is_added_by_its_steps(project):
    """Body, wrapper and parity test; the emulator runs the body."""
    (tests,) = walk(project, "Add a kernel")
    assert tests.returncode == 0, tests.stdout[-3000:]
    assert "1 passed" in tests.stdout


def test_a_model_and_a_text_of_ones_own_are_measured(project):
    """A directory that mlx-lm loads, and a text file."""
    shutil.copytree(resolve_model("smollm2-135m").directory, project / "my-model")
    words = "It was the best of times, it was the worst of times. " * 400
    (project / "notes.txt").write_text(words, encoding="utf-8")
    (measured,) = walk(project, "Add a model, or a text")
    assert measured.returncode == 0, measured.stderr[-3000:]
    page = (project / "results-mine" / "BENCHMARK_RESULTS.md").read_text(encoding="utf-8")
    assert "mlx-affine@4" in page
    assert "notes.txt" in page
