"""Is this machine fit to measure on? Each check says what it saw and what to do about it."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import veloxbench
import veloxquant_mlx
from veloxbench.inputs.sources import cache_dir
from veloxbench.measure import machine
from veloxbench.records import provenance
from veloxquant_kernels.blas import load_blas, measured_gflops
from veloxquant_kernels.emulator import CompilerNotFound, find_compiler
from veloxquant_kernels.kernel import why_no_metal

SLOW_GFLOPS = 20.0
"""MLX's reference BLAS reaches 2 to 6 on any machine; a real one passes 20 on a single old core."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``ok`` is None for a plain fact, which never makes the machine unfit."""

    name: str
    ok: bool | None
    found: str


def examine() -> Iterator[Check]:
    """Every check, in order."""
    hardware, versions = machine.hardware(), provenance.versions()
    yield Check(
        "machine", None, f"{hardware['chip']}, {hardware['physical_cores']} cores, {hardware['memory_gib']} GiB"
    )
    yield Check("mlx", None, f"{versions['mlx']} on {hardware['device']}, mlx-lm {versions['mlx-lm']}")
    yield from kernel_backends()
    yield _blas()
    yield _implementation()
    yield _disk()
    state = provenance.machine_state()
    busy = state["load_1min"] > 0.5 * hardware["logical_cores"]
    advice = "; timings want a quiet machine" if busy else ""
    yield Check("load", None, f"{state['load_1min']} over the last minute{advice}")
    if state["on_battery"]:
        yield Check("power", None, "on battery: bytes and quality are the same, timings will throttle")


def kernel_backends() -> Iterator[Check]:
    """Where the Metal kernels can run on this machine."""
    problem = why_no_metal()
    yield Check("metal", None, f"{problem}: caches compute in plain MLX" if problem else "available")
    try:
        emulator = f"runs the kernels' own text, compiled by {find_compiler()[1]}"
    except CompilerNotFound as error:
        emulator = str(error)
    yield Check("emulator", None, emulator)


def _blas() -> Check:
    status, gflops = load_blas(), measured_gflops()
    where = f"{status.name}{f' ({status.path})' if status.path else ''}, {gflops:.0f} GFLOP/s in fp32"
    if machine.hardware()["device"] == "gpu" or gflops >= SLOW_GFLOPS:
        return Check("blas", True, where)
    return Check(
        "blas", False, f"{where}: {status.detail}. Install the mkl wheel or libopenblas; runs take 30 times as long"
    )


def _implementation() -> Check:
    """``veloxquant_mlx`` is also the import name of another distribution (VeloxQuant-MLX)."""
    imported = Path(str(veloxquant_mlx.__file__)).resolve()
    ours = Path(veloxbench.__file__).resolve().parents[1]
    owners = set(importlib.metadata.packages_distributions().get("veloxquant_mlx", []))
    others = sorted(owners - {"veloxbench"})
    if imported.is_relative_to(ours) and not others:
        return Check("veloxquant_mlx", True, f"this project's own ({imported.parent})")
    clash = f"{', '.join(others) or 'another package'} also provides veloxquant_mlx; imported: {imported.parent}"
    return Check("veloxquant_mlx", False, f"{clash}. Install veloxbench in an environment of its own")


def _disk() -> Check:
    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    return Check("cache", free > 3, f"{folder}, {free:.0f} GiB free")
