"""Caches of other projects, each in an environment of its own: which are here, and their methods as arms.

A peer is a distribution with a name; ``peers add`` installs it into a virtual environment of the cache folder, where
what it does not pin is this program's own (the same MLX, so that figures stand side by side). Its arms are written
``veloxquant-mlx/turboquant_rvq@1``: the peer, a slash, and a method of its adapter, which is a module of
:mod:`veloxbench.methods.adapters` or a file of the user's; or the path of any cache class, ``peer/module.Class``,
whose arguments are the arm's parameters. The registry hands every name with a slash to :func:`peer_method`.

No module of a peer is imported by this process: adapters import theirs inside functions, which run in the worker.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from mlx_lm.models.cache import KVCache, RotatingKVCache
from pydantic import Field, ValidationError

from veloxbench.errors import IntegrityError, UnfitEnvironmentError, UsageError, unknown_name, validation_reason
from veloxbench.inputs.sources import cache_dir, cache_lock, path_of, sha256_of
from veloxbench.methods import adapters
from veloxbench.methods.registry import BuildContext, Geometry, Method, TargetMeaning, plain_caches
from veloxbench.records.frozen import Frozen
from veloxbench.records.journal import read_content, write_text
from veloxbench.records.provenance import versions

OURS = "mlx-lm"
"""The peer that needs no environment: what this program stands on brings caches of its own."""

_NOTE = "peer.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
MOVERS = ("mlx", "mlx-lm", "numpy")
"""Packages of an environment whose versions may move a peer's figures."""


class Peer(Frozen):
    """A peer that was added.

    Attributes:
        name: of its distribution, as arms have it.
        requirement: what was asked of pip.
        adapter: a module of :mod:`veloxbench.methods.adapters`, a file, or None: classes alone.
        seconds: longest time of one measurement.
        memory_gib: most resident memory of one measurement.
    """

    name: str
    version: str
    requirement: str
    adapter: str | None = None
    seconds: float = Field(default=1800.0, gt=0, allow_inf_nan=False)
    memory_gib: float = Field(gt=0, allow_inf_nan=False)

    @property
    def folder(self) -> Path:
        """Where its environment is."""
        return peers_folder() / self.name

    @property
    def python(self) -> Path:
        """The interpreter that its caches run in."""
        return Path(sys.executable) if self.name == OURS else _python_of(self.folder)

    @property
    def site_packages(self) -> Path | None:
        """Where pip put it; None for the peer that is installed here."""
        return None if self.name == OURS else _site_packages(self.folder)

    @functools.cached_property
    def implementation(self) -> str:
        """Name, version and a hash of its installed files, its adapter, and the versions of what moves its figures."""
        if self.site_packages is None:
            return f"{self.name} {self.version}"
        found = {key: _version_in(self.site_packages, key) or versions()[key] for key in MOVERS}
        hashes = [_distribution_hash(self.site_packages, self.name), _adapter_hash(self.adapter), json.dumps(found)]
        return f"{self.name} {self.version} {sha256_text(*hashes)[:16]}"


def sha256_text(*parts: str) -> str:
    """One hash of several texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A method of an adapter: what an arm's name after the slash stands for."""

    factory: Callable[..., list[Any]]
    targets: tuple[float, ...] | None
    target_means: TargetMeaning | None
    summary: str


def entry(
    *, targets: tuple[float, ...] | None = None, target_means: TargetMeaning = "code_bits"
) -> Callable[[Callable[..., list[Any]]], Entry]:
    """Make the decorated factory a method of its adapter, under the function's name.

    The factory is that of :func:`veloxbench.methods.registry.register`: ``(context, target, **parameters)`` to one
    cache a layer. It imports the peer inside its body.

    Args:
        targets: those that it can meet; None where it has settings alone.
        target_means: what a target is.
    """

    def decorate(factory: Callable[..., list[Any]]) -> Entry:
        summary = (factory.__doc__ or factory.__name__).strip().splitlines()[0]
        return Entry(factory, targets, target_means if targets else None, summary)

    return decorate


class _ForeignKind(type):
    def __instancecheck__(cls, cache: object) -> bool:
        return type(cache) not in (KVCache, RotatingKVCache)


class ForeignCache(metaclass=_ForeignKind):
    """Whatever is not mlx-lm's own fp16 cache: what a peer claims to hold."""


def peers_folder() -> Path:
    """Where the environments of peers are."""
    return cache_dir() / "peers"


