"""The files and the commands that CONTRIBUTING.md shows, section by section."""

import re
import textwrap
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def contributing_files(title: str) -> dict[str, str]:
    """Blocks that a line with their path in backticks and a colon introduces."""
    named = re.compile(r"^ *`([\w./-]+)`:\n\n( *)```\w+\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
    return {path: textwrap.dedent(body) for path, _, body in named.findall(section(title))}


def contributing_commands(title: str) -> list[str]:
    return [
        line for _, kind, body in FENCE.findall(section(title)) if kind == "sh" for line in body.split("\n") if line
    ]
