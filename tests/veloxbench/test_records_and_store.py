import json
import math
from pathlib import Path

import jsonschema
import pytest
from gate_records import SOMEWHERE
from pydantic import ValidationError

from veloxbench.errors import IntegrityError, UnfitEnvironmentError, UsageError
from veloxbench.records import journal
from veloxbench.records.record import Estimate, MethodRef, ModelRef, Record, Subject, TextRef, json_schema
from veloxbench.records.store import JOURNAL, find_records, open_store, read_newest, read_records

ROOT = Path(__file__).parents[2]


def make_record(target: float = 4.0, value: float = 0.1, **subject) -> Record:
    fields = {
        "suite": "perplexity",
        "protocol": "chunked",
        "model": ModelRef(name="m", weights_sha256="a", tokenizer_sha256="b", config_sha256="c"),
        "method": MethodRef(name="x", target=target, target_means="code_bits", implementation="1"),
        "text": TextRef(name="t", tokens_sha256="d"),
        "settings": {"chunk": 64},
        "harness": "h",
        "machine_class": "k",
    }
    return Record.create(
        subject=Subject(**{**fields, **subject}),
        status="measured",
        metrics={"kld_mean": Estimate(value=value, unit="nats/token")},
        samples={"kld_mean": [value, value]},
        engagement=[],
        provenance=SOMEWHERE,
    )


def test_record_survives_its_own_line():
    """A record read back is the record written."""
    record = make_record()
    assert Record.from_line(record.to_line()) == record


def test_a_licence_counts_for_the_id_where_it_is_known():
    """Records from before licences were kept have the id that they had; two licences are two records."""
    plain = make_record()
    older = json.loads(plain.to_line())
    del older["provenance"]["model_licence"], older["provenance"]["text_licence"]
    assert Record.from_line(json.dumps(older)) == plain
    fields = {name: getattr(plain, name) for name in ("subject", "status", "metrics", "samples", "engagement")}
    provenance = plain.provenance.model_copy(update={"model_licence": "MIT"})
    assert Record.create(**fields, provenance=provenance).id != plain.id


def test_line_is_valid_under_the_published_schema():
    """A record line validates against the schema that the repository publishes, which is the model's own."""
    published = (ROOT / "schema" / "record.json").read_text()
    assert published == json_schema()
    jsonschema.validate(json.loads(make_record().to_line()), json.loads(published))


@pytest.mark.parametrize(
    "change", [{"target": 2.0}, {"settings": {"chunk": 128}}, {"machine_class": "z"}, {"harness": "i"}]
)
def test_key_changes_with_everything_that_moves_the_number(change):
    """Bits, settings, machine class and measuring code are in the key: 2-bit never overwrites 4-bit."""
    assert make_record(**change).key != make_record().key


def test_id_is_of_the_content_and_key_is_of_the_subject():
    """Two measurements of one subject share the key and differ in id."""
    one, other = make_record(value=0.1), make_record(value=0.2)
    assert one.key == other.key
    assert one.id != other.id


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_not_a_record(value):
    """NaN never becomes a measurement."""
    with pytest.raises((ValidationError, ValueError), match=r"finite|JSON"):
        make_record(value=value)


def test_a_record_edited_by_hand_is_refused(tmp_path):
    """A changed figure no longer matches the id, and the reader says which line."""
    line = make_record(value=0.1).to_line().replace('"value":0.1', '"value":0.01')
    (tmp_path / JOURNAL).write_text(line)
    with pytest.raises(IntegrityError, match=rf"{JOURNAL}:1 .*id"):
        read_records(tmp_path)


def test_a_torn_last_line_is_set_aside_and_the_rest_kept(tmp_path):
    """What a killed process left half written is not a record, is not lost, and does not stop the next run."""
    with open_store(tmp_path) as store:
        store.append(make_record(target=4.0))
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(make_record(target=2.0).to_line().encode()[:200])
    assert len(read_records(tmp_path)) == 1
    with open_store(tmp_path) as store:
        store.append(make_record(target=2.0))
    assert [r.subject.method.target for r in read_records(tmp_path)] == [4.0, 2.0]
    assert (tmp_path / "records.torn").stat().st_size > 0


