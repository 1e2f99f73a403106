"""Damaged files of every format that is read: refused in one sentence, healed, or followed by their hash."""

import random

import mutants
import pytest

COUNT = 25
"""Mutants of every format here; ``python tests/faults/mutants.py --count 3000`` is the long form."""


@pytest.fixture(scope="module")
def tallies():
    """All formats in one process: its start costs more than the mutants."""
    return mutants.campaign([*mutants.FORMATS, *mutants.ATTACKS], COUNT, seed=0)


@pytest.mark.parametrize("name", [*mutants.FORMATS, *mutants.ATTACKS])
def test_no_damaged_file_is_believed(tallies, name):
    """No crash, no hang, no exception that is no sentence, and no content under a name that is not its own."""
    tally = tallies[name]
    assert tally.failures == []
    assert tally.outcomes.total() == COUNT


def test_the_campaign_sees_what_is_false(tmp_path):
    """A reader that believes damaged bytes, one that raises, one that dies and one that hangs are all failures."""

    def reader(does):
        def read(work):
            if (work / "file").read_bytes() != b"pristine":
                return does()
            return "healed"

        return read

    def files(work):
        (work / "file").write_bytes(b"pristine")
        return [work / "file"]

    def believe():
        mutants.expect(False, "a wrong figure")

    def reports(read):
        said = []
        mutants.FORMATS["a toy"] = mutants.Format(files, reader(read))
        try:
            mutants.try_mutants("a toy", 3, 0, 0, said.append)
        finally:
            del mutants.FORMATS["a toy"]
        return {line["outcome"] for line in said if "outcome" in line}

    assert reports(believe) == {"failed"}
    assert reports(lambda: 1 / 0) == {"failed"}
    assert reports(lambda: "followed") == {"followed"}


def test_every_mutant_differs_from_what_it_was_made_from():
    """Ten thousand changes of a JSON file and of bytes: none is the original, all are repeatable."""
    for content in (b'{"a": [1, 2, {"b": "c"}]}', bytes(range(256)), b""):
        made = [mutants.mutant(content, random.Random(seed)) for seed in range(3000)]
        assert content not in made
        assert made == [mutants.mutant(content, random.Random(seed)) for seed in range(3000)]
        assert len(set(made)) > 100


def test_the_page_is_what_the_campaigns_record_says():
    """docs/reliability.md is generated; every failure on it has its reason."""
    tallies = mutants.kept(mutants.RECORD)
    assert mutants.PAGE.read_text(encoding="utf-8") == mutants.page(tallies)
    assert {name for name, tally in tallies.items() if tally.failures} <= mutants.REASONS.keys()
