"""Mutation testing of the reference implementation: does the gate notice a wrong source?

    python tests/mutate_sources.py --seed 0 --count 40

A seeded tool draws small edits of ``impl/veloxquant_mlx`` and of the codecs in plain MLX below it (a comparison, an
operator, a constant off by one, a dropped statement, a negated condition, swapped arguments), from each area of it in
turn. Each is applied to a copy of the committed tree, where the checks run in order, quickest first: the gate's exact
suite, its quality suite, and, where the gate is content, the unit tests of the mutated area. An edit that none of them
notices is a survivor; the tests hold that each survivor is explained in ``EXPLAINED``. Stop it at any time: the same
command goes on.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
PACKAGE = "impl/veloxquant_mlx"

KERNELS = "kernels/veloxquant_kernels"

AREAS = {
    "allocators": [f"{PACKAGE}/allocators/*.py"],
    "quantizers": [
        *(f"{PACKAGE}/{room}/*.py" for room in ("quantizers", "transforms")),
        *(f"{KERNELS}/{codec}.py" for codec in ("affine", "codebook", "rotation", "turboquant")),
    ],
    "packing": [f"{KERNELS}/lookup.py", f"{KERNELS}/packing.py"],
    "cache": [f"{PACKAGE}/cache/*.py"],
    "observers": [f"{PACKAGE}/observers/*.py"],
}
"""Files of each area."""

AREA_TESTS = {
    "allocators": ["found_by_mutants", "ratequant_allocation", "ratequant_curves", "ratequant_sensitivity"],
    "quantizers": ["found_by_mutants", "quantizers", "scalar_codes", "lloyd_max", "rotation"],
    "packing": ["packing", "scalar_codes"],
    "cache": [
        "found_by_mutants",
        "packed_cache",
        "cache_walk",
        "config",
        "mlx_lm_contract",
        "methods_in_caches",
        "fused_cache",
    ],
    "observers": ["found_by_mutants", "observers"],
}
"""Unit tests of each area, ``tests/impl/test_<name>.py``."""

OPERATORS: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.Pow: ("**", "*"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
FUNCTIONS = {"min": "max", "max": "min", "ceil": "floor", "floor": "ceil", "maximum": "minimum", "minimum": "maximum"}

RUN = [sys.executable, "-m", "veloxbench.cli", "run", "--profile", "gate"]
GATE = [sys.executable, "-m", "veloxbench.cli", "gate"]
BASELINE = [sys.executable, "-m", "veloxbench.cli", "baseline"]
EXACT_GATE = """
import sys
from pathlib import Path
from veloxbench.cli.app import _run
if code := _run(["run", "--profile", "gate", "--suites", "exact", "--out", sys.argv[1]]):
    sys.exit(code)
