"""The suites as pytest items: the same plan, runner and store as ``veloxbench run``.

``pytest suites`` runs the smoke grid (the default model's real weights cut to four layers) into a temporary
folder. ``pytest suites --benchmark`` measures a profile into ``results/``, resumes by key, writes
BENCHMARK_RESULTS.md there, and judges what it measured by ``baselines/`` (veloxbench.gate.gate), each subject an
item. A test module names its suite in ``SUITE`` and receives the fixture ``record``; a module without it, as in
any other project where the package is installed, is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from veloxbench.gate.baselines import Baselines
    from veloxbench.gate.verdicts import Finding
    from veloxbench.records.record import Record
    from veloxbench.run.grid import Grid


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--benchmark`` (a plain switch: pytest-benchmark owns the ``--benchmark-*`` names) and its sizes."""
    group = parser.getgroup("veloxbench")
    group.addoption(
        "--benchmark", action="store_true", default=False, help="measure a whole profile; without it, a smoke run"
    )
    group.addoption(
        "--veloxbench-profile", default="gate", help="gate, quick, default, full or FILE.toml (with --benchmark)"
    )
    group.addoption("--veloxbench-models", default="", help="models in place of the profile's, separated by commas")
    group.addoption("--veloxbench-out", default="results", help="folder of the records (with --benchmark)")
    group.addoption(
        "--veloxbench-baseline",
        default="baselines",
        help="folder of the baselines that gates compare with; none: measure without gates (with --benchmark)",
    )


def _grid(config: pytest.Config) -> Grid:
    from veloxbench.run.grid import customise, load_grid

    grid = load_grid(config.getoption("--veloxbench-profile") if config.getoption("--benchmark") else "smoke")
    chosen = [name for name in config.getoption("--veloxbench-models").split(",") if name]
    return customise(grid, models=chosen)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item per model and cell of the grid that belongs to the module's suite; one per subject of the baselines."""
    suite = getattr(metafunc.module, "SUITE", None)
    if suite is None:
        return
    if "gated_subject" in metafunc.fixturenames:
        metafunc.parametrize("gated_subject", _gated_subjects(metafunc.config))
    if "record" not in metafunc.fixturenames:
        return
    from veloxbench.run.plan import cells

    grid = _grid(metafunc.config)
    places = [
        pytest.param((model, index), id=f"{model}-{cell.protocol}-{cell.arm}".replace(" ", "-"))
        for model in grid.models
        for index, cell in enumerate(cells(grid))
        if cell.suite == suite
    ]
    metafunc.parametrize("record", places, indirect=True)


class SuiteRun:
    """What the items of one pytest session share: the run that measures, and what it produced."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        from veloxbench.inputs.transfer_progress import default_reporter
        from veloxbench.records.store import open_store
        from veloxbench.run.progress import LineProgress
        from veloxbench.run.runner import Run

        self.folder = folder
        self.exits = ExitStack()
        self.store = self.exits.enter_context(open_store(folder))
        self.run = self.exits.enter_context(Run(grid, self.store, default_reporter(), LineProgress()))
        self.produced: dict[str, Record] = {}

    def record(self, model: str, index: int) -> Record:
        """The record of a cell: from the store, or measured now and kept."""
        plan = self.run.plan(model)
        record = self.run.record(plan, plan.items[index])
        self.produced[record.key] = record
        return record

    def close(self) -> None:
        """Write the pages and free model and store."""
        from veloxbench.report.files import write_pages

        write_pages(self.folder, self.store)
        self.exits.close()


@pytest.fixture(scope="session")
def suite_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuiteRun]:
    """The run behind every item of this pytest session."""
    config = request.config
    measuring = config.getoption("--benchmark")
    folder = Path(config.getoption("--veloxbench-out")) if measuring else tmp_path_factory.mktemp("smoke")
    run = SuiteRun(_grid(config), folder)
    yield run
    run.close()


@pytest.fixture
def record(request: Any, suite_run: SuiteRun) -> Record:
    """The item's record; an unsupported configuration skips with the reason."""
    found = suite_run.record(*request.param)
    if found.status == "unsupported":
        pytest.skip(found.reason or "not supported")
    return found


def _gates(config: pytest.Config) -> str | None:
    """The folder of the baselines, where this session gates."""
    folder = str(config.getoption("--veloxbench-baseline"))
    return folder if config.getoption("--benchmark") and folder != "none" else None


def _baselines(config: pytest.Config) -> Baselines:
    from veloxbench.gate.baselines import read_baselines

    return read_baselines(Path(_gates(config) or ""))


def _gated_subjects(config: pytest.Config) -> list[Any]:
    """Every subject that the profile's baselines hold for this machine: each is an item, measured or not."""
    from veloxbench.errors import BaselineError
    from veloxbench.gate.baselines import machine_fields
    from veloxbench.measure.machine import hardware
    from veloxbench.records.provenance import versions

    if _gates(config) is None:
        return []
    try:
        files = _baselines(config).of_profile(config.getoption("--veloxbench-profile"))
    except BaselineError:
        return []  # the item for the gate as a whole says what is wrong
    machine = machine_fields(hardware(), versions())
    subjects = {  # two baselines of one subject differ in rounding: it is judged once
        (file.tier, entry.subject): None for file in files if file.holds_on(machine) for entry in file.entries
    }
    return [pytest.param(subject, id="-".join(subject).replace(" ", "-")) for subject in subjects]


@pytest.fixture(scope="session")
def gate_findings(request: pytest.FixtureRequest, suite_run: SuiteRun) -> list[Finding]:
    """What the gate says of everything that this session measured (or found measured)."""
    from veloxbench.gate.gate import judge

    config = request.config
    if _gates(config) is None:
        pytest.skip("gates judge with --benchmark and --veloxbench-baseline")
    profile = config.getoption("--veloxbench-profile")
    return judge(suite_run.produced.values(), _baselines(config), profile=profile)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse several processes: they would measure beside each other, and no gate would see all that was measured.

    Raises:
        pytest.UsageError: ``--benchmark`` with ``-n``.
    """
    if config.getoption("--benchmark") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark measures in one process: leave -n out (workers would time each other)")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gates judge what the other items measured, so they come last."""
    items.sort(key=lambda item: "gate_findings" in getattr(item, "fixturenames", ()))
