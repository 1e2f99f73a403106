"""VeloxBench: benchmark and regression tests for KV-cache quantization on MLX."""

import veloxquant_kernels  # noqa: F401  (loads a real BLAS before MLX on Linux)

__version__ = "0.1.0"
