"""Where numbers come from: the hashes of the code, versions, the machine's state, and the checkouts around them."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import itertools
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

import veloxbench

PACKAGES = ("mlx", "mlx-lm", "numpy", "scipy", "transformers", "tokenizers", "veloxbench")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that may move a number."""
    by_package = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_package[package] = "absent"
    return by_package


def machine_state() -> dict[str, Any]:
    """Load, free memory and power at this moment: context for a timing, never part of a key."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return {
        "load_1min": round(psutil.getloadavg()[0], 2),
        "available_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "on_battery": None if battery is None else not battery.power_plugged,
    }


@functools.cache
def source_hash(*packages: ModuleType) -> str:
    """Hash of the Python syntax trees, kernel bodies and native sources below the packages.

    Comments in Python do not count.
    """
    digest = hashlib.sha256()
    for package in packages:
        root = Path(str(package.__file__)).parent
        files = [file for suffix in ("py", "metal", "cpp", "h") for file in sorted(root.rglob(f"*.{suffix}"))]
        for file in files:
            text = file.read_text(encoding="utf-8")
            digest.update(str(file.relative_to(root)).encode())
            digest.update((ast.dump(ast.parse(text)) if file.suffix == ".py" else text).encode())
    return digest.hexdigest()


def package_of(thing: Any) -> Path:
    """The folder of the top-level package that defines a function or class, or the file of a module without one.

    Raises:
        ValueError: it was defined in no file (typed into an interpreter).
    """
    module = sys.modules.get(thing.__module__)
    top = sys.modules.get(thing.__module__.partition(".")[0])
    for each in (top, module):
        file = getattr(each, "__file__", None)
        if file is not None:
            path = Path(file).resolve()
            return path.parent if path.name == "__init__.py" else path
        if each is not None and list(getattr(each, "__path__", ())):  # a namespace package has folders, no file
            return Path(next(iter(each.__path__))).resolve()
    raise ValueError(f"{thing!r} is defined in no file, so that nothing can tell one state of its code from another")


@functools.cache
def code_hash(*things: Any) -> str:
    """Hash of all code of the packages that define some functions and classes: sources, kernels, binaries, data.

    Comments in Python do not count; every byte of every other file does.
    """
    digest = hashlib.sha256()
    for place in sorted({package_of(thing) for thing in things}):
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            inside = file.relative_to(place.parent)
            if not file.is_file() or _IGNORED & set(inside.parts) or file.suffix in (".pyc", ".pyo"):
                continue
            content = file.read_bytes()
            if file.suffix == ".py":
                content = ast.dump(ast.parse(content)).encode()
            digest.update(f"{inside.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


_IGNORED = frozenset({"__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache"})


@functools.cache
def harness_hash() -> str:
    """Hash of the modules of the harness that produce numbers (not of its front doors and reports).

    Weights, token blocks and settings have their own hashes in a record's key; how a model is loaded, a cache built
    and a measurement carried out have this one alone.
    """
    root = Path(veloxbench.__file__).parent
    single = ("records/intervals.py", "inputs/models.py", "run/session.py", "run/apart.py", "run/worker.py")
    files = [root / place for place in single]
    rooms = [sorted((root / room).glob("*.py")) for room in ("measure", "methods")]
    return _source_hash([*files, *itertools.chain(*rooms)])


def timing_hash() -> str:
    """Hash of what a timed sample depends on besides the implementation: benchmark, canary, order, processes."""
    room = Path(veloxbench.__file__).parent / "compare"
    return _source_hash([room / f"{name}.py" for name in ("timed_decode", "timing_blocks", "side")])


def _source_hash(files: Sequence[Path]) -> str:
    trees = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()


def git(place: Path, *arguments: str) -> str | None:
    """What git prints in a folder, without the last newlines; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that this code runs from; ``(None, None)`` outside one."""
    root = Path(veloxbench.__file__).parent
    if git(root, "ls-files", "--error-unmatch", str(root / "__init__.py")) is None:
        return None, None
    return _checkout(root)


@functools.cache
def project_state(place: Path) -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout around a working directory, where that is another than this code's own."""
    top, root = (git(folder, "rev-parse", "--show-toplevel") for folder in (place, Path(veloxbench.__file__).parent))
    if top is None or (top == root and git_state() != (None, None)):
        return None, None
    return _checkout(Path(top))


NO_BASELINES = (".", ":(exclude,glob)**/baselines/*/*.json")
"""Pathspec of what can move a number: a baseline that was approved and committed is no change of code."""


@functools.cache
def changed_since(commit: str, place: Path) -> list[str] | None:
    """Tracked files of the checkout around ``place`` that are not as in a commit, baselines left out; None: unknown."""
    top = git(place, "rev-parse", "--show-toplevel")
    names = None if top is None else git(Path(top), "diff", "--name-only", commit, "--", *NO_BASELINES)
    return None if names is None else names.splitlines()


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    status = git(root, "status", "--porcelain", "--untracked-files=no", "--", *NO_BASELINES)
    return git(root, "rev-parse", "HEAD"), None if status is None else bool(status)
