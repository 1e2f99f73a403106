"""Errors that a user can act on; each carries the exit code that the command line returns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from enum import IntEnum

from pydantic import ValidationError

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What steers a terminal or the direction of text, or that XML and UTF-8 do not have."""


def printable(text: str) -> str:
    """A text of somebody's (a name, a reason) on one line; what steers a terminal or breaks XML becomes U+FFFD."""
    return _STEERING.sub("\ufffd", " ".join(text.split()))


class ExitCode(IntEnum):
    """Exit codes of ``veloxbench`` (and of a gate run through pytest)."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 2
    BASELINE = 3
    USAGE = 4
    ENVIRONMENT = 5
    INTERRUPTED = 130


class VeloxError(Exception):
    """A problem that one sentence explains; the command line prints it without a traceback."""

    exit_code = ExitCode.USAGE


class UsageError(VeloxError, ValueError):
    """What was asked for does not exist or cannot be done: a name, a value, a combination.

    As a ``ValueError`` it joins the other errors of a grid that is validated, so that all are said at once.
    """


class UnfitEnvironmentError(VeloxError):
    """The machine, the network or a downloaded file is not fit: nothing was measured or lost."""

    exit_code = ExitCode.ENVIRONMENT


class IntegrityError(UnfitEnvironmentError):
    """A file is not what its pinned hash says; it was kept aside and not used."""


class BaselineError(VeloxError):
    """A baseline is missing, edited by hand, expired or of something else: nothing can be judged by it."""

    exit_code = ExitCode.BASELINE


class Stopped(VeloxError):
    """Ctrl-C, where a command can say what of its work is kept and how to go on."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, kept: str) -> None:
        super().__init__(f"stopped; {kept}")


class NotFiniteError(VeloxError, ValueError):
    """A figure that was measured is NaN or infinite: no result, and never a pass."""

    exit_code = ExitCode.REGRESSION


class EngagementError(VeloxError):
    """A method did not hold a layer that it claims: an error, never a result."""

    exit_code = ExitCode.REGRESSION


def validation_reason(error: ValidationError, limit: int = 1) -> str:
    """What is wrong, each thing with the field where it is: up to ``limit`` of them, the others counted."""
    lines = []
    for each in error.errors(include_url=False)[:limit]:
        place = ".".join(map(str, each["loc"]))
        message = str(each["msg"]).removeprefix("Value error, ")
        lines.append(f"{place}: {message}" if place else message)
    more = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 and limit > 1 else "")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that no registry has, listing near matches (or all names when few)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    return UsageError(f"unknown {kind} {name!r}; did you mean {', '.join(near)}?")
