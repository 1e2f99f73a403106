"""Files that outlive a killed process: journals of whole lines, and texts that are replaced at once or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from veloxbench.errors import UnfitEnvironmentError


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a journal; a last one without its newline was being written when the process died."""
    return content[: content.rfind(b"\n") + 1].splitlines()


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
