"""The workflows, ours and the one that users copy from docs/ci.md: linted, pinned, and safe for forks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
DOCUMENTED = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), flags=re.DOTALL)
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.yml"))} | {
    f"docs/ci.md, {number}": text for number, text in enumerate(DOCUMENTED, start=1)
}
SAME_REPOSITORY = "github.event.pull_request.head.repo.full_name == github.repository"

BROKEN = """
on: pull_request_target
jobs:
  one:
    runs-on: macos-15
    steps:
      - uses: actions/checkout@v4
        with:
          ref: ${{ github.event.pull_request.head.sha }}
      - run: echo ${{ steps.absent.outputs.it }} && echo "${{ github.event.issue.title }}"
"""


def tool(name: str) -> str:
    """The linter of this environment, or of the machine; CI requires both."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None and os.environ.get("VELOXBENCH_REQUIRE_LINTERS"):
        pytest.fail(f"{name} is not installed")
    return found or pytest.skip(f"{name} is not installed")


def linted(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A linter over every workflow of a checkout."""
    files = sorted(map(str, (folder / ".github" / "workflows").glob("*.yml")))
    options = ["--offline", "--no-progress"] if name == "zizmor" else ["-no-color"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run(
        [tool(name), *options, *files], cwd=folder, capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """All workflows, the documented ones as files, in a repository of their own."""
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for configuration in (".github/actionlint.yaml", ".github/zizmor.yml"):
        shutil.copy(ROOT / configuration, tmp_path / configuration)
    for number, (name, text) in enumerate(TEXTS.items()):
        (folder / (name if name.endswith(".yml") else f"documented-{number}.yml")).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["actionlint", "zizmor"])
def test_workflows_pass_the_linter(name, checkout):
    """Syntax, expressions and shell (actionlint with shellcheck); permissions, pins, injections, caches (zizmor)."""
    done = linted(name, checkout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [("actionlint", 'property "absent" is not defined'), ("zizmor", "dangerous-triggers")],
)
def test_the_linter_sees_a_broken_workflow(name, words, checkout):
    """The linters do run: each names a defect of a workflow that has it."""
    (checkout / ".github" / "workflows" / "broken.yml").write_text(BROKEN)
    done = linted(name, checkout)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


@pytest.mark.parametrize("name", TEXTS)
def test_actions_are_pinned_by_commit(name):
    """A tag can be moved, a commit cannot; the comment says which release it is, the same one everywhere."""
    uses = re.findall(r"uses: (\S+)(.*)", TEXTS[name])
    pins = dict(re.findall(r"uses: (actions/\S+)@(\S+ # v[\d.]+)", "".join(TEXTS.values())))
    for action, comment in uses:
        if action.startswith("./"):
            assert (ROOT / action).is_file()
            continue
        owner, _, pin = action.partition("@")
        assert re.fullmatch(r"[0-9a-f]{40}", pin), action
        assert pins[owner] == pin + comment


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_may_write(name):
    """No permission but reading the repository, no secret, no credential left in the checkout, an end to every job."""
    workflow = yaml.safe_load(TEXTS[name])
    assert workflow["permissions"] == {}
    assert "secrets." not in TEXTS[name]
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert "uses" in job or job["timeout-minutes"]
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def machines(job: dict[str, Any]) -> list[str]:
    """The labels on which a job, or the reusable workflow that it calls, may run."""
    asked = json.loads(job["with"]["runner"]) if "uses" in job else job["runs-on"]
    labels = [asked] if isinstance(asked, str) else asked
    of_matrix = job.get("strategy", {}).get("matrix", {}).get("machine", [])
    return [place for label in labels for place in (of_matrix if label == "${{ matrix.machine }}" else [label])]


@pytest.mark.parametrize("name", TEXTS)
def test_code_of_forks_runs_on_hosted_machines_only(name):
    """No trigger gives a fork's pull request more than reading, and a job of one's own machine refuses it."""
    workflow = yaml.safe_load(TEXTS[name])
    triggers = set(workflow[True])  # YAML 1.1 reads the key `on` as a boolean
    assert triggers <= {"push", "pull_request", "workflow_dispatch", "workflow_call"}
    for job in workflow["jobs"].values():
        if not all(re.fullmatch(r"(ubuntu|macos)-[\d.]+", machine) for machine in machines(job)):
            assert SAME_REPOSITORY in job["if"], job


def test_an_expression_never_reaches_a_shell():
    """`run:` sees values as environment variables: a branch name cannot become a command."""
    for name, text in TEXTS.items():
        for job in yaml.safe_load(text)["jobs"].values():
            for step in job.get("steps", []):
                assert "${{" not in step.get("run", ""), name


def test_hosted_linux_adds_in_the_order_that_has_a_baseline():
    """MKL's compatible path unless a caller says otherwise: mixed chips of a fleet then share one quality baseline."""
    gate = yaml.safe_load(TEXTS["gate.yml"])
    assert gate[True]["workflow_call"]["inputs"]["mkl"]["default"] == "COMPATIBLE"  # YAML 1.1 reads "on" as true
    assert gate["jobs"]["gate"]["env"]["MKL_CBWR"] == "${{ inputs.mkl }}"
