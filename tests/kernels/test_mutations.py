"""The committed mutation table is of the shipped bodies, and the verification's cases notice what it changes."""

import hashlib
import json
from pathlib import Path

from mutate_kernels import Journal, Mutant, draw, text_hashes

from veloxquant_kernels.kernel import FOLDER

DOCUMENT = json.loads((Path(__file__).parent / "mutations.json").read_text())
ROWS = DOCUMENT["table"]


def test_the_committed_mutants_are_killed(record_property):
    """At least 40 seeded mutants; 95% are killed of all but those whose note shows that they compute the same."""
    killed = [row for row in ROWS if row["killed_by"] is not None]
    equivalent = [row for row in ROWS if "equivalent" in row]
    record_property("mutants", len(ROWS))
    record_property("killed", len(killed))
    record_property("killed of all", f"{len(killed) / len(ROWS):.1%}")
    record_property("killed of all but the equivalent", f"{len(killed) / (len(ROWS) - len(equivalent)):.1%}")
    assert [row for row in equivalent if row["killed_by"] is not None or not row["equivalent"]] == []
    assert len(ROWS) == DOCUMENT["mutants"] >= 40
    assert len(killed) == DOCUMENT["killed"]
    assert len(killed) >= 0.95 * (len(ROWS) - len(equivalent))  # a survivor without a note counts against it
    assert len(killed) >= 0.90 * len(ROWS)  # a tool that draws mostly equivalent edits would show nothing
    assert {row["kind"] for row in ROWS} >= {"off by one", "shift", "missing barrier", "swapped name", "comparison"}


def test_the_table_is_of_the_shipped_bodies():
    """Hash for hash; a changed body makes the table stale, and the mutants are those that the seed draws."""
    shipped = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.metal")}
    assert DOCUMENT["texts"] == shipped
    drawn = iter(draw({path.stem: path.read_text() for path in FOLDER.glob("*.metal")}, DOCUMENT["seed"]))
    fields = ("stem", "line", "kind", "before", "after")
    for row in ROWS:  # in the drawn order, those that did not compile left out
        assert any([getattr(mutant, name) for name in fields] == [row[name] for name in fields] for mutant in drawn)


def test_a_stopped_run_goes_on(tmp_path):
    """Kept verdicts are not judged again, unless a text has changed."""
    mutant = Mutant("packing", 1, "shift", "a << b;", "a >> b;")
    judged = []

    def judge(one):
        judged.append(one)
        return "out of bounds"

    path, subject = tmp_path / "partial", {"seed": 1, "texts": text_hashes({"packing": "a << b;"})}
    assert Journal(path, subject).verdict(mutant, judge) == "out of bounds"
    assert Journal(path, subject).verdict(mutant, judge) == "out of bounds"
    assert judged == [mutant]
    Journal(path, {"seed": 1, "texts": text_hashes({"packing": "a <<  b;"})}).verdict(mutant, judge)
    assert judged == [mutant, mutant]
