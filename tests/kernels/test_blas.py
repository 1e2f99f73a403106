"""Which BLAS serves MLX on Linux depends on what is imported first; the packages say so when it is too late."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings a fast BLAS of its own")


def imported(*names: str) -> str:
    """What a fresh interpreter prints on stderr when it imports these, in order."""
    code = "; ".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stderr


def test_mlx_imported_first_is_warned_of():
    """MLX binds its matrix products when it is imported: a BLAS that comes later is not used, and a warning says so."""
    assert "RuntimeWarning: mlx was imported before veloxquant_mlx" in imported("mlx.core", "veloxquant_mlx")


def test_our_packages_first_are_silent():
    """In the order that the examples use, nothing is said."""
    assert imported("veloxquant_mlx", "mlx.core", "veloxbench") == ""
