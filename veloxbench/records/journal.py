"""Files that outlive a killed process: journals of whole lines, and texts that are replaced at once or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from veloxbench.errors import IntegrityError, UnfitEnvironmentError, validation_reason

Line = TypeVar("Line")


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a journal; a last one without its newline was being written when the process died."""
    return content[: content.rfind(b"\n") + 1].splitlines()


def parsed_lines(path: Path, content: bytes, parse: Callable[[bytes], Line], what: str) -> Iterator[tuple[int, Line]]:
    """Every whole line of a journal with its number, parsed.

    Raises:
        IntegrityError: a line that is not ``what`` it should be; names file and line.
    """
    for number, line in enumerate(whole_lines(content), start=1):
        try:
            yield number, parse(line)
        except ValidationError as error:
            raise IntegrityError(f"{path}:{number} is not {what}: {validation_reason(error)}") from error


@contextmanager
def sole_writer(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, whose folder is made where it is missing, against other processes.

    Raises:
        UnfitEnvironmentError: the folder cannot be written, or another process holds the lock, which ``busy`` tells.
    """
    folder, held = lock.parent, FileLock(lock, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout as error:
        raise UnfitEnvironmentError(busy) from error
    except OSError as error:
        raise UnfitEnvironmentError(f"cannot write to the output folder {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        held.release()


def cut_torn_tail(path: Path) -> bytes:
    """Take a journal's torn last line away, so that the next one does not continue it; the bytes cut off."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
    return content[whole:]


def append_line(path: Path, line: str) -> None:
    """Add a line, its newline included, with one write, then fsync.

    Raises:
        UnfitEnvironmentError: the line could not be written; nothing of it is left.
    """
    content = line.encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, content) != len(content):
                os.ftruncate(descriptor, before)
                raise OSError("the line was written in part; is the disk full?")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnfitEnvironmentError(f"cannot write to {path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UnfitEnvironmentError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(file.name).chmod(0o666 & ~umask)
        Path(file.name).replace(path)
    except OSError as error:
        raise UnfitEnvironmentError(f"cannot write {path}: {error.strerror or error}") from error
