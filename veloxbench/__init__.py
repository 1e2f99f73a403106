"""VeloxBench: benchmark and regression tests for KV-cache quantization on MLX.

The rooms, each importing only those below it: ``cli`` and ``pytest_plugin``, ``trials``, ``compare``, ``run``,
``measure``, ``methods`` and ``inputs``, ``records``; ``report`` stands on ``gate``, ``gate`` on ``records``.
``docs/architecture.md`` is the map.
"""

import veloxquant_kernels  # noqa: F401  (loads a real BLAS before MLX on Linux)
from veloxbench import moved

__version__ = "0.1.0"

moved.install()