def test_damage_before_the_last_line_is_an_error(tmp_path):
    """A journal is never read around a damaged line."""
    (tmp_path / JOURNAL).write_text("{}\n" + make_record().to_line())
    with pytest.raises(IntegrityError, match=f"{JOURNAL}:1"):
        read_records(tmp_path)


@pytest.mark.parametrize("block", [1, 100, 2000, 1 << 16])
def test_the_newest_record_of_each_row_is_found_however_much_is_read_at_once(tmp_path, monkeypatch, block):
    """Rows keep the order of their first records; a line that is longer than what is read at once is one line."""
    monkeypatch.setattr(journal, "BLOCK", block)
    file = tmp_path / JOURNAL
    runs = [make_record(target, value, harness=f"run {value}") for value in (0.1, 0.2, 0.3) for target in (2.0, 4.0)]
    long = make_record(8.0, settings={"chunk": 64, "note": "x" * 5000})
    file.write_text("".join(record.to_line() for record in [runs[0], long, *runs[1:]]) + '{"torn')
    assert read_newest(file) == ([runs[4], long, runs[5]], 4)
    assert find_records(file, [runs[1].key, long.key, "none"]) == [long, runs[1]]


def test_a_subject_within_a_subject_hides_no_record(tmp_path):
    """Settings may hold what looks like the beginning of a subject: both records count, as rows of their own."""
    inner = {"subject": {"harness": "h", "name": "same"}}
    records = [make_record(target, settings=inner) for target in (2.0, 4.0)]
    (tmp_path / JOURNAL).write_text("".join(record.to_line() for record in records))
    assert read_newest(tmp_path / JOURNAL) == (records, 0)


def test_every_changed_character_of_a_line_is_noticed():
    """A digit, a letter or a quote that is not as it was written is refused: a line is hashed as it stands."""
    line = make_record(value=0.123456789).to_line()
    for place in range(0, len(line) - 1, 7):
        changed = line[:place] + ("1" if line[place] != "1" else "2") + line[place + 1 :]
        with pytest.raises(ValidationError):
            Record.from_line(changed)


def test_a_line_in_another_spelling_is_the_same_record():
    """Spaces and another order of fields change no hash: it is of the content."""
    record = make_record()
    content = json.loads(record.to_line())
    assert Record.from_line(json.dumps(dict(reversed(content.items())), indent=1)) == record


def test_a_key_that_is_measured_anew_supersedes_and_loses_nothing(tmp_path):
    """``run --fresh`` adds a line: the later record stands, the earlier one stays in the journal."""
    with open_store(tmp_path) as store:
        store.append(make_record(value=0.1))
        store.append(make_record(value=0.2))
        assert store.get(make_record().key).metrics["kld_mean"].value == 0.2
        assert [record.metrics["kld_mean"].value for record in store.newest()[0]] == [0.2]
    assert [record.metrics["kld_mean"].value for record in read_records(tmp_path)] == [0.2]
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 2


def test_the_same_record_twice_is_an_error_when_written_and_when_read(tmp_path):
    """Nothing counts twice."""
    with open_store(tmp_path) as store:
        store.append(make_record(value=0.1))
        with pytest.raises(UsageError, match="already"):
            store.append(make_record(value=0.1))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(make_record(value=0.1).to_line())
    with pytest.raises(IntegrityError, match="second time"):
        read_records(tmp_path)


def test_one_key_in_two_files_is_an_error(tmp_path):
    """Which of two files is the later one, nobody can tell."""
    for name, value in (("a.jsonl", 0.1), ("b.jsonl", 0.2)):
        (tmp_path / name).write_text(make_record(value=value).to_line())
    with pytest.raises(IntegrityError, match="another file"):
        read_records(tmp_path)


def test_two_writers_exclude_each_other(tmp_path):
    """A second run into the same folder is told so."""
    with open_store(tmp_path), pytest.raises(UnfitEnvironmentError, match="another run"), open_store(tmp_path):
        pass


def test_an_output_that_is_a_file_is_one_sentence(tmp_path):
    """An --out that cannot be a folder names it."""
    (tmp_path / "out").write_text("")
    with (
        pytest.raises(UnfitEnvironmentError, match=r"cannot write to the output folder .*out"),
        open_store(tmp_path / "out"),
    ):
        pass
