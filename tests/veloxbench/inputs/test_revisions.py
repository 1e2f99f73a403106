"""A user's folder is the user's: a revision is exported whole from whatever kind of repository it is in, or one
sentence says why not.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from veloxbench.compare.revisions import prepare, resolve
from veloxbench.errors import UsageError, VeloxError


def git(repository, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always")
    subprocess.run(["git", "-C", str(repository), *identity, *arguments], check=True, capture_output=True)


def commit(repository, message="x"):
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", message)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def repository(tmp_path):
    """One package, one module that says 1."""
    place = tmp_path / "repository"
    (place / "one").mkdir(parents=True)
    (place / "one" / "__init__.py").write_text("VALUE = 1\n")
    git(place, "init", "-q")
    commit(place)
    return place


@pytest.fixture
def library(tmp_path):
    """Another repository, of one package that says 7."""
    place = tmp_path / "library"
    place.mkdir()
    git(place, "init", "-q")
    (place / "__init__.py").write_text("VALUE = 7\n")
    commit(place)
    return place


def value_in(revision):
    namespace = {}
    exec((revision.site / "one" / "__init__.py").read_text(), namespace)
    return namespace["VALUE"]


@pytest.mark.parametrize("target", ["/mnt/nowhere", "../../outside", "missing", "one/__init__.py", "link"])
def test_a_symbolic_link_stays_a_link_wherever_it_leads(repository, target):
    """Absolute, out of the repository, dangling, inside, to itself: exported as the link that it is."""
    (repository / "link").symlink_to(target)
    commit(repository)
    revision = prepare("HEAD", repository)
    assert revision.packages == ["one"]
    assert str((revision.folder / "tree" / "link").readlink()) == target


def test_a_package_that_is_a_link_out_of_the_tree_is_refused(repository, tmp_path):
    """Its code would be whatever lies there now, not the revision's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__init__.py").write_text("")
    (repository / "two").symlink_to(tmp_path / "elsewhere")
    commit(repository)
    with pytest.raises(UsageError, match="package two of revision HEAD lies outside its tree"):
        prepare("HEAD", repository)


def test_a_subfolder_is_part_of_its_repository(repository):
    """Asked from a subfolder, the whole tree is exported, not the subfolder alone."""
    (repository / "one" / "deep").mkdir()
    assert prepare("HEAD", repository / "one" / "deep").packages == ["one"]


def test_the_working_tree_and_the_index_are_left_alone(repository):
    """What is changed, staged or not yet added is neither exported nor touched."""
    (repository / "one" / "__init__.py").write_text("VALUE = 2\n")
    git(repository, "add", "-A")
    (repository / "one" / "new.py").write_text("")
    before = subprocess.check_output(["git", "-C", repository, "status", "--porcelain"])
    revision = prepare("HEAD", repository)
    assert value_in(revision) == 1
    assert not (revision.site / "one" / "new.py").exists()
    assert subprocess.check_output(["git", "-C", repository, "status", "--porcelain"]) == before


def test_a_linked_worktree(repository, tmp_path):
    """A worktree's own HEAD is what HEAD means there."""
    git(repository, "worktree", "add", "-q", "-b", "other", str(tmp_path / "worktree"))
    (tmp_path / "worktree" / "one" / "__init__.py").write_text("VALUE = 3\n")
    commit(tmp_path / "worktree")
    assert value_in(prepare("HEAD", tmp_path / "worktree")) == 3
    assert value_in(prepare("HEAD", repository)) == 1


def test_a_bare_clone(repository, tmp_path):
    """A clone without a working tree holds every revision all the same."""
    git(repository, "clone", "-q", "--bare", str(repository), str(tmp_path / "bare.git"))
    assert value_in(prepare("HEAD", tmp_path / "bare.git")) == 1


def test_a_shallow_clone_says_that_it_is_one(repository, tmp_path):
    """Its newest commit works; of an older one the sentence says how to get it."""
    first = subprocess.check_output(["git", "-C", repository, "rev-parse", "HEAD"], text=True).strip()
    (repository / "one" / "__init__.py").write_text("VALUE = 2\n")
    commit(repository)
    git(tmp_path, "clone", "-q", "--depth", "1", repository.as_uri(), str(tmp_path / "shallow"))
    assert value_in(prepare("HEAD", tmp_path / "shallow")) == 2
    with pytest.raises(UsageError, match=r"unknown revision.*shallow.*git fetch --unshallow"):
        prepare(first, tmp_path / "shallow")


def test_a_sparse_checkout_is_exported_whole(repository):
    """The packages that the user's working tree leaves out are the revision's all the same."""
    (repository / "two").mkdir()
    (repository / "two" / "__init__.py").write_text("")
    commit(repository)
    git(repository, "sparse-checkout", "set", "one")
    assert not (repository / "two").exists()
    assert prepare("HEAD", repository).packages == ["one", "two"]


def test_files_that_an_archive_would_leave_out_are_exported(repository):
    """``export-ignore`` is for release archives: a comparison runs what a checkout has."""
    (repository / ".gitattributes").write_text("one/data.txt export-ignore\n")
    (repository / "one" / "data.txt").write_text("needed")
    commit(repository)
    assert (prepare("HEAD", repository).site / "one" / "data.txt").read_text() == "needed"


