"""The tutorials' own files and commands, run in order in an empty folder as a reader would run them."""

import os
import re
import resource
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from veloxbench.inputs.models import resolve_model

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"(?:^`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d,.]*")
INSTALLED = "pip install ."
"""Done already: the environment that runs the tests has it."""


def blocks(page: str) -> list[tuple[str, str, str]]:
    """File (where a line names one), language and text of every fenced block."""
    return BLOCK.findall(page)


def script(page: str) -> str:
    """A page as one shell script: files are written, commands run, Python is run; the first failure ends it."""
    lines = ["set -e", "set -m"]  # -m: `kill %1` reaches a job, as in a terminal
    for number, (file, kind, text) in enumerate(blocks(page)):
        if file or kind == "python":
            lines.append(f"cat > {file or 'snippet.py'} <<'END-{number}'\n{text}END-{number}")
        if kind == "python" and not file:
            lines.append("python snippet.py")
        elif kind == "sh":
            lines += [line for line in text.splitlines() if line != INSTALLED]
    return "\n".join(lines)


def shape(text: str) -> str:
    """A text without its numbers, their prefixes and its spacing."""
    return " ".join(NUMBER.sub("#", re.sub(r"\b[kMG]B\b", "B", text)).split())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment of its own that sees the packages of this one and a copy of the project outside any checkout."""
    place = tmp_path_factory.mktemp("environment")
    copy = place / "project"
    for name in ("veloxbench", "impl", "kernels"):
        # with what is compiled, but for what another process is about to rename
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.pyc.*"))
    (copy / "records").symlink_to(ROOT / "records")
    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    own = "\n".join(str(copy / part) for part in (".", "impl", "kernels"))
    (site / "own.pth").write_text(f"{own}\nimport site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for name, module in {"veloxbench": "veloxbench.cli", "pytest": "pytest", "pip": "pip"}.items():
        command = python.with_name(name)
        command.write_text(f'#!/bin/sh\nexec "{python}" -m {module} "$@"\n')
        command.chmod(0o755)
    resolve_model("smollm2-135m")
    git = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    return {**cleared, **git, "PATH": path, "COLUMNS": "200"}


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda path: path.stem)
def test_every_command_of_a_tutorial_runs_and_says_what_is_shown(page, environment, tmp_path, record_property):
    """Commands, files and snippets in their order; every line that is shown as output is printed, numbers apart."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    text = page.read_text(encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["bash", "-c", script(text)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record_property("cpu_seconds", round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = shape(done.stdout + done.stderr)
    for _, kind, shown in blocks(text):
        if kind == "text":
            for line in shown.splitlines():
                assert shape(line) in printed, f"{line!r} is not in\n{done.stdout}\n{done.stderr}"


def test_the_example_is_what_its_tutorial_shows():
    """Files that the tutorial shows are those of ``examples/thirdparty``, byte for byte."""
    shown = {file: text for file, _, text in blocks((ROOT / "docs/tutorials/gate.md").read_text()) if file}
    assert set(shown) == {"rowscale/method.py", "benchmarks/gate.toml"}
    for file, text in shown.items():
        assert (ROOT / "examples" / "thirdparty" / file).read_text(encoding="utf-8") == text
