"""Files that outlive a killed process, and files of a user's: journals of whole lines, texts replaced at once or not at
all, locks where the disk has them.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from veloxbench.errors import IntegrityError, UnfitEnvironmentError, validation_reason

Line = TypeVar("Line")

READER_PATIENCE_S = 15.0
"""How long a pipe that takes nothing is waited for before the user is told."""

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_ONLY_IN_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
"""Errors of a folder that takes no new file, or of a mounted file that cannot be renamed over."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def read_content(path: Path) -> bytes:
    """A user's file.

    Raises:
        IntegrityError: it cannot be read, or it is a device, which may never end; says why.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise IntegrityError(f"{path} is {kind_of(mode)}, not a file to be read")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise IntegrityError(f"{path} cannot be read: {reason or error}") from error


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a journal; a last one without its newline was being written when the process died."""
    return content[: content.rfind(b"\n") + 1].splitlines()


def parsed_lines(path: Path, content: bytes, parse: Callable[[bytes], Line], what: str) -> Iterator[tuple[int, Line]]:
    """Every whole line of a journal with its number, parsed.

    Raises:
        IntegrityError: a line that is not ``what`` it should be; names file and line.
    """
    for number, line in enumerate(whole_lines(content), start=1):
        yield number, parsed(line, parse, f"{path}:{number}", what)


def parsed(line: bytes, parse: Callable[[bytes], Line], place: str, what: str) -> Line:
    """One line of a journal; an IntegrityError where it is not ``what`` should stand at its place."""
    try:
        return parse(line)
    except (ValidationError, RecursionError) as error:
        reason = validation_reason(error) if isinstance(error, ValidationError) else "it is nested too deeply"
        raise IntegrityError(f"{place} is not {what}: {reason}") from error


BLOCK = 1 << 16
"""Bytes of a journal that are read at once: they stay in a core's cache while its lines are looked through."""


def whole_size(path: Path) -> int:
    """Bytes of a journal's whole lines."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - BLOCK, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def blocks_backward(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a journal, several at a time from its end, each time with the offset of the first of them."""
    end, size, rest = whole_size(path), BLOCK, b""
    with path.open("rb", buffering=0) as file:
        while end:
            start = max(end - size, 0)
            file.seek(start)
            content = file.read(end - start) + rest
            end = start
            cut = content.find(b"\n") + 1 if start else 0  # the line there begins before this block
            if cut == len(content):
                size, rest = 2 * size, content
            else:
                yield start + cut, content[cut:]
                size, rest = BLOCK, content[:cut]


def line_number(path: Path, offset: int) -> int:
    """The number, from 1, of the line that starts at an offset."""
    number = 1
    with path.open("rb") as file:
        while offset > 0:
            content = file.read(min(offset, BLOCK))
            number += content.count(b"\n")
            offset -= len(content)
    return number


