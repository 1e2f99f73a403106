"""The first bad commit by git's bisection, with verdicts in place of measurements (test_compare has real ones)."""

import subprocess

import pytest

from veloxbench.compare.bisect import Judged, bisect, grid_text, judged, subject_label
from veloxbench.errors import UsageError
from veloxbench.gate.verdicts import Finding, Verdict
from veloxbench.run.grid import customise, load_grid, parse_grid


def git(folder, *arguments):
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def history(tmp_path, monkeypatch):
    """A repository of twelve commits, and their hashes, oldest first."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    for n in range(12):
        (folder / "file").write_text(str(n))
        git(folder, "add", ".")
        git(folder, "commit", "-qm", f"commit {n}")
    return folder, git(folder, "rev-list", "--reverse", "main").split()


def test_the_first_bad_commit_is_named_in_few_steps(history):
    """Of twelve commits the eighth is found in at most four judgements, and the user's checkout does not move."""
    folder, commits = history
    (folder / "file").write_text("a change that is not committed")
    asked, said = [], []

    def judge(commit):
        asked.append(commit)
        return Judged("bad" if commits.index(commit) >= 7 else "good", "why")

    result = bisect(commits[0], "main", folder, "question", judge, said.append)
    assert result == (commits[7],)
    assert len(asked) <= 4
    assert said == [
        f"{c[:12]} commit {commits.index(c)}: {'bad' if commits.index(c) >= 7 else 'good'} (why)" for c in asked
    ]
    assert (folder / "file").read_text() == "a change that is not committed"
    assert git(folder, "worktree", "list").count("\n") == 0
    assert git(folder, "branch", "--show-current") == "main"


def test_broken_off_it_goes_on_where_it_was(history):
    """Interrupted in its second judgement, the same question asks that commit again, and no earlier one."""
    folder, commits = history
    asked = []

    def judge(commit, stop_at=None):
        asked.append(commit)
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return Judged("bad" if commits.index(commit) >= 3 else "good", "why")

    with pytest.raises(KeyboardInterrupt):
        bisect(commits[0], commits[-1], folder, "q", lambda commit: judge(commit, 2), lambda _: None)
    assert bisect(commits[0], commits[-1], folder, "q", judge, lambda _: None) == (commits[3],)
    assert asked[1] == asked[2]
    assert asked.count(asked[0]) == 1


def test_what_cannot_be_judged_is_skipped_and_listed(history):
    """Commits around the bad one that crash leave several that it may be: all of them are named."""
    folder, commits = history
    untold = commits[5:8]

    def judge(commit):
        if commit in untold:
            raise UsageError("it has no package")
        return Judged("bad" if commits.index(commit) >= 7 else "good", "why")

    assert set(bisect(commits[0], "main", folder, "q", judge, lambda _: None)) == set(commits[5:9])


def finding(subject, verdict, reason="r"):
    return Finding("quality", subject, "kld_mean", verdict, reason)


def test_a_verdict_is_what_git_is_told():
    """Pass is good, regress is bad, anything else is skipped; other arms do not count; a crash as it is wanted."""
    other, arm = finding("m chunked kivi@2", Verdict.REGRESS), "turboquant_mse@4"
    for verdict, word in ((Verdict.PASS, "good"), (Verdict.REGRESS, "bad"), (Verdict.INCONCLUSIVE, "skip")):
        assert judged([other, finding(f"m chunked {arm}", verdict)], arm).word == word
    assert judged([other], arm).word == "skip"
    crash = [finding("profile p", Verdict.REGRESS, "it crashed: boom")]
    assert (judged(crash, arm).word, judged(crash, arm, crash_is_bad=True).word) == ("skip", "bad")


def test_a_grid_written_as_toml_is_the_grid():
    """What the revisions are sent is what was asked for: models, arms with parameters, the suite's own section."""
    grid = customise(load_grid("gate"), suites=["perplexity"], methods=["turboquant_mse@4:sinks=4"])
    again = parse_grid(grid_text(grid), "the text")
    assert again.arm_list() == grid.arm_list()
    assert (again.models, again.corpus, again.suites) == (grid.models, grid.corpus, grid.suites)
    (suite,) = grid.chosen_suites()
    assert again.tasks(suite) == grid.tasks(suite)
    assert subject_label(grid, "turboquant_mse@4:sinks=4") == "turboquant_mse@4:sinks=4"
    with pytest.raises(UsageError, match=r"turboquant_mse@3.*did you mean"):
        subject_label(grid, "turboquant_mse@3")
