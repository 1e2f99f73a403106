"""What all tests share: a C++ compiler for the emulator, or a skip that says why."""

import os

import pytest

from veloxquant_kernels.emulator import CompilerNotFound, find_compiler


@pytest.fixture(scope="session")
def compiler():
    """Skips without a C++ compiler; VELOXBENCH_REQUIRE_COMPILER=1 (set in CI) makes that a failure."""
    try:
        return find_compiler()
    except CompilerNotFound as error:
        if os.environ.get("VELOXBENCH_REQUIRE_COMPILER") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
