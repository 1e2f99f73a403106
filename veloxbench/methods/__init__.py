"""What is measured: the registry of caches under test and the factories that enter it. A method of this project's own
implementation is derived from ``veloxquant_mlx``'s list; a foreign one is a file here or an entry point of the group
``veloxbench.methods``, which calls :func:`register`.
"""

from veloxbench.methods.registry import (
    BuildContext,
    Geometry,
    all_methods,
    geometry,
    get_method,
    plain_caches,
    register,
)

__all__ = ["BuildContext", "Geometry", "all_methods", "geometry", "get_method", "plain_caches", "register"]