def known_peers() -> dict[str, Peer]:
    """Every peer that was added, and mlx-lm itself, by name.

    Raises:
        IntegrityError: a peer's note is damaged.
    """
    own = Peer(name=OURS, version=versions()[OURS], requirement=OURS, adapter="mlx_lm", memory_gib=_half_of_memory())
    peers = {OURS: own}
    for note in sorted(peers_folder().glob(f"*/{_NOTE}")):
        try:
            peer = Peer.model_validate_json(read_content(note))
        except ValidationError as error:
            raise IntegrityError(f"{note} describes no peer: {validation_reason(error)}; add it again") from error
        peers[peer.name] = peer
    return peers


def get_peer(name: str) -> Peer:
    """The peer of that name.

    Raises:
        UsageError: it was not added; says how.
    """
    peers = known_peers()
    if name not in peers:
        raise UsageError(
            f"the peer {name!r} is not on this machine: `veloxbench peers add {name}` makes its environment; "
            f"there are {', '.join(peers)}"
        )
    return peers[name]


@functools.cache
def peer_method(name: str) -> Method:
    """The method of a name with a slash: ``peer/method`` or ``peer/module.Class``.

    A peer of which this package has an adapter need not be here yet: its arms can be named, and are not measured.

    Raises:
        UsageError: no such peer, or no such method of its adapter.
    """
    of, _, what = name.partition("/")
    entries = _entries(of)
    if what in entries:
        chosen = entries[what]
    elif "." in what:
        chosen = Entry(functools.partial(_of_class, what), None, None, f"the class {what}")
    else:
        raise unknown_name(f"method of {of}", what, [*entries, "module.Class"])
    return Method(
        name=name,
        summary=chosen.summary,
        factory=chosen.factory,
        cache_classes=(ForeignCache,),
        targets=chosen.targets,
        target_means=chosen.target_means,
        formula=_no_formula,
        implementation=lambda: get_peer(of).implementation,
        foreign=of,
    )


def _entries(of: str) -> dict[str, Entry]:
    adapter = _own_adapter(of)
    if adapter is not None and of not in known_peers():
        return _of_adapter(adapter)
    return entries_of(get_peer(of))


def entries_of(peer: Peer) -> dict[str, Entry]:
    """The methods of a peer's adapter by name.

    Raises:
        UsageError: its adapter cannot be loaded.
    """
    return {} if peer.adapter is None else _of_adapter(peer.adapter)


def _of_adapter(adapter: str) -> dict[str, Entry]:
    return {name: thing for name, thing in vars(_load_adapter(adapter)).items() if isinstance(thing, Entry)}


def _of_class(path: str, context: BuildContext, target: None, **arguments: Any) -> list[Any]:
    """A cache class of any module in place of every plain cache."""
    module, _, name = path.rpartition(".")
    make = getattr(importlib.import_module(module), name)
    return plain_caches(context.model, lambda layer: make(**arguments))


def _no_formula(cache: Any, tokens: int, geometry: Geometry) -> Fraction:
    raise UsageError(
        "nobody promises the bytes of a peer's cache: its arms are measured by the suites perplexity and holds"
    )


def _load_adapter(adapter: str) -> ModuleType:
    if not adapter.endswith(".py"):
        return importlib.import_module(f"{adapters.__name__}.{adapter}")
    spec = importlib.util.spec_from_file_location(f"veloxbench_adapter_{Path(adapter).stem}", adapter)
    try:
        assert spec is not None and spec.loader is not None  # noqa: PT018 (a .py file always has both)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"the adapter {adapter} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _adapter_hash(adapter: str | None) -> str:
    if adapter is None:
        return ""
    text = Path(str(_load_adapter(adapter).__file__)).read_text(encoding="utf-8")
    return sha256_text(ast.dump(ast.parse(text)))


def _distribution_hash(site_packages: Path, name: str) -> str:
    """Hash of every file that pip installed for a distribution, byte code left out."""
    (distribution,) = importlib.metadata.distributions(name=name, path=[str(site_packages)])
    files = sorted(path for path in distribution.files or () if path.suffix != ".pyc" and path.parts[0] != "..")
    hashes = [f"{path} {sha256_of(Path(str(path.locate())))}" for path in files if "dist-info" not in path.parts[0]]
    return sha256_text(*hashes)


