"""How a registry fills itself: by the modules of its own room, and by what installed packages bring."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys


@functools.cache
def load_plugins(group: str, room: str | None = None) -> None:
    """Import every module of a room, then load the entry points of a group; once.

    An entry point that cannot be loaded is named on standard error, with what installed it, and left out.

    Args:
        group: of entry points, as ``veloxbench.methods``.
        room: dotted name of a package, whose modules register what they define when they are imported.
    """
    if room is not None:
        for module in pkgutil.iter_modules(importlib.import_module(room).__path__):
            importlib.import_module(f"{room}.{module.name}")
    for entry_point in importlib.metadata.entry_points(group=group):
        try:
            entry_point.load()
        except (Exception, SystemExit) as error:
            whose = (
                f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else "an installed package"
            )
            reason = str(error).splitlines()[0] if str(error) else ""
            print(
                f"veloxbench: {whose} brings {entry_point.name!r} to {group}, which cannot be loaded and is left out "
                f"({type(error).__name__}: {reason}); mend {entry_point.value!r} or uninstall the package",
                file=sys.stderr,
            )
