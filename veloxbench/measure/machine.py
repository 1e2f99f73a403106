"""The machine that measures: chip, device, how its sums round, and the class that a record is keyed by."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from veloxbench.records.provenance import versions
from veloxbench.records.record import content_hash
from veloxbench.records.suites import MovedBy
from veloxquant_kernels.blas import load_blas
from veloxquant_kernels.emulator import CompilerNotFound, find_compiler


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
        return (
            subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout.strip()
            or "Apple"
        )
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_class(moved_by: MovedBy) -> str:
    """Hash of everything of a machine that can move a number of this kind.

    Args:
        moved_by: ``rounding`` (bytes and quality): chip, device, BLAS and library versions. ``speed`` (timings): all of
            the hardware and every version. ``counter``: only whether the emulator, which counts, can run.
    """
    if moved_by == "counter":
        return content_hash(["emulator", _has_compiler()])
    chip, versioned = hardware(), versions()
    if moved_by == "speed":
        return content_hash([chip, versioned])
    quality = {name: versioned[name] for name in ("mlx", "mlx-lm", "numpy")}
    return content_hash([{name: chip[name] for name in ("chip", "device", "blas", "rounding")}, quality])


def _has_compiler() -> bool:
    try:
        find_compiler()
    except CompilerNotFound:
        return False
    return True
