"""Put a real BLAS under MLX's Linux wheel.

``mlx[cpu]`` on Linux links the reference BLAS, a few GFLOP/s. Its ``cblas_*`` calls are bound
lazily through the global symbol table, so a BLAS that is loaded with ``RTLD_GLOBAL`` *before* the
first ``import mlx.core`` takes them over. The three packages of this project call :func:`load_blas`
from their ``__init__``, ahead of anything that imports MLX. macOS uses Accelerate and needs nothing.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ENVIRONMENT_VARIABLE = "VELOXBENCH_BLAS"
"""A library's path, or ``none`` to leave MLX's own BLAS in place (to measure what it costs)."""


@dataclass(frozen=True)
class BlasStatus:
    """Which BLAS serves MLX's fp32 matrix products, and why that one."""

    name: str
    path: str | None
    detail: str


def _candidates() -> Iterator[tuple[str, str]]:
    try:
        for file in metadata.files("mkl") or ():
            if file.name.startswith("libmkl_rt.so"):
                yield "mkl", str(Path(str(file.locate())).resolve())
    except metadata.PackageNotFoundError:
        pass
    for library in ("libopenblas.so.0", "libopenblasp.so.0", ctypes.util.find_library("openblas")):
        if library:
            yield "openblas", library


@functools.cache
def load_blas() -> BlasStatus:
    """Load MKL (the declared dependency) or the system's OpenBLAS, once, before MLX.

    Returns:
        What was loaded. Never raises: without a fast BLAS everything still works, 30 times slower,
        and ``veloxbench doctor`` says so. Warns (``RuntimeWarning``) where MLX was imported too early to be helped.
    """
    if sys.platform != "linux":
        return BlasStatus("accelerate" if sys.platform == "darwin" else "reference", None, "MLX's own BLAS")
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted == "none":
        return BlasStatus("reference", None, f"{ENVIRONMENT_VARIABLE}=none")
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before veloxquant_mlx: its matrix products run about 30 times slower on Linux; "
            "import veloxquant_mlx (or veloxbench) first",
            RuntimeWarning,
            stacklevel=3,
        )
        return BlasStatus("reference", None, "mlx.core was imported before veloxbench could load a BLAS")
    tried = []
    for name, path in [("custom", wanted)] if wanted else _candidates():
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            tried.append(f"{path}: {error}")
        else:
            return BlasStatus(name, path, "loaded before MLX")
    return BlasStatus("reference", None, "; ".join(tried) or "neither the mkl wheel nor OpenBLAS was found")


def measured_gflops(size: int = 768, repeats: int = 5) -> float:
    """Best of ``repeats`` fp32 ``size``-cubed products through MLX, in GFLOP/s."""
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.standard_normal((size, size), dtype=np.float32)) for _ in range(2))
    mx.eval(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ b)
        mx.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
