"""No module of the implementation or the kernels imports one that imports it, at whatever depth it does so."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {ROOT / "impl" / "veloxquant_mlx", ROOT / "kernels" / "veloxquant_kernels"}


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package is its ``__init__``."""
    named = {}
    for package in SOURCES:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(source: str, known: dict[str, Path]) -> set[str]:
    """The known modules that a source imports anywhere: in functions and under TYPE_CHECKING too."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            named |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in named if name in known}


def test_no_circle() -> None:
    """The modules can be put in an order in which each imports only those before it; lazy imports count."""
    known = modules()
    graph = {name: imports(path.read_text(), known) - {name} for name, path in known.items()}
    assert len(graph) > 40
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("veloxquant_mlx.quantizers.base") < order.index("veloxquant_mlx.cache.packed")


def test_a_lazy_import_closes_a_circle() -> None:
    """What this file counts: an import inside a function is an arrow like any other."""
    known = {"a": Path(), "b": Path()}
    graph = {"a": imports("import b", known), "b": imports("def f():\n    from a import x", known)}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


ROOMS = ("transforms", "quantizers", "observers", "allocators", "cache")
"""The rooms of the implementation from below: each may import those before it, and its own modules."""


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_run_down(room: str) -> None:
    """No module imports one of a room above its own; observers and allocators do not know each other."""
    known = modules()
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | ({"observers"} if room == "allocators" else set())
    inside = {name: path for name, path in known.items() if name.startswith(f"veloxquant_mlx.{room}.")}
    assert inside
    for name, path in inside.items():
        rooms = {other.split(".")[1] for other in imports(path.read_text(), known) if other.count(".") == 2}
        assert not rooms & above, name
