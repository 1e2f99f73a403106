"""mlx-lm's own tests, from its source distribution, pinned by hash and never copied into this repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from veloxbench.inputs.sources import cache_dir, sha256_of

VERSION = "0.32.2"
SHA256 = "1af8a92f6a141c3e2bf5b0369ac4464203a8e2189c47b9e40d3e921e5b3a1fe9"


def source_distribution() -> Path:
    """The verified archive, from the user's cache or else from the package index through pip.

    Skips the calling test where it cannot be had; under CI that is a failure.
    """
    path = cache_dir() / "sources" / f"{SHA256[:12]}-mlx_lm-{VERSION}.tar.gz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--no-binary", "mlx-lm", "--dest", folder, f"mlx-lm=={VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = list(Path(folder).glob("*.tar.gz"))
            if not found:
                reason = f"mlx-lm {VERSION} sources could not be downloaded: {done.stderr.strip()[-300:]}"
                (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
            found[0].replace(path)
    digest = sha256_of(path)
    assert digest == SHA256, f"{path} has sha256 {digest}, expected {SHA256}"
    return path


def test_source(name: str) -> str:
    """Text of ``tests/<name>`` in the distribution."""
    with tarfile.open(source_distribution()) as archive:
        member = archive.extractfile(f"mlx_lm-{VERSION}/tests/{name}")
        assert member is not None
        return member.read().decode()


test_source.__test__ = False  # type: ignore[attr-defined]
