"""What all tests share: a C++ compiler for the emulator, or a skip that says why."""

import os
import shutil
from pathlib import Path

import pytest

from veloxquant_kernels.emulator import CompilerNotFound, find_compiler


def _missing(tool: str):
    """Skips; VELOXBENCH_REQUIRE_COMPILER=1 (set in CI) makes that a failure."""
    if os.environ.get("VELOXBENCH_REQUIRE_COMPILER") == "1":
        pytest.fail(tool)
    pytest.skip(tool)


LONGEST = (
    "kernels/test_codecs.py",
    "kernels/test_fused_attention.py",
    "test_contributing.py",
    "veloxbench/test_gate_end_to_end.py",
    "veloxbench/test_gate_travels.py",
    "veloxbench/trials/test_timing_trial.py",
    "kernels/test_verify.py",
    "veloxbench/test_compare.py",
    "impl/test_ratequant_examples.py",
    "veloxbench/test_run.py",
    "veloxbench/test_use.py",
)
"""Files of a minute and more, begun first, so that at the end no process is at work on one while others are done."""


def pytest_collection_modifyitems(items):
    """The longest files first, the others as they were."""
    place = {Path(__file__).parent / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def compiler():
    """A C++ compiler for the emulator: its path and version."""
    try:
        return find_compiler()
    except CompilerNotFound as error:
        return _missing(str(error))


@pytest.fixture(scope="session")
def gcov():
    """The coverage tool that comes with the compiler."""
    return shutil.which("gcov") or _missing("gcov is not installed")
