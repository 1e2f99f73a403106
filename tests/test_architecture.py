"""The packages of the project and the rooms of the harness: who may import whom; whose ``veloxquant_mlx`` this is."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import veloxquant_mlx

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / "veloxbench"
PACKAGES = {
    "veloxquant_kernels": (ROOT / "kernels" / "veloxquant_kernels", {"veloxquant_kernels"}),
    "veloxquant_mlx": (ROOT / "impl" / "veloxquant_mlx", {"veloxquant_kernels", "veloxquant_mlx"}),
    "veloxbench": (HARNESS, {"veloxquant_kernels", "veloxquant_mlx", "veloxbench"}),
}


def imported_names(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    """suites, cli -> veloxbench -> veloxquant_mlx -> veloxquant_kernels -> mlx, and no arrow back."""
    folder, allowed = PACKAGES[package]
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        ours = imported_names(file) & (set(PACKAGES) | {"suites", "tests"})
        assert ours <= allowed, f"{file.relative_to(ROOT)} imports {ours - allowed}"


def test_the_harness_meets_the_implementation_in_few_places():
    """Besides methods: the exact suite's cases, the doctor, and the damages that are done to it on purpose."""
    users = {
        str(file.relative_to(HARNESS)) for file in HARNESS.rglob("*.py") if "veloxquant_mlx" in imported_names(file)
    }
    elsewhere = {name for name in users if not name.startswith("methods/")}
    assert elsewhere <= {"measure/exact_cases.py", "run/doctor.py", "trials/damaged.py"}


RECORDS = {"errors", "records"}
GATE = RECORDS | {"gate"}
METHODS = RECORDS | {"inputs", "methods"}
INPUTS = RECORDS | {"inputs"}
MEASURE = METHODS | INPUTS | {"measure"}
RUN = MEASURE | {"run"}
COMPARE = RUN | GATE | {"compare"}
REPORT = GATE | {"report"}
TRIALS = COMPARE | REPORT | {"trials"}
ARROWS = {
    "errors": {"errors"},
    "records": RECORDS,
    "gate": GATE,
    "report": REPORT,
    "methods": METHODS,
    "inputs": INPUTS,
    "measure": MEASURE,
    "run": RUN,
    "compare": COMPARE,
    "trials": TRIALS,
    "cli": TRIALS | {"cli"},
    "pytest_plugin": COMPARE | REPORT,
    "moved": set(),
}
"""Each room of the harness with the rooms that it may import, itself among them."""


def imported_rooms(file: Path) -> set[str]:
    """Rooms that a file imports anywhere, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} imports relatively"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {parts[1] for module in modules if (parts := module.split("."))[0] == "veloxbench" and len(parts) > 1}


def test_every_room_has_its_arrows():
    """No room of the harness is missing from the table above, or stands there without being one."""
    there = {path.stem for path in HARNESS.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_import_only_those_below_them(room):
    """cli, plugin -> trials -> compare -> run -> measure -> methods -> inputs -> records; report -> gate -> records.

    Names of the package itself (its version) may be imported by all.
    """
    files = list((HARNESS / room).rglob("*.py")) or [HARNESS / f"{room}.py"]
    for file in files:
        strangers = (imported_rooms(file) & set(ARROWS)) - ARROWS[room]
        assert not strangers, f"{file.relative_to(ROOT)} imports {strangers}"


def test_an_arrow_that_runs_up_is_seen(tmp_path):
    """Whatever the form of the import, and inside a function as well."""
    file = tmp_path / "record.py"
    file.write_text(
        "import veloxbench\nimport veloxbench.measure.quality\nfrom veloxbench import run, __version__\n"
        "def f():\n    from veloxbench.cli.app import main\n    from veloxbench.records import store\n"
    )
    assert imported_rooms(file) & set(ARROWS) == {"measure", "run", "cli", "records"}


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh Python has imported after running some code."""
    show = "import sys; print(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines())


def rooms_among(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith("veloxbench.")}


@pytest.mark.parametrize("room", ["records", "gate", "report"])
def test_rooms_of_pure_data_load_no_model(room):
    """All modules of the room imported: no MLX, no mlx-lm, and nothing of the rooms that measure."""
    names = [f"veloxbench.{room}.{path.stem}" for path in (HARNESS / room).glob("*.py") if path.stem != "__init__"]
    assert names
    modules = modules_after("\n".join(f"import {name}" for name in names))
    assert set(names) <= modules
    assert not {name for name in modules if name.split(".")[0] in ("mlx", "mlx_lm")}
    assert rooms_among(modules) <= ARROWS[room] | {"moved"}


COMMANDS = (
    ["run", "--help"],
    ["report", "records/gemma3-270m.jsonl", "--check", "none.html"],
    ["compare", "records/gemma3-270m.jsonl", "records/gemma3-270m.jsonl"],
    ["gate", "--records", "records/gemma3-270m.jsonl"],
)


def test_the_product_loads_no_trial():
    """The commands that users run, on committed records, import nothing of the gate's own experiments."""
    modules = modules_after(f"from veloxbench.cli.app import _run\nfor command in {COMMANDS}: _run(command)")
    assert {"cli", "report", "compare", "gate"} <= rooms_among(modules)
    assert "trials" not in rooms_among(modules)


def test_the_pytest_plugin_loads_no_trial(tmp_path):
    """A pytest session with the plugin, and the pages that it writes in the end, import nothing of the experiments."""
    code = (
        "import pytest, veloxbench.pytest_plugin, veloxbench.report.files\n"
        f"pytest.main(['--collect-only', '-q', 'suites', '--rootdir', {str(tmp_path)!r}, '-p', 'no:cacheprovider'])"
    )
    modules = modules_after(code)
    assert {"veloxbench.pytest_plugin", "veloxbench.run.plan"} <= modules
    assert not {"trials", "cli"} & rooms_among(modules)


def test_the_imported_veloxquant_mlx_is_ours():
    """A package of the same import name is on PyPI: it must not be the one that is measured."""
    assert Path(str(veloxquant_mlx.__file__)).parent == ROOT / "impl" / "veloxquant_mlx"
    # an editable install lists no files, hence no owner
    owners = importlib.metadata.packages_distributions().get("veloxquant_mlx", ["veloxbench"])
    assert set(owners) == {"veloxbench"}


def test_no_file_of_the_product_reads_outside_the_repository():
    """Nothing depends on a folder beside the checkout."""
    for folder, _ in PACKAGES.values():
        for file in folder.rglob("*.py"):
            assert "../shared" not in file.read_text()