def _version_in(site_packages: Path, package: str) -> str | None:
    found = list(importlib.metadata.distributions(name=package, path=[str(site_packages)]))
    return found[0].version if found else None


def _half_of_memory() -> float:
    return psutil.virtual_memory().total / 2**31


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _site_packages(folder: Path) -> Path:
    scheme = {"base": str(folder), "platbase": str(folder)}
    return Path(sysconfig.get_path("purelib", "venv", scheme))


def own_packages() -> list[str]:
    """The folders of packages that this program runs on."""
    return [place for place in dict.fromkeys(sys.path) if Path(place).name in ("site-packages", "dist-packages")]


def add(
    requirement: str,
    *,
    adapter: str | None = None,
    with_dependencies: bool = True,
    seconds: float | None = None,
    memory_gib: float | None = None,
) -> Peer:
    """Make a peer's environment, or make it anew.

    Args:
        requirement: for pip: a name with a version, a local path, a URL.
        adapter: a module of this package's adapters or a .py file; absent: the one named as the distribution, if any.
        with_dependencies: whether pip installs what the distribution asks for.
        seconds: see :class:`Peer`, and so ``memory_gib``; absent: half an hour and half of the memory.

    Raises:
        UsageError: an adapter that is not there.
        UnfitEnvironmentError: pip could not install it; says why.
    """
    if adapter is not None:
        adapter = _checked_adapter(adapter)
    place = path_of(requirement)
    wanted = str(place.resolve()) if place.exists() else requirement
    peers_folder().mkdir(parents=True, exist_ok=True)
    unfinished = peers_folder() / f".unfinished-{sha256_text(wanted)[:12]}"
    with cache_lock("peers"):
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            name, version = _installed(unfinished, wanted, with_dependencies=with_dependencies)
            peer = Peer(
                name=name,
                version=version,
                requirement=requirement,
                adapter=adapter or _own_adapter(name),
                memory_gib=memory_gib or _half_of_memory(),
                **({} if seconds is None else {"seconds": seconds}),
            )
            shutil.rmtree(peer.folder, ignore_errors=True)
            unfinished.rename(peer.folder)  # its interpreter is a link, and nothing else of it knows its place
            write_text(peer.folder / _NOTE, peer.model_dump_json(indent=1) + "\n")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    peer_method.cache_clear()
    return peer


def remove(name: str) -> None:
    """Delete a peer's environment.

    Raises:
        UsageError: it was not added.
    """
    peer = get_peer(name)
    if peer.name == OURS:
        raise UsageError(f"{OURS} is what this program stands on; it is no environment that could be removed")
    with cache_lock("peers"):
        shutil.rmtree(peer.folder)
    peer_method.cache_clear()


def _installed(folder: Path, requirement: str, *, with_dependencies: bool) -> tuple[str, str]:
    """Install into a new environment; the distribution's normalised name and version."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    (_site_packages(folder) / "veloxbench-own.pth").write_text("\n".join(own_packages()) + "\n", encoding="utf-8")
    report = folder / "pip.json"
    command = [sys.executable, "-m", "pip", "--python", str(_python_of(folder)), "install", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--report", str(report), *([] if with_dependencies else ["--no-deps"])]
    done = subprocess.run([*command, requirement], capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UnfitEnvironmentError(f"pip cannot install {requirement}: {(lines or ['it says nothing'])[-1][:300]}")
    items = json.loads(report.read_text(encoding="utf-8"))["install"]
    chosen = [item["metadata"] for item in items if item["requested"]]
    if len(chosen) != 1:
        raise UsageError(f"{requirement!r} names {len(chosen)} distributions that are not here yet; name one")
    return re.sub(r"[-_.]+", "-", chosen[0]["name"]).lower(), chosen[0]["version"]


def _checked_adapter(adapter: str) -> str:
    path = path_of(adapter)
    if adapter.endswith(".py"):
        if not path.is_file():
            raise UsageError(f"the adapter {adapter!r} is not a file")
        return str(path.resolve())
    if adapter not in own_adapters():
        raise unknown_name("adapter", adapter, own_adapters())
    return adapter


def own_adapters() -> Sequence[str]:
    """Modules of this package's adapters."""
    return [file.stem for place in adapters.__path__ for file in sorted(Path(place).glob("[!_]*.py"))]


def _own_adapter(name: str) -> str | None:
    module = name.replace("-", "_")
    return module if module in own_adapters() else None
