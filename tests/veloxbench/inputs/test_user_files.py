"""A user's path is the user's: what is named as an output is written, followed or refused, and never turned into
something else.
"""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from veloxbench.errors import ExitCode, UnfitEnvironmentError
from veloxbench.records import journal
from veloxbench.records.journal import append_line, cut_torn_tail, held, write_text

ROOT = os.geteuid() == 0
LONG = "line\n" * 100_000  # more than a pipe holds


@pytest.fixture
def device(tmp_path):
    """A character device of the test's own."""

    def make(major, minor):
        path = tmp_path / "device"
        try:
            os.mknod(path, 0o20666, os.makedev(major, minor))
            path.open("wb").close()
        except PermissionError:
            pytest.skip("device nodes cannot be made here")
        return path

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_character_device_is_written_to(device):
    """``--out /dev/null`` stays a device."""
    path = device(1, 3)
    write_text(path, LONG)
    assert stat.S_ISCHR(path.lstat().st_mode)


def test_a_full_device_is_one_sentence(device):
    """``/dev/full``: the reason, and the device stays one."""
    path = device(1, 7)
    with pytest.raises(UnfitEnvironmentError, match=r"cannot write .*device: No space left") as caught:
        write_text(path, LONG)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert stat.S_ISCHR(path.lstat().st_mode)


def test_a_pipe_gets_the_whole_text(tmp_path):
    """A reader that comes later than the writer and is slower gets every byte, and the pipe stays a pipe."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with (tmp_path / "got").open("wb") as got, subprocess.Popen(["sh", "-c", f"sleep .2; cat {path}"], stdout=got):
        write_text(path, LONG)
    assert (tmp_path / "got").read_text() == LONG
    assert stat.S_ISFIFO(path.lstat().st_mode)


def test_a_pipe_that_nobody_reads_is_one_sentence(tmp_path, monkeypatch):
    """Its reader is waited for, not for ever."""
    monkeypatch.setattr(journal, "READER_PATIENCE_S", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnfitEnvironmentError, match="nobody read from that pipe"):
        write_text(tmp_path / "pipe", "x")


def test_a_pipe_whose_reader_takes_nothing_is_one_sentence(tmp_path, monkeypatch):
    """It is waited for, not for ever."""
    monkeypatch.setattr(journal, "READER_PATIENCE_S", 0.05)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UnfitEnvironmentError, match="took nothing for"):
        write_text(path, LONG)
    os.close(reader)


def test_standard_output_in_a_file_is_added_to(tmp_path):
    """``--out /dev/stdout > file``: the shell's file holds what was printed and the text; it is not replaced."""
    code = "from pathlib import Path; from veloxbench.records.journal import write_text; import sys\n"
    code += "print('before', flush=True); write_text(Path('/dev/stdout'), 'text\\n'); print('after', flush=True)"
    target = tmp_path / "out.md"
    with target.open("ab") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert target.read_text() == "before\ntext\nafter\n"


