"""What all tests share: a C++ compiler for the emulator, or a skip that says why."""

import os
import shutil

import pytest

from veloxquant_kernels.emulator import CompilerNotFound, find_compiler


def _missing(tool: str):
    """Skips; VELOXBENCH_REQUIRE_COMPILER=1 (set in CI) makes that a failure."""
    if os.environ.get("VELOXBENCH_REQUIRE_COMPILER") == "1":
        pytest.fail(tool)
    pytest.skip(tool)


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
