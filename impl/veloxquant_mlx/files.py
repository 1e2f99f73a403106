"""Files of this package: written beside and renamed, and damage that is met when they are read told in one sentence."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["beside", "reading"]

_DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """What a damaged file raises in the block (RecursionError included) becomes a ValueError that names the file.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: the block could make nothing of the file.
    """
    with Path(path).open("rb"):
        pass
    try:
        yield
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if not isinstance(error, ValueError) or not reason:
            reason = f"{type(error).__name__} {reason}".strip()
        raise ValueError(f"{path} is no readable {what}: {reason}") from error


@contextlib.contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """A path in the same folder, with the same suffix, that takes the place of ``path`` when the block ends well.

    A symbolic link stays, and what it points to is replaced.

    Raises:
        OSError: ``path`` is there and no regular file, or its folder cannot be written to.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not final.is_file():
        raise OSError(f"{path} is no regular file that could be replaced")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {final.parent} to write {final.name} to")
    made = final.with_name(f".{secrets.token_hex(8)}{final.suffix}")
    try:
        yield made
        made.replace(final)
    finally:
        made.unlink(missing_ok=True)
