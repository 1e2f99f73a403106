"""One kind of registry: a decorator adds, a collision raises, an unknown name lists near matches."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def near_matches(name: str, known: Iterable[str]) -> str:
    """Up to three names of ``known`` that resemble ``name``, else all of them, joined by commas."""
    names = sorted(known)
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names)


class Registry(Generic[T]):
    """Names to entries of one kind.

    Args:
        kind: what an entry is, for error messages.
        package: whose modules enter something; they are imported when the first entry is asked for.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._complete = False

    def _all(self) -> dict[str, T]:
        if not self._complete:
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._complete = True
        return self._entries

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters its argument under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """The entry of that name.

        Raises:
            ValueError: no such name; near matches are listed.
        """
        if name not in self._all():
            raise ValueError(f"unknown {self.kind} {name!r}; did you mean {near_matches(name, self._all())}?")
        return self._all()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))
