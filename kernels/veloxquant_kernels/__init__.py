"""Metal kernels for packed KV caches, their plain-MLX references, and the BLAS under MLX on Linux."""

from veloxquant_kernels.blas import load_blas

load_blas()  # must precede the first ``import mlx.core`` of the process
