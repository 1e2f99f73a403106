"""docs/architecture.md: every path and every name in it exists, and it answers where to change what it promises."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
PACKAGES = ("veloxquant_mlx", "veloxquant_kernels")
ROOMS = ("cli", "trials", "compare", "run", "measure", "methods", "inputs", "report", "gate", "records", "errors")
PATHS = [text for text in QUOTED if re.fullmatch(r"(veloxbench|impl|kernels|docs|tests)/[\w./*-]*", text)]
NAMES = [text for text in QUOTED if re.fullmatch(rf"({'|'.join(PACKAGES + ROOMS)})(\.\w+)+", text)]
ROWS = re.findall(
    r"^\| (.+?) \| `(.+?)` \| (.+) \|$", PAGE.partition("## Where to change")[2].partition("## Words")[0], re.M
)


def named(text: str) -> Any:
    """What a dotted name means; names of the harness begin with their room."""
    parts = text.split(".")
    if parts[0] in ROOMS:
        parts.insert(0, "veloxbench")
    module = importlib.import_module(".".join(parts[:2]))
    thing: Any = module
    for index, part in enumerate(parts[2:], start=3):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = importlib.import_module(".".join(parts[:index]))
    return thing


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path):
    """A file or folder of the repository; a pattern names at least one file."""
    assert list(ROOT.glob(path.rstrip("/")))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves(name):
    """A module, class or function under the name that the page gives it."""
    assert named(name) is not None


def test_a_name_that_is_gone_is_noticed():
    """Neither a module nor an attribute."""
    with pytest.raises(ModuleNotFoundError):
        named("measure.divergence.compare_nothing")


@pytest.mark.parametrize(("what", "path", "names"), ROWS, ids=[what for what, _, _ in ROWS])
def test_a_change_is_made_in_the_file_that_the_table_names(what, path, names):
    """The first name of a row is defined in the row's Python file."""
    first = re.search(r"`([\w.]+)`", names)
    if first is None or not path.endswith(".py"):
        return
    thing = named(first[1])
    thing = thing.fget if isinstance(thing, property) else inspect.unwrap(thing)
    assert Path(str(inspect.getsourcefile(thing))) == ROOT / path


@pytest.mark.parametrize(
    "question", ["the KLD's definition", "the gate's margin", "a code's layout", "a table's column"]
)
def test_the_four_questions_have_a_row(question):
    """A reader finds each of these without a search: one row that begins so, with a path."""
    assert [path for what, path, _ in ROWS if what.startswith(question)]


def test_every_room_has_a_row_and_stands_in_the_picture():
    """The rooms are the folders of the package."""
    folders = {path.parent.name for path in (ROOT / "veloxbench").glob("*/__init__.py")}
    picture = PAGE.split("```")[1]
    assert {room for room in folders if f"| `veloxbench/{room}/` |" in PAGE} == folders
    assert {room for room in folders if re.search(rf"\b{room}\b", picture)} == folders


def test_links_lead_somewhere():
    """Relative links of the page."""
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    assert targets
    assert all((ROOT / "docs" / target).exists() for target in targets)
