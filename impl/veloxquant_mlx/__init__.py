"""Reference implementation of KV-cache quantization on MLX: quantizers, caches, allocators, observers.

``cache.base`` is the way in for users, ``methods`` the one list of methods. Imports run down only: cache, then
allocators and observers, then quantizers, then transforms, and ``veloxquant_kernels`` below all; a test holds it.
"""

import veloxquant_kernels  # noqa: F401  (loads a real BLAS before MLX on Linux)
