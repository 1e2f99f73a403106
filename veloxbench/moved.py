"""Modules by the names that they had before the house had rooms: published snippets and plugins go on for one release.

``from veloxbench.models import resolve_model`` imports ``veloxbench.inputs.models`` and warns with the new name.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "adapter": "methods.cache_under_test",
    "baselines": "gate.baselines",
    "corpora": "inputs.corpora",
    "environment": "records.provenance",
    "models": "inputs.models",
    "plan": "run.plan",
    "progress": "inputs.transfer_progress",
    "protocol": "measure.protocol",
    "report.markdown": "report.page",
    "revisions": "compare.revisions",
    "runner": "run.runner",
    "sources": "inputs.sources",
    "stats": "records.intervals",
    "store": "records.store",
    "verdicts": "gate.verdicts",
}
"""Old names below ``veloxbench`` and the modules that hold their content now."""


class _MovedFinder:
    """Finds a module by its old name."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """A spec that loads the module of the new name."""
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == "veloxbench" and old in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, under both names."""
        new = f"veloxbench.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now; the old name goes with the next release", DeprecationWarning, 2)
        module = importlib.import_module(new)
        self._kept = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it ran under its own name, which it keeps."""
        module.__spec__ = self._kept
        module.__name__ = self._kept.name if self._kept else module.__name__


def install() -> None:
    """Let old names be imported; called once by ``veloxbench`` itself."""
    sys.meta_path.append(_MovedFinder())
