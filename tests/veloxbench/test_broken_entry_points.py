"""An installed package with a broken entry point is named, and everything else goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = {
    "no such module": ("mine = brokenplug_absent", "", "ModuleNotFoundError"),
    "no such attribute": ("mine = brokenplug:absent", "", "AttributeError"),
    "raises": ("mine = brokenplug", "raise OSError('no disk')", "OSError: no disk"),
    "exits": ("mine = brokenplug", "raise SystemExit(3)", "SystemExit: 3"),
    "no reference": ("mine = a:b:c d", "", "AttributeError"),
    "a name that is taken": (
        "mine = brokenplug",
        "from veloxbench.methods.registry import register\n"
        "register('fp16', summary='', cache_classes=(), targets=None, target_means=None, formula=None)(print)",
        "registered twice",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_entry_point_is_named_and_left_out(kind: str, tmp_path: Path) -> None:
    """The methods are listed all the same; the package and the reason stand on standard error, no traceback."""
    line, code, reason = BROKEN[kind]
    info = tmp_path / "brokenplug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenplug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[veloxbench.methods]\n{line}\n")
    (tmp_path / "brokenplug.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])])
    done = subprocess.run(
        [sys.executable, "-c", "from veloxbench.methods.registry import all_methods; print(*all_methods())"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "turboquant_mse" in done.stdout
    assert "brokenplug 1.0 brings 'mine' to veloxbench.methods" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