from veloxbench.gate.baselines import Baselines, read_baselines
from veloxbench.gate.gate import judge
from veloxbench.records.store import read_records
from veloxbench.gate.verdicts import exit_code, sentence
files = [file for file in read_baselines(Path("baselines")).files if file.suite == "exact"]
records = [record for record in read_records(Path(sys.argv[1])) if record.subject.suite == "exact"]
findings = judge(records, Baselines(tuple(files), "baselines"), profile="gate")
print("veloxbench:", sentence(findings))
sys.exit(int(exit_code(findings)))
"""
"""The exact suite and its gate alone, in one process, before minutes are spent on the quality suite."""
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]

PROCESSOR_SECONDS = {"exact": 120, "quality": 600, "tests": 600}
"""Processor time after which a check counts as endless: many times what it takes, on a busy machine too."""

EXPLAINED = {
    "impl/veloxquant_mlx/packing.py:193: return table.view(mx.complex64) if rows.dtype != np.float32 and "
    "rows.shape[1] % 2 == 0 else table": (
        "pairs of fp32 travel as complex64 for speed alone, and no quantizer makes another table of an even width; "
        "tests/impl/test_packing.py has held the function by itself since."
    ),
    "impl/veloxquant_mlx/packing.py:73: pass": (
        "changes nothing: the next line made the same check; the first one is gone since."
    ),
    'impl/veloxquant_mlx/observers/key_norm.py:202: low = self.tail != "high" and norm <= mean - reach': (
        "a gap when it was judged: keys that are all zero became outliers; "
        "tests/impl/test_found_by_mutants.py has held it since."
    ),
    "impl/veloxquant_mlx/observers/key_norm.py:176: if not self.outlier_threshold > 1:": (
        "a gap when it was judged: no test used a threshold below 1; "
        "tests/impl/test_found_by_mutants.py has held it since."
    ),
    "impl/veloxquant_mlx/observers/key_norm.py:113: pass": (
        "a gap of the tool's choice of tests: those of the cache load norms, the observers' did not; "
        "tests/impl/test_found_by_mutants.py, now among theirs, has held it since."
    ),
}
"""Survivors by ``file:line: after``: why nobody can observe the edit, or which test has closed the gap."""


@dataclass(frozen=True)
class Mutant:
    """One edit: characters ``start`` to ``stop`` of a file become ``new``."""

    area: str
    file: str
    line: int
    kind: str
    start: int
    stop: int
    new: str
    before: str
    after: str

    @property
    def name(self) -> str:
        """For the journal and the table of explanations."""
        return f"{self.file}:{self.line}: {self.after}"

    def apply(self, text: str) -> str:
        """The mutated text."""
        return text[: self.start] + self.new + text[self.stop :]


class _Edits(ast.NodeVisitor):
    """Collects ``(kind, start, stop, new)`` of one file; leaves annotations, docstrings and f-strings alone."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found: list[tuple[str, int, int, str]] = []
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self._at(node.lineno, node.col_offset),  # type: ignore[attr-defined]
            self._at(node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
        )

    def _source(self, node: ast.AST) -> str:
        start, stop = self._span(node)
        return self.text[start:stop]

    def _operator(self, kind: str, operator: ast.AST, left: ast.AST, right: ast.AST) -> None:
        if type(operator) not in OPERATORS:
            return
        old, new = OPERATORS[type(operator)]
        start, stop = self._span(left)[1], self._span(right)[0]
        place = self.text.find(old, start, stop)
        if place >= 0:
            self.found.append((kind, place, place + len(old), new))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Positions inside an f-string are unreliable, and messages are no behaviour."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def _function(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    visit_FunctionDef = _function

    def visit_Raise(self, node: ast.Raise) -> None:
        start, stop = self._span(node)
        self.found.append(("dropped statement", start, stop, "pass"))

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            start, stop = self._span(node)
            self.found.append(("dropped statement", start, stop, "pass"))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        start, stop = self._span(node)
        self.found.append(("dropped statement", start, stop, "pass"))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            start, stop = self._span(node)
            self.found.append(("dropped statement", start, stop, "pass"))
        self.generic_visit(node)

    def _condition(self, node: ast.If | ast.IfExp | ast.While) -> None:
        start, stop = self._span(node.test)
        self.found.append(("negated condition", start, stop, f"not ({self.text[start:stop]})"))
        self.generic_visit(node)

    visit_If = visit_IfExp = visit_While = _condition

    def visit_Compare(self, node: ast.Compare) -> None:
        for operator, left, right in zip(node.ops, [node.left, *node.comparators], node.comparators, strict=False):
            self._operator("comparison", operator, left, right)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right)):
            self._operator("arithmetic", node.op, node.left, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._operator("logic", node.op, left, right)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) in (int, float):
            start, stop = self._span(node)
            step = 1 if type(node.value) is int else node.value * 0.1
            self.found.append(("constant", start, stop, repr(node.value + step)))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in FUNCTIONS:
            stop = self._span(node.func)[1]
            self.found.append(("function", stop - len(name), stop, FUNCTIONS[name]))
        elif len(node.args) >= 2 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            (start, end), (begin, stop) = self._span(node.args[0]), self._span(node.args[1])
            swapped = self.text[begin:stop] + self.text[end:begin] + self.text[start:end]
            self.found.append(("swapped arguments", start, stop, swapped))
        self.generic_visit(node)


def mutants_of(area: str, file: str, text: str) -> Iterator[Mutant]:
    """Every edit of a file."""
    edits = _Edits(text)
    edits.visit(ast.parse(text))
    for kind, start, stop, new in edits.found:
        first, last = text.rfind("\n", 0, start) + 1, text.find("\n", stop)
        before = " ".join(text[first:last].split())
        after = " ".join((text[first:start] + new + text[stop:last]).split())
        yield Mutant(area, file, text.count("\n", 0, start) + 1, kind, start, stop, new, before, after)


