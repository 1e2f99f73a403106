"""An installed package with a broken entry point is named, and everything else goes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BROKEN = {
    "no such module": ("mine = brokenplug_absent", "", "ModuleNotFoundError"),
    "no such attribute": ("mine = {module}:absent", "", "AttributeError"),
    "raises": ("mine = {module}", "raise OSError('no disk')", "OSError: no disk"),
    "exits": ("mine = {module}", "raise SystemExit(3)", "SystemExit: 3"),
    "no reference": ("mine = a:b:c d", "", "AttributeError"),
    "a name that is taken": (
        "mine = {module}",
        "from veloxbench.methods.registry import register\n"
        "register('fp16', summary='', cache_classes=(), targets=None, target_means=None, formula=None)(print)",
        "registered twice",
    ),
}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The methods, asked for where all the broken packages are installed at once."""
    site = tmp_path_factory.mktemp("site")
    for number, (line, code, _) in enumerate(BROKEN.values()):
        name = f"brokenplug{number}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[veloxbench.methods]\n{line.format(module=name)}\n")
        (site / f"{name}.py").write_text(code)
    path = os.pathsep.join([str(site), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])])
    return subprocess.run(
        [sys.executable, "-c", "from veloxbench.methods.registry import all_methods; print(*all_methods())"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_entry_point_is_named_and_left_out(kind: str, listed: subprocess.CompletedProcess[str]) -> None:
    """The methods are listed all the same; the package and the reason stand on standard error, no traceback."""
    name, reason = f"brokenplug{list(BROKEN).index(kind)}", BROKEN[kind][2]
    assert listed.returncode == 0, listed.stderr
    assert "turboquant_mse" in listed.stdout
    (said,) = (line for line in listed.stderr.splitlines() if f"{name} 1.0 brings 'mine' to veloxbench.methods" in line)
    assert reason in said
    assert "Traceback" not in listed.stderr
