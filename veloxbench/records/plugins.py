"""How a registry fills itself: by the modules of its own room, and by what installed packages bring."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil


@functools.cache
def load_plugins(group: str, room: str | None = None) -> None:
    """Import every module of a room, then load the entry points of a group; once.

    Args:
        group: of entry points, as ``veloxbench.methods``.
        room: dotted name of a package, whose modules register what they define when they are imported.
    """
    if room is not None:
        for module in pkgutil.iter_modules(importlib.import_module(room).__path__):
            importlib.import_module(f"{room}.{module.name}")
    for entry_point in importlib.metadata.entry_points(group=group):
        entry_point.load()
