"""The tool that edits sources is seeded and its edits are real; its last results are whole and explained."""

import ast
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import mutate_sources
import pytest
from mutate_sources import AREAS, EXPLAINED, draw, mutants_of, render

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "tests" / "mutations_sources.json").read_text())

SNIPPET = '''
def f(x: int | None, n=3):
    """One + one."""
    if x <= n and g(x, n):
        raise ValueError(f"{x + 1} is too small")
    self.total += x
    return min(x, n) << 2
'''


def test_edits_of_a_snippet():
    """Every operator once, by hand: no edit of a docstring, an annotation or a message."""
    found = {(mutant.kind, mutant.after) for mutant in mutants_of("packing", "f.py", SNIPPET)}
    assert found == {
        ("constant", "def f(x: int | None, n=4):"),
        ("negated condition", "if not (x <= n and g(x, n)):"),
        ("logic", "if x <= n or g(x, n):"),
        ("comparison", "if x < n and g(x, n):"),
        ("swapped arguments", "if x <= n and g(n, x):"),
        ("dropped statement", "pass"),
        ("function", "return max(x, n) << 2"),
        ("arithmetic", "return min(x, n) >> 2"),
        ("constant", "return min(x, n) << 3"),
    }


def test_the_draw_is_seeded_and_takes_every_area_in_turn():
    """The same seed draws the same edits, another seed others; each compiles, differs and touches one file."""
    first = list(islice(draw(0), 40))
    assert first == list(islice(draw(0), 40))
    assert first != list(islice(draw(1), 40))
    assert set(Counter(mutant.area for mutant in first).values()) == {40 // len(AREAS)}
    assert len({mutant.kind for mutant in first}) == 8
    for mutant in first:
        text = (ROOT / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.apply(text))) != ast.dump(ast.parse(text))


def test_an_endless_program_is_stopped(tmp_path):
    """A mutant that loops is killed by its processor time, and says so."""
    command = [mutate_sources.sys.executable, "-c", "while True: pass"]
    assert "processor time" in str(mutate_sources.failure(command, tmp_path, 1))


def test_a_check_that_passes_and_one_that_fails(tmp_path):
    """No words for an exit code of 0; the last telling line otherwise."""
    python = mutate_sources.sys.executable
    assert mutate_sources.failure([python, "-c", ""], tmp_path, 10) is None
    program = "print('veloxbench gate: 3 regressions'); print('more'); raise SystemExit(1)"
    assert mutate_sources.failure([python, "-c", program], tmp_path, 10) == "veloxbench gate: 3 regressions"


def test_enough_edits_in_every_area():
    """At least twenty in all, and every area has its share."""
    areas = Counter(row["area"] for row in RESULTS["table"])
    assert sum(areas.values()) >= 20
    assert min(areas[area] for area in AREAS) >= 3


def test_every_survivor_is_explained():
    """An edit that nothing notices changes nothing that anybody can observe, and the table says why."""
    survivors = {f"{row['file']}:{row['line']}: {row['after']}" for row in RESULTS["table"] if row["caught_by"] is None}
    assert survivors == set(EXPLAINED)


def test_the_page_is_what_the_results_say():
    """docs/mutations.md is generated."""
    assert (ROOT / "docs" / "mutations.md").read_text() == render(RESULTS)


@pytest.mark.slow
def test_one_edit_is_judged_like_before(tmp_path):
    """A full pass of the tool for the first edit of the committed table, on the committed tree."""
    first = RESULTS["table"][0]
    mutant = next(m for m in draw(RESULTS["seed"]) if (m.file, m.after) == (first["file"], first["after"]))
    base = mutate_sources.committed_tree("HEAD", tmp_path)
    assert mutate_sources.judge_mutant(mutant, base, "").caught_by == first["caught_by"]
