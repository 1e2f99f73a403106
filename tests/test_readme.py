"""The README's code runs, its commands answer, its links lead somewhere, and PyPI can show it."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from readme_renderer.markdown import render
from typer.testing import CliRunner

from veloxbench.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted({line.split("#")[0].strip() for line in README.splitlines() if line.startswith("veloxbench ")})
PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)|(?:srcset|src)=\"(?!https?:)([^\"]+)\"")
FENCED = re.compile(r"^( *)```.*?^\1```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them of a page's headings."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    plain = [re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def test_the_python_of_the_readme_runs_and_answers():
    """The snippet, as it stands, generates text through a packed cache."""
    assert len(BLOCKS) == 1
    done = subprocess.run([sys.executable, "-c", BLOCKS[0]], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_every_command_of_the_readme_is_run_by_a_tutorial():
    """``test_tutorials.py`` runs the tutorials' commands; those of the README are among them, word for word."""
    tutorials = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "tutorials").glob("*.md"))
    assert len(COMMANDS) == 2
    for command in COMMANDS:
        assert f"\n{command}\n" in tutorials


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command):
    """Each option that the README types is an option of that command; mlx-lm's own are its own matter."""
    words = shlex.split(command)[1:]
    help_text = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"}).output
    for word in words[1:]:
        if word.startswith("--") and word not in ("--prompt", "--max-tokens"):
            assert word in help_text


def test_the_two_commands_are_targets_of_the_makefile():
    """``make bench`` and ``make test`` exist."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"bench", "test", "check", "docs"} <= set(targets)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    """Relative links and images of the README and of all pages."""
    place = ROOT / page
    for link in LINK.finditer(FENCED.sub("", place.read_text(encoding="utf-8"))):
        file, _, anchor = (link[1] or link[2]).partition("#")
        target = (place.parent / file).resolve() if file else place
        assert target.exists(), link[0]
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), link[0]


def test_pypi_shows_the_readme_without_a_dead_link():
    """As it is built into the distribution, it renders, and every link in it is absolute."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    long_description = README
    for change in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        long_description = re.sub(change["pattern"], change["replacement"], long_description)
    html = render(long_description)
    assert html is not None
    assert "<table>" in html
    targets = re.findall(r"(?:href|src|srcset)=\"([^\"]+)\"", html)
    assert targets
    assert all(target.startswith(("https://", "#")) for target in targets), targets