def changes(mutant: Mutant, text: str) -> bool:
    """Whether the mutated text compiles to another syntax tree."""
    try:
        return ast.dump(ast.parse(mutant.apply(text))) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def draw(seed: int, root: Path = ROOT) -> Iterator[Mutant]:
    """All mutants in a seeded order that takes the areas, and within each the kinds, in turn."""
    rng = np.random.default_rng(seed)
    queues: dict[str, dict[str, list[Mutant]]] = {}
    texts: dict[str, str] = {}
    for area, patterns in AREAS.items():
        kinds = queues.setdefault(area, {})
        for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
            file = str(path.relative_to(root))
            texts[file] = path.read_text()
            for mutant in mutants_of(area, file, texts[file]):
                kinds.setdefault(mutant.kind, []).append(mutant)
        for kind in sorted(kinds):
            rng.shuffle(kinds[kind])  # type: ignore[arg-type]
    turn = 0
    while any(queue for kinds in queues.values() for queue in kinds.values()):
        for kinds in queues.values():
            names = sorted(kind for kind in kinds if kinds[kind])
            if not names:
                continue
            queue = kinds[names[turn % len(names)]]
            while queue:
                mutant = queue.pop()
                if changes(mutant, texts[mutant.file]):
                    yield mutant
                    break
        turn += 1


