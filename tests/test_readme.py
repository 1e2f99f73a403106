"""The README's code runs and its commands exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from veloxbench.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted({line.split("#")[0].strip() for line in README.splitlines() if line.startswith("veloxbench ")})


def test_the_python_of_the_readme_runs_and_answers():
    """The snippet, as it stands, generates text through a packed cache."""
    assert len(BLOCKS) == 1
    done = subprocess.run([sys.executable, "-c", BLOCKS[0]], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command):
    """Each option that the README types is an option of that command."""
    words = shlex.split(command)[1:]
    help_text = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"}).output
    for word in words[1:]:
        if word.startswith("--"):
            assert word in help_text


def test_the_two_commands_are_targets_of_the_makefile():
    """``make bench`` and ``make test`` exist."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"bench", "test", "check"} <= set(targets)


def test_linked_files_exist():
    """Every relative link of the README leads somewhere."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
