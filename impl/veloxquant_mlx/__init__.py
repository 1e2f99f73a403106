"""Reference implementation of KV-cache quantization on MLX: quantizers, caches, allocators, observers."""

import veloxquant_kernels  # noqa: F401  (loads a real BLAS before MLX on Linux)
