"""Two revisions of a repository side by side, each one's packages on a path of its own.

A revision's tree is exported into the user's cache, once per commit and environment. The running environment serves as
far as it meets the dependencies that the revision declares; what it does not meet is installed into an overlay that
only this revision sees. Either way the harness is the running one: two implementations, one measuring code.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import veloxbench
from veloxbench.errors import UnfitEnvironmentError, UsageError
from veloxbench.inputs.sources import cache_dir
from veloxbench.records.record import content_hash

HARNESS = "veloxbench"
_READY = "ready"


@dataclass(frozen=True)
class Revision:
    """A commit, ready to run.

    Attributes:
        name: as the user spelled it.
        folder: where it lives in the cache: ``tree/``, ``site/`` (its packages), ``overlay/`` (its own dependencies),
            ``records/``, ``build.log``, ``worker.log``.
    """

    name: str
    commit: str
    folder: Path

    @property
    def site(self) -> Path:
        """What is put on the path: the revision's packages, without the harness."""
        return self.folder / "site"

    @property
    def packages(self) -> list[str]:
        """Names of its packages."""
        return sorted(path.name for path in self.site.iterdir())

    def environment(self) -> dict[str, str]:
        """Environment variables under which its packages, and the running harness, are imported."""
        path = (self.site, self.folder / "overlay", _harness_site())
        return {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": "1"}


def _harness_site() -> Path:
    """A folder that holds the running harness and nothing else."""
    package = Path(str(veloxbench.__file__)).resolve().parent
    folder = cache_dir() / "revisions" / "harness" / str(package.parent).strip(os.sep).replace(os.sep, "-")
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / HARNESS
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(package, target_is_directory=True)
    return folder


def resolve(revision: str, repository: Path) -> str:
    """The commit that a name means.

    Raises:
        UsageError: no such revision, or no repository.
    """
    done = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode == 0:
        return done.stdout.decode().strip()
    inside = _git(repository, "rev-parse", "--git-dir")
    if inside.returncode != 0:
        raise UsageError(f"{repository} is not a git repository, so {revision!r} can be no revision of it")
    raise UsageError(f"unknown revision {revision!r}: it is neither a commit of {repository} nor a file of records")


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, check=False)
    except OSError as error:
        raise UnfitEnvironmentError(f"git cannot be run: {error.strerror or error}") from error


def prepare(name: str, repository: Path) -> Revision:
    """Export and, where its dependencies ask for it, install a revision; once per commit and environment.

    Two processes that ask for one revision build it one after the other: the second finds it built.

    Raises:
        UsageError: unknown revision, or a tree without Python packages beside the harness.
        UnfitEnvironmentError: the build failed; names its log.
    """
    commit = resolve(name, repository)
    folder = cache_dir() / "revisions" / commit / environment_id()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / _READY).exists():
            shutil.rmtree(folder, ignore_errors=True)  # a build that was stopped
            _build(name, commit, repository, folder)
    return Revision(name, commit, folder)


def environment_id() -> str:
    """Hash of the Python version and of every installed distribution: another one may meet other dependencies."""
    installed = {f"{each.name} {each.version}" for each in importlib.metadata.distributions()}
    return content_hash([sys.version, sys.prefix, sorted(installed)])[:16]


def _build(name: str, commit: str, repository: Path, folder: Path) -> None:
    folder.mkdir()
    _export(repository, commit, folder / "tree")
    project = _project(folder / "tree", name)
    packages = _packages(folder / "tree", project)
    if not packages:
        raise UsageError(f"revision {name} ({commit[:12]}) has no Python package beside {HARNESS}: nothing to compare")
    (folder / "site").mkdir()
    for package in packages:
        (folder / "site" / package.name).symlink_to(package, target_is_directory=True)
    unmet = unmet_dependencies(project.get("project", {}).get("dependencies", []), name)
    if unmet:
        _overlay(folder, name, unmet)
    (folder / _READY).touch()


def _export(repository: Path, commit: str, tree: Path) -> None:
    done = _git(repository, "archive", "--format=tar", commit)
    if done.returncode != 0:
        raise UnfitEnvironmentError(f"git cannot export {commit[:12]}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(tree, filter="data")


def _project(tree: Path, name: str) -> dict[str, Any]:
    file = tree / "pyproject.toml"
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"pyproject.toml of revision {name} is not valid: {error}") from error


def _packages(tree: Path, project: dict[str, Any]) -> list[Path]:
    """Package folders: those that hatch's wheel declares, else all with an ``__init__.py`` in src/ or the root."""
    wheel = project.get("tool", {}).get("hatch", {}).get("build", {}).get("targets", {}).get("wheel", {})
    declared = [tree / path for path in wheel.get("packages", [])]
    root = tree / "src" if (tree / "src").is_dir() else tree
    folders = declared or sorted(init.parent for init in root.glob("*/__init__.py"))
    return [path for path in folders if path.is_dir() and path.name not in (HARNESS, "tests")]


def unmet_dependencies(dependencies: Sequence[str], name: str) -> list[str]:
    """Declared dependencies that the running environment does not meet.

    Raises:
        UsageError: one that cannot be read.
    """
    unmet = []
    for text in dependencies:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise UsageError(f"revision {name} declares the dependency {text!r}, which cannot be read") from error
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if canonicalize_name(requirement.name) == HARNESS:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(text)
    return unmet


def _overlay(folder: Path, name: str, unmet: Sequence[str]) -> None:
    """Install what the running environment does not meet, with all that it needs, into a folder of its own."""
    log = folder / "build.log"
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--target", str(folder / "overlay"), *unmet]
    with log.open("wb") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        done = subprocess.run(command, stdout=output, stderr=output, check=False)
    if done.returncode != 0:
        raise UnfitEnvironmentError(
            f"the environment of revision {name} could not be built (it needs {', '.join(unmet)}); its log is {log}"
        )