def checks(areas: Sequence[str], results: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Name and commands of each check, quickest first; a check notices where a command fails."""
    yield "exact", [[sys.executable, "-c", EXACT_GATE, results]]
    yield "quality", [[*RUN, "--out", results], [*GATE, "--records", results]]
    tests = [f"tests/impl/test_{name}.py" for area in areas for name in AREA_TESTS[area]]
    yield "tests", [[*PYTEST, *tests]]


@dataclass(frozen=True)
class Judgement:
    """What noticed a mutant: a check's name and its words, or None."""

    caught_by: str | None
    words: str
    seconds: float


def judge(tree: Path, areas: Sequence[str], results: Path) -> Judgement:
    """Run the checks on a copy of the tree until one of them fails.

    Args:
        tree: the copy.
        areas: whose unit tests to run.
        results: the gate's records go here; those that are there already are not measured again.
    """
    began = time.monotonic()
    for name, commands in checks(areas, str(results)):
        for command in commands:
            words = failure(command, tree, PROCESSOR_SECONDS[name])
            if words is not None:
                return Judgement(name, words, round(time.monotonic() - began, 1))
    return Judgement(None, "", round(time.monotonic() - began, 1))


def failure(command: Sequence[str], tree: Path, processor_seconds: int) -> str | None:
    """Why a command failed in the tree, in one line; None if it did not."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds))

    places = [tree, tree / "impl", tree / "kernels"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "PYTHONDONTWRITEBYTECODE": "1"}
    environ.pop("GITHUB_ACTIONS", None)
    try:
        done = subprocess.run(
            command, cwd=tree, env=environ, capture_output=True, text=True, preexec_fn=limit, timeout=3600
        )
    except subprocess.TimeoutExpired:
        return "did not end within an hour"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"killed by signal {-done.returncode} (limit: {processor_seconds} s of processor time)"
    said = [line for line in (done.stdout + done.stderr).splitlines() if re.match("veloxbench|FAILED|ERROR", line)]
    words = " ".join((said or (done.stdout + done.stderr).splitlines() or [""])[-1].split())[:300]
    return words.partition(" (details in ")[0]


def committed_tree(revision: str, place: Path) -> Path:
    """The files of a commit, without its history."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(place, filter="data")
    return place


def judge_mutant(mutant: Mutant, base: Path, others: str) -> Judgement:
    """Apply a mutant to a copy of the base tree and judge it.

    Args:
        mutant: the edit.
        base: the unchanged tree.
        others: record lines of implementations that are not mutated.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(base, Path(folder) / "tree"))
        path = tree / mutant.file
        text = path.read_text()
        path.write_text(mutant.apply(text))
        results = Path(folder) / "results"
        results.mkdir()
        (results / "records.jsonl").write_text(others)
        return judge(tree, [mutant.area], results)


def control(work: Path, commit: str) -> tuple[Path, str]:
    """The unchanged tree with a baseline of its own, which must pass every check; made once per commit.

    Returns:
        The tree, and the record lines of implementations that are not mutated.
    """
    base, results = work / "base", work / "results"
    approved, passed = work / f"approved-{commit}", work / f"passed-{commit}"
    if not approved.exists():
        shutil.rmtree(work, ignore_errors=True)
        committed_tree(commit, base)
        shutil.rmtree(base / "baselines", ignore_errors=True)
        reason = "an export of the unchanged tree, which is no checkout"
        approve = [*BASELINE, "approve", "--unknown-checkout", "--reason", reason, "--records", str(results)]
        for command in ([*RUN, "--out", str(results)], approve):
            words = failure(command, base, PROCESSOR_SECONDS["quality"])
            if words is not None:
                sys.exit(f"the unchanged tree fails: {words}")
        approved.touch()
    if not passed.exists():
        verdict = judge(base, list(AREAS), results)
        if verdict.caught_by is not None:
            sys.exit(f"the unchanged tree fails: {verdict}")
        print(f"{verdict.seconds:6.1f} s  the unchanged tree passes", flush=True)
        passed.touch()
    lines = (results / "records.jsonl").read_text().splitlines(keepends=True)
    return base, "".join(line for line in lines if '"implementation":"veloxquant_mlx' not in line)


def render(document: dict[str, Any]) -> str:
    """docs/mutations.md."""
    table = document["table"]
    rows = []
    for area in AREAS:
        of_area = [row["caught_by"] for row in table if row["area"] == area]
        rows.append([area, len(of_area), *(of_area.count(check) for check in ("exact", "quality", "tests", None))])
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    counts = tabulate(rows, ["area", "edits", "exact tier", "quality tier", "unit tests", "survived"], tablefmt="pipe")
    edits = tabulate(
        [
            [
                f"{row['file'].removeprefix(PACKAGE + '/')}:{row['line']}",
                row["kind"],
                f"`{_code(row['after'])}`",
                f"`{_code(row['before'])}`",
                row["caught_by"] or "**survived**",
            ]
            for row in table
        ],
        ["place", "kind", "became", "was", "noticed by"],
        tablefmt="pipe",
        disable_numparse=True,
    )
    survivors = "\n".join(
        f"- `{_code(name)}`: {EXPLAINED.get(name, 'not explained')}"
        for name in (f"{row['file']}:{row['line']}: {row['after']}" for row in table if row["caught_by"] is None)
    )
    return (
        "# The gate on wrong sources\n\n"
        "<!-- generated by tests/mutate_sources.py; a change by hand is found by a test -->\n\n"
        "Would the gate notice a mistake that slips into the implementation? A tool made such mistakes at random, one "
        "at a time, and the checks were run on each.\n\n"
        f"{len(table)} small edits of `{PACKAGE}` (of the first {document['drawn']} that the tool drew with seed "
        f"{document['seed']}, at commit {document['commit'][:12]}) were applied to copies of the tree. On each copy "
        "the checks ran in this order until one failed: `veloxbench gate` on the exact suite, on the quality suite, "
        "and, where the gate was content, the unit tests of the area. Line numbers and file names are those "
        f"of that commit.\n\n{counts}\n\n## Survivors\n\nEdits that no check noticed, and what became of each.\n\n"
        f"{survivors or 'None.'}\n\n## Every edit\n\n{edits}\n"
    )


def _code(text: str) -> str:
    return (text if len(text) <= 110 else text[:109] + "…").replace("|", "\\|")


def main() -> None:
    """Judge mutants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--part", default="0/1", help="every n-th edit only, as 0/2 and 1/2 in two processes")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "veloxbench-mutations")
    parser.add_argument("--revision", default="HEAD")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "mutations_sources.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "mutations.md")
    parser.add_argument("--only-page", action="store_true", help="write the page from the results that are there")
    arguments = parser.parse_args()
    if arguments.only_page:
        arguments.page.write_text(render(json.loads(arguments.out.read_text())))
        return
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", arguments.revision], check=True, capture_output=True, text=True
    ).stdout.strip()
    journal = arguments.out.with_suffix(".part")
    lines = journal.read_text().splitlines() if journal.exists() else []
    done = {row["name"]: row for row in map(json.loads, lines) if row["commit"] == commit}
    base, others = control(arguments.work, commit)
    chosen = list(itertools.islice(draw(arguments.seed, base), arguments.count))
    part, parts = map(int, arguments.part.split("/"))
    for mutant in chosen[part::parts]:
        if mutant.name in done:
            continue
        judgement = judge_mutant(mutant, base, others)
        done[mutant.name] = {"commit": commit, "name": mutant.name, **asdict(judgement)}
        with journal.open("a") as file:
            file.write(json.dumps(done[mutant.name]) + "\n")
        print(f"{judgement.seconds:6.1f} s  {judgement.caught_by or 'SURVIVED'}: {mutant.name}", flush=True)
    done |= {row["name"]: row for row in map(json.loads, journal.read_text().splitlines()) if row["commit"] == commit}
    if missing := sum(mutant.name not in done for mutant in chosen):
        print(f"{missing} edits are left to other parts")
    table = [
        {
            **{name: getattr(mutant, name) for name in ("area", "file", "line", "kind", "before", "after")},
            **{name: done[mutant.name][name] for name in ("caught_by", "words", "seconds")},
        }
        for mutant in chosen
        if mutant.name in done
    ]
    document = {"seed": arguments.seed, "commit": commit, "drawn": len(chosen), "table": table}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    arguments.page.write_text(render(document))
    if not missing:
        journal.unlink()


if __name__ == "__main__":
    main()
