"""Two revisions of a repository side by side, each one's packages on a path of its own.

A revision's tree is checked out into the user's cache, whole and as git would write it anywhere (symbolic links stay
links, wherever they lead; submodules that are here come with it), once per commit and environment, and its content is
compared with what was written before each use. The running environment serves as
far as it meets the dependencies that the revision declares; what it does not meet is installed into an overlay that
only this revision sees. Either way the harness is the running one: two implementations, one measuring code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import veloxbench
from veloxbench.errors import UnfitEnvironmentError, UsageError
from veloxbench.inputs.sources import cache_dir, first_line, sha256_of, writable_cache
from veloxbench.records.journal import held
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
    folder = cache_dir() / "revisions" / "harness" / content_hash([str(package)])[:16]
    link = folder / HARNESS
    with writable_cache():
        folder.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink() or link.resolve() != package:
            with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
                new = Path(beside) / HARNESS
                new.symlink_to(package, target_is_directory=True)
                new.replace(link)
    return folder


def resolve(revision: str, repository: Path) -> str:
    """The commit that a name means.

    Raises:
        UsageError: no such revision, no repository, or one that git does not trust.
    """
    if "\0" in revision:
        raise UsageError(f"unknown revision {revision!r}")
    inside = run_git(repository, "rev-parse", "--git-dir")
    if inside.returncode != 0:
        why = said(inside)
        if "dubious ownership" in why or "safe.bareRepository" in why:
            raise UsageError(
                f"git does not trust the repository at {repository} ({why}); "
                f"`git config --global --add safe.directory {shlex.quote(str(repository.resolve()))}` makes it"
            )
        reason = "" if "not a git repository" in why else f" that git can read ({why})"
        raise UsageError(f"{repository} is not a git repository{reason}, so {revision!r} can be no revision of it")
    done = run_git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode == 0:
        return done.stdout.decode().strip()
    shallow = run_git(repository, "rev-parse", "--is-shallow-repository").stdout.strip() == b"true"
    hint = "; the clone is shallow: `git fetch --unshallow` gets its history" if shallow else ""
    raise UsageError(
        f"unknown revision {revision!r}: it is neither a commit of {repository} nor a file of records{hint}"
    )


def run_git(
    repository: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run git in a folder; the variables by which a hook or a script points at another repository do not count."""
    clean = {name: value for name, value in os.environ.items() if name not in _GIT_PLACES}
    try:
        return subprocess.run(
            ["git", "-C", str(repository), *arguments],
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**clean, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **(environment or {})},
        )
    except OSError as error:
        raise UnfitEnvironmentError(f"git cannot be run: {error.strerror or error}") from error


_GIT_PLACES = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_NAMESPACE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_CEILING_DIRECTORIES"),
)


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The first line of what git says was wrong."""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[0].removeprefix("fatal: ") if lines else f"exit status {done.returncode}"


def prepare(name: str, repository: Path) -> Revision:
    """Export and, where its dependencies ask for it, install a revision; once per commit and environment.

    Two processes that ask for one revision build it one after the other: the second finds it built.

    Raises:
        UsageError: unknown revision, or a tree without Python packages beside the harness.
        UnfitEnvironmentError: the build failed; names its log.
    """
    commit = resolve(name, repository)
    folder = cache_dir() / "revisions" / commit / environment_id()
    if os.pathsep in str(folder):
        raise UsageError(
            f"the cache {cache_dir()} has {os.pathsep!r} in its name, which no path of Python modules may have; "
            "set VELOXBENCH_CACHE to another directory"
        )
    with writable_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.with_suffix(".lock")):
            if not _is_ready(folder):
                shutil.rmtree(folder, ignore_errors=True)  # a build that was stopped, or a tree that was changed
                _build(name, commit, repository, folder)
    return Revision(name, commit, folder)


def _is_ready(folder: Path) -> bool:
    """Whether a revision was built and every file of its tree is as it was written."""
    try:
        return (folder / _READY).read_text(encoding="utf-8") == _tree_hash(folder / "tree")
    except (OSError, ValueError):
        return False


def _tree_hash(tree: Path) -> str:
    """Hash of a tree's names, links and contents; what Python compiled beside them does not count."""
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(tree):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted([*files, *(each for each in folders if (Path(folder) / each).is_symlink())]):
            path = Path(folder) / name
            content = f"link to {path.readlink()}" if path.is_symlink() else sha256_of(path)
            digest.update(os.fsencode(f"{path.relative_to(tree)}\0{content}\0"))
    return digest.hexdigest()


def environment_id() -> str:
    """Hash of the Python version and of every installed distribution: another one may meet other dependencies."""
    installed = {_identity(each) for each in importlib.metadata.distributions()}
    return content_hash([sys.version, sys.prefix, sorted(installed)])[:16]