def test_a_submodule_that_is_here_comes_along(repository, library):
    """Its files are those of the commit that the revision names, not of its working tree."""
    git(repository, "submodule", "add", "-q", str(library), "two")
    commit(repository)
    (repository / "two" / "__init__.py").write_text("VALUE = 8\n")
    revision = prepare("HEAD", repository)
    assert revision.packages == ["one", "two"]
    assert (revision.site / "two" / "__init__.py").read_text() == "VALUE = 7\n"


def test_a_package_in_a_submodule_that_is_not_here_is_one_sentence(repository, library, tmp_path):
    """Where only an empty folder can be exported, the sentence says what it may be."""
    (repository / "pyproject.toml").write_text('[tool.hatch.build.targets.wheel]\npackages = ["two"]\n')
    git(repository, "submodule", "add", "-q", str(library), "two")
    commit(repository)
    git(tmp_path, "clone", "-q", str(repository), str(tmp_path / "clone"))
    with pytest.raises(UsageError, match=r"package two .* is empty: is it a submodule"):
        prepare("HEAD", tmp_path / "clone")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a repository to another user")
def test_a_repository_of_another_user_names_gits_own_way_out(repository):
    """git refuses it; the sentence says so and how to allow it, and does not say that it is no repository."""
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 1234, 1234)
    with pytest.raises(UsageError, match=r"git does not trust .*git config --global --add safe\.directory") as caught:
        resolve("HEAD", repository)
    assert "is not a git repository" not in str(caught.value)


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"])
def test_variables_of_another_repository_do_not_count(repository, tmp_path, monkeypatch, name):
    """Inside a git hook these point at the hook's repository; the folder that was asked for is meant."""
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv(name, str(other / ".git"))
    assert value_in(prepare("HEAD", repository)) == 1


@pytest.mark.parametrize("name", ["nowhere", "HEAD~9", "-x", "", "HEAD:one", "a\0b", "@{-1}", "x" * 5000])
def test_what_is_no_revision_is_named(repository, name):
    """One sentence, whatever the name."""
    with pytest.raises(UsageError, match="unknown revision"):
        resolve(name, repository)


def test_an_empty_repository_has_no_revision(tmp_path):
    """Before the first commit HEAD means nothing."""
    git(tmp_path, "init", "-q")
    with pytest.raises(UsageError, match="unknown revision 'HEAD'"):
        resolve("HEAD", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"a = " + b"[" * 5000,
        b"a = " + b"9" * 5000,
        b"[project",
        b'[project]\ndependencies = ["!"]',
        b"[project]\ndependencies = [\"x; extra == 'a' and nonsense\"]",
        b'[tool.hatch.build.targets.wheel]\npackages = ["/etc"]',
        b'[tool.hatch.build.targets.wheel]\npackages = ["../.."]',
        b'[tool.hatch.build.targets.wheel]\npackages = ["one", "one/../one"]',
    ],
)
def test_a_damaged_pyproject_is_one_sentence(repository, content):
    """Not UTF-8, too deep, too long a number, half a table, dependencies and packages that cannot be."""
    (repository / "pyproject.toml").write_bytes(content)
    commit(repository)
    with pytest.raises(UsageError, match="revision HEAD") as caught:
        prepare("HEAD", repository)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["project = 1", "project = []", "[project]\ndependencies = 3", "tool = []"])
def test_a_pyproject_of_another_shape_declares_nothing(repository, content):
    """A list where a table should be is no declaration; the packages are found by their folders."""
    (repository / "pyproject.toml").write_text(content)
    commit(repository)
    assert prepare("HEAD", repository).packages == ["one"]


def test_a_changed_tree_is_exported_again(repository):
    """A byte that changed in the cache is not what the revision says."""
    revision = prepare("HEAD", repository)
    (revision.folder / "tree" / "one" / "__init__.py").write_text("VALUE = 9\n")
    assert value_in(prepare("HEAD", repository)) == 1


def test_compiled_files_are_no_change(repository):
    """What Python leaves beside the sources does not cost a new export."""
    revision = prepare("HEAD", repository)
    stamp = (revision.folder / "ready").stat().st_mtime_ns
    cache = revision.site / "one" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").write_bytes(b"1")
    prepare("HEAD", repository)
    assert (revision.folder / "ready").stat().st_mtime_ns == stamp


def test_several_at_once_export_once(repository):
    """Four callers, one build."""
    with ThreadPoolExecutor(4) as pool:
        revisions = list(pool.map(lambda _: prepare("HEAD", repository), range(4)))
    assert len(set(revisions)) == 1
    assert value_in(revisions[0]) == 1


def test_a_cache_whose_name_splits_a_path_is_refused(repository, tmp_path, monkeypatch):
    """A colon would end the folder's entry in PYTHONPATH: another package could be imported."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "a:b"))
    with pytest.raises(UsageError, match="VELOXBENCH_CACHE"):
        prepare("HEAD", repository)


def test_without_git_is_one_sentence(repository, monkeypatch, tmp_path):
    """No git on the path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VeloxError, match="git cannot be run"):
        resolve("HEAD", repository)


def test_the_harness_of_another_checkout_is_not_taken(repository):
    """The link to the running harness follows it when the cache was used by another one."""
    import veloxbench

    revision = prepare("HEAD", repository)
    folder = Path(revision.environment()["PYTHONPATH"].split(os.pathsep)[-1])
    (folder / "veloxbench").unlink()
    (folder / "veloxbench").symlink_to(repository)
    revision.environment()
    assert (folder / "veloxbench").resolve() == Path(veloxbench.__file__).resolve().parent
    shutil.rmtree(folder)
    revision.environment()
    assert (folder / "veloxbench").is_dir()
