"""The byte formats of packed KV caches: plain MLX, Metal kernels that write the same, and the choice between them.

One module a format (``packing``, ``turboquant``, ``affine``, ``fused_attention``), with its ``.metal`` bodies;
``kernel`` launches and chooses, ``emulator`` runs the bodies without a GPU, ``verify`` compares. A body changes with
its contract, its plain MLX and ``tests/kernels/mutations.json``. Below this package there is MLX alone.
"""

from veloxquant_kernels.blas import load_blas

load_blas()  # must precede the first ``import mlx.core`` of the process
