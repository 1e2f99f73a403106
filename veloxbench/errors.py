"""Errors that a user can act on; each carries the exit code that the command line returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``veloxbench`` (and of a gate run through pytest)."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 2
    BASELINE = 3
    USAGE = 4
    ENVIRONMENT = 5


class VeloxError(Exception):
    """A problem that one sentence explains; the command line prints it without a traceback."""

    exit_code = ExitCode.USAGE


class UsageError(VeloxError):
    """What was asked for does not exist or cannot be done: a name, a value, a combination."""


class UnfitEnvironmentError(VeloxError):
    """The machine, the network or a downloaded file is not fit: nothing was measured or lost."""

    exit_code = ExitCode.ENVIRONMENT


class IntegrityError(UnfitEnvironmentError):
    """A file is not what its pinned hash says; it was kept aside and not used."""


class BaselineError(VeloxError):
    """A baseline is missing, edited by hand, expired or of something else: nothing can be judged by it."""

    exit_code = ExitCode.BASELINE


class EngagementError(VeloxError):
    """A method did not hold a layer that it claims: an error, never a result."""

    exit_code = ExitCode.REGRESSION


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that no registry has, listing near matches (or all names when few)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    return UsageError(f"unknown {kind} {name!r}; did you mean {', '.join(near)}?")