@pytest.mark.skipif(not ROOT, reason="only root can make a block device")
def test_a_block_device_is_refused(tmp_path):
    """A disk is never written to."""
    path = tmp_path / "disk"
    try:
        os.mknod(path, 0o60666, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    with pytest.raises(UnfitEnvironmentError, match="it is a block device"):
        write_text(path, "x")


def test_a_directory_is_refused(tmp_path):
    """It is named for what it is, and nothing is left in it or beside it."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnfitEnvironmentError, match="it is a directory"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


def test_a_socket_is_refused(tmp_path):
    """Nor is a socket replaced."""
    import socket

    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))
        with pytest.raises(UnfitEnvironmentError, match="it is a socket"):
            write_text(path, "x")
    assert stat.S_ISSOCK(path.lstat().st_mode)


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_followed(tmp_path, there):
    """The file that it leads to is written, or made in the folder where it is to be; the link stays."""
    target = tmp_path / "deep" / "real.md"
    if there:
        target.parent.mkdir()
        target.write_text("old")
    (tmp_path / "link.md").symlink_to("deep/real.md")
    write_text(tmp_path / "link.md", "new")
    assert (tmp_path / "link.md").is_symlink()
    assert target.read_text() == "new"


def test_a_link_to_itself_is_one_sentence(tmp_path):
    """A loop leads nowhere."""
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UnfitEnvironmentError, match="cannot write"):
        write_text(tmp_path / "link", "x")


def test_permissions_are_kept(tmp_path):
    """A file that only its owner reads stays so; a new one follows the umask."""
    secret = tmp_path / "secret.md"
    secret.write_text("old")
    secret.chmod(0o600)
    write_text(secret, "new")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new.md", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.md").stat().st_mode) == 0o640


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_the_owner_is_kept(tmp_path):
    """A file of a user's that root writes stays the user's."""
    path = tmp_path / "theirs.md"
    path.write_text("old")
    os.chown(path, 1234, 1234)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1234)


def test_a_hard_link_stays_one_file(tmp_path):
    """Both names hold the new text, also when it is shorter."""
    (tmp_path / "a").write_text("a long old text")
    os.link(tmp_path / "a", tmp_path / "b")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_protected_file_is_refused_and_a_protected_folder_is_not_needed(tmp_path):
    """A read-only file stays as it is; a writable file in a read-only folder is written in place."""
    (tmp_path / "kept.md").write_text("old")
    (tmp_path / "kept.md").chmod(0o444)
    with pytest.raises(UnfitEnvironmentError, match="write-protected"):
        write_text(tmp_path / "kept.md", "new")
    (tmp_path / "open.md").write_text("old")
    tmp_path.chmod(0o555)
    try:
        write_text(tmp_path / "open.md", "new")
    finally:
        tmp_path.chmod(0o755)
    assert (tmp_path / "open.md").read_text() == "new"


def test_a_file_that_cannot_be_renamed_over_is_written_in_place(tmp_path, monkeypatch):
    """A file that is mounted alone, as containers do, refuses the rename: EBUSY."""
    path = tmp_path / "mounted.md"
    path.write_text("a long old text")

    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["mounted.md"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    """The old text stays, and nothing unfinished lies beside it."""
    path = tmp_path / "page.md"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnfitEnvironmentError, match="No space left on device"):
        write_text(path, "new")
    os.link(path, tmp_path / "other.md")
    monkeypatch.setattr(journal, "_write_from_start", lambda file, content: full(0) if content == b"new" else None)
    with pytest.raises(UnfitEnvironmentError, match="No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["other.md", "page.md"]


@pytest.mark.parametrize("name", ["file/below", "a" * 300, "with\0nul"])
def test_a_path_that_cannot_be_is_one_sentence(tmp_path, name):
    """Below a file, too long, with a zero byte."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UnfitEnvironmentError, match="cannot write") as caught:
        write_text(tmp_path / name, "x")
    assert "\n" not in str(caught.value)


def test_a_name_as_long_as_the_disk_allows(tmp_path):
    """What is written beside it has a short name of its own."""
    write_text(tmp_path / ("n" * 255), "x")
    assert (tmp_path / ("n" * 255)).read_text() == "x"


def test_half_a_character_is_spelled_out(tmp_path):
    """A file name that is no UTF-8 may stand in a message: it does not end the page."""
    write_text(tmp_path / "page.md", "a \udcff b")
    assert (tmp_path / "page.md").read_bytes() == b"a \\udcff b"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_journal_that_is_no_file_is_refused(tmp_path, make):
    """A pipe or a folder in a journal's place: one sentence, and nobody waits."""
    make(tmp_path / "records.jsonl")
    with pytest.raises(UnfitEnvironmentError, match=r"records\.jsonl"):
        cut_torn_tail(tmp_path / "records.jsonl")
    with pytest.raises(UnfitEnvironmentError, match=r"records\.jsonl"):
        append_line(tmp_path / "records.jsonl", "{}\n")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_worked_on_without(tmp_path, monkeypatch, code):
    """Some network homes have none: the work is done, and the caller knows that nothing was held."""

    def refuse(descriptor, operation):
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path / "lock") as locked:
        assert not locked or code == errno.ENOSYS  # there `filelock` itself falls back to a marker file


def test_a_lock_that_is_held_is_waited_for_or_said(tmp_path):
    """Without waiting the other holder is an exception."""
    with held(tmp_path / "lock") as locked:
        assert locked
        with pytest.raises(filelock.Timeout), held(tmp_path / "lock", wait=False):
            pass
