"""turboquant-mlx: quantizers of vectors; no cache that a model could use."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from veloxbench.errors import UsageError
from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext


@entry()
def cache(context: BuildContext, target: None) -> list[Any]:
    """Whatever class of the package has ``update_and_fetch``; it has none."""
    import turboquant_mlx

    names = [each.name for each in pkgutil.iter_modules(turboquant_mlx.__path__)]
    modules = [importlib.import_module(f"turboquant_mlx.{name}") for name in names]
    classes = {thing for module in modules for thing in vars(module).values() if isinstance(thing, type)}
    caches = [each for each in classes if hasattr(each, "update_and_fetch")]
    if not caches:
        raise UsageError(
            f"none of its {len(classes)} classes is a cache (update_and_fetch): it quantizes vectors alone"
        )
    raise UsageError(f"it has caches by now ({', '.join(each.__name__ for each in caches)}): name one as module.Class")