def _identity(distribution: importlib.metadata.Distribution) -> str:
    """Name and version; of a broken distribution, what there is."""
    try:
        return f"{distribution.name} {distribution.version}"
    except Exception:  # its metadata is missing or damaged, which each version of Python says in its own way
        return str(getattr(distribution, "_path", "a distribution without metadata"))


def _build(name: str, commit: str, repository: Path, folder: Path) -> None:
    folder.mkdir()
    _export(repository, commit, folder / "tree")
    project = _project(folder / "tree", name)
    packages = _packages(folder / "tree", project, name)
    if not packages:
        raise UsageError(f"revision {name} ({commit[:12]}) has no Python package beside {HARNESS}: nothing to compare")
    (folder / "site").mkdir()
    for package in packages:
        (folder / "site" / package.name).symlink_to(package, target_is_directory=True)
    unmet = unmet_dependencies(_declared(project, "project", "dependencies"), name)
    if unmet:
        _overlay(folder, name, unmet)
    (folder / _READY).write_text(_tree_hash(folder / "tree"), encoding="utf-8")


def _export(repository: Path, commit: str, tree: Path) -> None:
    """Write a commit's tree through an index of its own; the repository's index and working tree are left alone."""
    tree.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as beside:
        git_dir = (
            run_git(repository, "rev-parse", "--absolute-git-dir").stdout.decode("utf-8", "surrogateescape").strip()
        )
        place = {"GIT_DIR": git_dir, "GIT_WORK_TREE": str(tree), "GIT_INDEX_FILE": str(Path(beside) / "index")}
        plain = ("-c", "core.sparseCheckout=false", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false")
        for command in (("read-tree", commit), ("checkout-index", "--all", "--quiet", "--force")):
            done = run_git(tree, *plain, *command, environment=place)
            if done.returncode != 0:
                raise UnfitEnvironmentError(f"git cannot export {commit[:12]}: {said(done)}")
        listed = run_git(tree, *plain, "ls-files", "--stage", "-z", environment=place).stdout
    for entry in listed.split(b"\0"):
        if entry.startswith(_SUBMODULE):
            stage, _, name = entry.partition(b"\t")
            _export_submodule(repository, os.fsdecode(name), stage.split()[1].decode(), tree)


_SUBMODULE = b"160000 "  # the mode of a commit of another repository


def _export_submodule(repository: Path, name: str, commit: str, tree: Path) -> None:
    """A submodule whose commit is here comes with the tree; of another one the folder stays empty, as in a clone."""
    top = run_git(repository, "rev-parse", "--show-toplevel")
    place = Path(os.fsdecode(top.stdout.removesuffix(b"\n"))) / name
    if top.returncode != 0 or not (place / ".git").exists():
        return
    if run_git(place, "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0:
        _export(place, commit, tree / name)


def _project(tree: Path, name: str) -> dict[str, Any]:
    file = tree / "pyproject.toml"
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"pyproject.toml of revision {name} is not valid: {first_line(error)}") from error


def _declared(project: Mapping[str, Any], *keys: str) -> list[str]:
    """The strings that a pyproject.toml lists in a place; none where it has another shape there."""
    value: Any = project
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _packages(tree: Path, project: dict[str, Any], name: str) -> list[Path]:
    """Package folders: those that hatch's wheel declares, else all with an ``__init__.py`` in src/ or the root.

    Raises:
        UsageError: one lies outside the tree, or two have one name.
    """
    declared = [tree / path for path in _declared(project, "tool", "hatch", "build", "targets", "wheel", "packages")]
    root = tree / "src" if (tree / "src").is_dir() else tree
    listed = declared or sorted(init.parent for init in root.glob("*/__init__.py"))
    packages = [path for path in listed if path.is_dir() and path.name not in (HARNESS, "tests")]
    for path in packages:
        package = f"package {os.path.relpath(path, tree)} of revision {name}"
        if not path.resolve().is_relative_to(tree.resolve()):
            raise UsageError(f"{package} lies outside its tree")
        if not any(path.iterdir()):
            raise UsageError(f"{package} is empty: is it a submodule that is not checked out?")
    if len({path.name for path in packages}) < len(packages):
        raise UsageError(f"revision {name} declares two packages of one name: {', '.join(p.name for p in packages)}")
    return packages


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
        try:
            if requirement.marker is not None and not requirement.marker.evaluate():
                continue
        except (UndefinedComparison, UndefinedEnvironmentName) as error:
            raise UsageError(f"revision {name} declares the dependency {text!r}: {error}") from error
        if canonicalize_name(requirement.name) == HARNESS:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
            met = requirement.specifier.contains(version, prereleases=True)
        except Exception:  # not installed, or so that its version cannot be told
            met = False
        if not met:
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
