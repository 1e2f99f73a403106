"""The rooms of the project: who may import whom, and whose ``veloxquant_mlx`` this is."""

import ast
import importlib.metadata
from pathlib import Path

import pytest

import veloxquant_mlx

ROOT = Path(__file__).parents[1]
ROOMS = {
    "veloxquant_kernels": (ROOT / "kernels" / "veloxquant_kernels", {"veloxquant_kernels"}),
    "veloxquant_mlx": (ROOT / "impl" / "veloxquant_mlx", {"veloxquant_kernels", "veloxquant_mlx"}),
    "veloxbench": (ROOT / "veloxbench", {"veloxquant_kernels", "veloxquant_mlx", "veloxbench"}),
}


def imported_names(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_dependencies_point_one_way(room):
    """suites, cli -> veloxbench -> veloxquant_mlx -> veloxquant_kernels -> mlx, and no arrow back."""
    folder, allowed = ROOMS[room]
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        ours = imported_names(file) & (set(ROOMS) | {"suites", "tests"})
        assert ours <= allowed, f"{file.relative_to(ROOT)} imports {ours - allowed}"


def test_the_harness_meets_the_implementation_in_its_registry_only():
    """Only methods, the environment's hashes and the doctor know that veloxquant_mlx exists."""
    users = {
        str(file.relative_to(ROOT / "veloxbench"))
        for file in (ROOT / "veloxbench").rglob("*.py")
        if "veloxquant_mlx" in imported_names(file)
    }
    assert {name for name in users if not name.startswith("methods/")} <= {"doctor.py"}


def test_the_imported_veloxquant_mlx_is_ours():
    """A package of the same import name is on PyPI: it must not be the one that is measured."""
    assert Path(str(veloxquant_mlx.__file__)).parent == ROOT / "impl" / "veloxquant_mlx"
    # an editable install lists no files, hence no owner
    owners = importlib.metadata.packages_distributions().get("veloxquant_mlx", ["veloxbench"])
    assert set(owners) == {"veloxbench"}


def test_no_file_of_the_product_reads_outside_the_repository():
    """Nothing depends on a folder beside the checkout."""
    for folder, _ in ROOMS.values():
        for file in folder.rglob("*.py"):
            assert "../shared" not in file.read_text()