@contextmanager
def sole_writer(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, whose folder is made where it is missing, against other processes.

    Raises:
        UnfitEnvironmentError: the folder cannot be written, or another process holds the lock, which ``busy`` tells.
    """
    folder = lock.parent
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(lock, wait=False))
        except Timeout as error:
            raise UnfitEnvironmentError(busy) from error
        except OSError as error:
            raise UnfitEnvironmentError(
                f"cannot write to the output folder {folder}: {error.strerror or error}"
            ) from error
        yield


def cut_torn_tail(path: Path) -> bytes:
    """Take a journal's torn last line away, so that the next one does not continue it; the bytes cut off.

    Raises:
        UnfitEnvironmentError: the path is no regular file, or it cannot be read or cut.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnfitEnvironmentError(
                f"{path} is {kind_of(path.stat().st_mode)}, not a file that lines can be added to"
            )
        whole = whole_size(path)
        with path.open("rb") as file:
            file.seek(whole)
            torn = file.read()
        if torn:
            os.truncate(path, whole)
    except OSError as error:
        raise UnfitEnvironmentError(f"cannot open {path} for appending: {error.strerror or error}") from error
    return torn


def append_line(path: Path, line: str) -> None:
    """Add a line, its newline included, with one write, then fsync.

    Raises:
        UnfitEnvironmentError: the line could not be written; nothing of it is left.
    """
    content = line.encode("utf-8", "backslashreplace")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
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


def encoded(text: str | bytes) -> bytes:
    """A text as it is written: UTF-8, in which a name that is none may stand; bytes as they are."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")


def write_text(path: Path, text: str | bytes) -> None:
    """Write a text, as UTF-8, or bytes where the user asked for them.

    A regular file is replaced whole or not at all, and keeps its permissions; a symbolic link is followed. What cannot
    be replaced without harm is written in place: a file with other hard links, a file in a folder that takes no new
    files. A character device or a pipe is written to, never replaced.

    Raises:
        UnfitEnvironmentError: it cannot be written; what was there is as it was.
    """
    content = encoded(text)
    try:
        mode = _mode(path)
        if mode is not None and not stat.S_ISREG(mode):
            _write_through(path, mode, content)
        elif _is_descriptor(path):
            _write_through(path, stat.S_IFCHR, content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise UnfitEnvironmentError(f"cannot write {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UnfitEnvironmentError(f"cannot write {str(path)!r}: {error}") from error


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _is_descriptor(path: Path) -> bool:
    """Whether a path stands for an open file (``/dev/stdout``): what a shell redirected there is not replaced."""
    folder = os.path.realpath(path.parent)
    return folder in ("/dev", "/dev/fd") or (folder.startswith("/proc/") and folder.endswith("/fd"))


def kind_of(mode: int) -> str:
    """What a path that is no regular file is, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def _write_through(path: Path, mode: int, content: bytes) -> None:
    """Into a device or a pipe, waiting for its reader as long as the reader takes something."""
    if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        raise OSError(f"it is {kind_of(mode)}")
    descriptor = _open_with_reader(path)
    try:
        left = memoryview(content)
        while left:
            _, ready, _ = select.select([], [descriptor], [], READER_PATIENCE_S)
            if not ready:
                raise OSError(f"its reader took nothing for {READER_PATIENCE_S:g} s")
            with suppress(BlockingIOError):
                left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)


def _open_with_reader(path: Path) -> int:
    """Open a device, or a pipe as soon as somebody reads from it."""
    deadline = time.monotonic() + READER_PATIENCE_S
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise OSError(f"nobody read from that pipe for {READER_PATIENCE_S:g} s") from error
        time.sleep(0.02)


def _replace(path: Path, content: bytes) -> None:
    """Write beside a regular file and rename; in place where that would cut a hard link or cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.stat() if path.exists() else None
    if old is not None and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected")
    if old is not None and old.st_nlink > 1:
        _overwrite(path, content)
        return
    try:
        _write_beside_and_rename(path, content, old)
    except OSError as error:
        if old is None or error.errno not in _ONLY_IN_PLACE:
            raise
        _overwrite(path, content)


def _write_beside_and_rename(path: Path, content: bytes, old: os.stat_result | None) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".veloxbench-")
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if old is None:
            umask = os.umask(0)
            os.umask(umask)
            beside.chmod(0o666 & ~umask)
        else:
            with suppress(OSError):
                os.chown(beside, old.st_uid, old.st_gid)
            beside.chmod(stat.S_IMODE(old.st_mode))
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def _overwrite(path: Path, content: bytes) -> None:
    """In place; where that fails midway (a full disk), the old content is put back."""
    with path.open("r+b", buffering=0) as file:
        before = file.read()
        try:
            _write_from_start(file, content)
        except OSError:
            _write_from_start(file, before)
            raise


def _write_from_start(file: io.FileIO, content: bytes) -> None:
    left = memoryview(content)
    file.seek(0)
    while left:
        left = left[file.write(left) :]
    file.truncate()
    os.fsync(file.fileno())


@contextmanager
def held(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; yields False, and holds nothing, where the disk has no locks (some network homes).

    Raises:
        filelock.Timeout: another process holds it and ``wait`` is False.
        OSError: the lock file cannot be made.
    """
    lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
