"""What a measurement ran on: hardware, versions, machine state, and the hashes of the code."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil

import veloxbench
from veloxbench.records import Suite, content_hash
from veloxquant_kernels.blas import load_blas
from veloxquant_kernels.emulator import CompilerNotFound, find_compiler

PACKAGES = ("mlx", "mlx-lm", "numpy", "scipy", "transformers", "tokenizers", "veloxbench")


@functools.cache
def hardware() -> dict[str, Any]:
    """Chip, cores, memory and the device that MLX computes on."""
    import mlx.core as mx

    metal = mx.metal.is_available()
    return {
        "chip": _chip(),
        "machine": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "logical_cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": "gpu" if mx.default_device() == mx.gpu else "cpu",
        "metal": str(mx.device_info().get("architecture", "")) if metal else None,
        "blas": load_blas().name,
        "rounding": rounding(),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
    }


_PRODUCTS = (
    ((1024, 576), (576, 1536)),
    ((64, 1536), (1536, 576)),
    ((1, 576), (576, 192)),
    ((4096, 64), (64, 64)),
    ((16, 9, 64, 64), (16, 9, 64, 192)),
    ((16, 9, 64, 192), (16, 9, 192, 64)),
)
"""Shapes of matrix products as a small model makes them: projections, one token, rotations, attention."""


@functools.cache
def rounding() -> str:
    """Hash of the bits of fixed fp32 products: machines that share it add in the same order.

    Another order (a BLAS, an instruction set, a GPU) changes last bits, which flips codes near a boundary and so
    draws the quantization noise of a whole run anew.
    """
    import mlx.core as mx

    rng, digest = np.random.default_rng(0), hashlib.sha256()
    for shapes in _PRODUCTS:
        a, b = (mx.array((rng.integers(-(2**20), 2**20, size=shape) / 2**20).astype(np.float32)) for shape in shapes)
        digest.update(np.array(a @ b).tobytes())
    return digest.hexdigest()[:16]


def _chip() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "Apple"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that may move a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine_state() -> dict[str, Any]:
    """Load, free memory and power at this moment: context for a timing, never part of a key."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return {
        "load_1min": round(psutil.getloadavg()[0], 2),
        "available_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "on_battery": None if battery is None else not battery.power_plugged,
    }


def machine_class(suite: Suite) -> str:
    """Hash of what moves a suite's numbers: chip, device and library versions for bytes and quality,
    the whole hardware and all versions for timings, nothing for counts but whether the emulator can count."""
    if suite == "kernels":
        return content_hash(["emulator", _has_compiler()])
    chip, versioned = hardware(), versions()
    if suite == "throughput":
        return content_hash([chip, versioned])
    quality = {name: versioned[name] for name in ("mlx", "mlx-lm", "numpy")}
    return content_hash([{name: chip[name] for name in ("chip", "device", "blas", "rounding")}, quality])


def _has_compiler() -> bool:
    try:
        find_compiler()
    except CompilerNotFound:
        return False
    return True


@functools.cache
def source_hash(*packages: ModuleType) -> str:
    """Hash of the Python syntax trees and kernel bodies below the packages: comments do not count."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(str(package.__file__)).parent
        files = sorted(root.rglob("*.py")) + sorted(root.rglob("*.metal"))
        for file in files:
            text = file.read_text()
            digest.update(str(file.relative_to(root)).encode())
            digest.update((ast.dump(ast.parse(text)) if file.suffix == ".py" else text).encode())
    return digest.hexdigest()


@functools.cache
def harness_hash() -> str:
    """Hash of the modules of the harness that produce numbers (not of its front doors and reports).

    Weights, token blocks and settings have their own hashes in a record's key; how a model is loaded, a cache built
    and a measurement carried out have this one alone.
    """
    root = Path(veloxbench.__file__).parent
    files = [root / f"{name}.py" for name in ("protocol", "adapter", "stats", "models", "runner")]
    return _source_hash([*files, *sorted([*(root / "measure").glob("*.py"), *(root / "methods").glob("*.py")])])


def timing_hash() -> str:
    """Hash of what a timed sample depends on besides the implementation: benchmark, canary, order, processes."""
    root = Path(veloxbench.__file__).parent
    return _source_hash([root / f"{name}.py" for name in ("decode_timing", "timing_pairs", "worker")])


def _source_hash(files: Sequence[Path]) -> str:
    trees = [ast.dump(ast.parse(file.read_text())) for file in files]
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()


def git(place: Path, *arguments: str) -> str | None:
    """What git prints in a folder, without the last newlines; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that this code runs from; ``(None, None)`` outside one."""
    root = Path(veloxbench.__file__).parent
    if git(root, "ls-files", "--error-unmatch", str(root / "__init__.py")) is None:
        return None, None
    return _checkout(root)


@functools.cache
def project_state(place: Path) -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout around a working directory, where that is another than this code's own."""
    top, root = (git(folder, "rev-parse", "--show-toplevel") for folder in (place, Path(veloxbench.__file__).parent))
    if top is None or (top == root and git_state() != (None, None)):
        return None, None
    return _checkout(Path(top))


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    status = git(root, "status", "--porcelain", "--untracked-files=no")
    return git(root, "rev-parse", "HEAD"), None if status is None else bool(status)
