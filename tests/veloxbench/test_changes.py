"""Change points over stored records: a planted one is marked where it is, noise is not, unlike records are left out."""

import dataclasses
import json
import re
import shlex
from datetime import timedelta
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import typer
from gate_records import HARDWARE, MODEL, NOW, damage, quality_record

from veloxbench.cli.app import _run as veloxbench
from veloxbench.cli.app import app
from veloxbench.gate import changes
from veloxbench.gate.changes import change_points
from veloxbench.records.record import Record
from veloxbench.report.history import bisection, change_cells, judged_changes
from veloxbench.report.html import render_html
from veloxbench.trials.travelling import read_rates

ROOT = Path(__file__).parents[2]

TARGETS = (2.0, 3.0, 4.0, 6.0)
PLANTED = 0.02
NOISE = 0.002


def commit(day: int) -> str:
    return f"{day:040x}"


def measured(day: int, target: float = 4.0, *, kld: object = None, **fields: object) -> Record:
    """A record of one day's commit, whose code is the day's own; each sequence's KLD is drawn anew."""
    noise = NOISE * np.random.default_rng([day, int(target), 1]).standard_normal(16)
    defaults = {"implementation": f"code {day}", "started": NOW + timedelta(days=day), "commit": commit(day)}
    return quality_record(
        "turboquant_mse", target, kld=damage(0.058) + noise if kld is None else kld, **defaults | fields
    )


@pytest.fixture
def series() -> list[Record]:
    """Four rows over five commits; from the fourth on the row of 4 bits loses 0.02 nats more."""
    records = [measured(day, target) for day in range(5) for target in TARGETS]
    return [
        measured(day, 4.0, kld=np.array(record.samples["kld_mean"]) + PLANTED)
        if (day := (record.provenance.started - NOW).days) >= 3 and record.subject.method.target == 4.0
        else record
        for record in reversed(records)
    ]


def test_a_planted_change_is_marked_at_its_commit(series):
    """The one row, the one commit, and 0.02 nats within three standard errors of the noise: beyond the gate's 10%."""
    (change,) = change_points(series).changes
    assert (change.after.subject.method.target, change.metric) == (4.0, "kld_mean")
    assert [record.provenance.commit for record in (change.before, change.after)] == [commit(2), commit(3)]
    assert change.values[1] - change.values[0] == pytest.approx(PLANTED, abs=3 * NOISE * (2 / 16) ** 0.5)
    assert 0 < change.low < change.values[1] - change.values[0] < change.high
    assert change.limit == pytest.approx(0.1 * change.values[0])
    assert change.is_regression


def test_bytes_changed_if_they_differ_at_all():
    """From 4.25 to 4.2500001 bits is a change, with no interval; the KLD of the same samples is none."""
    found = change_points([measured(day, kld=damage(0.058), bits=4.25 + day * 1e-7) for day in range(2)])
    bits, allocated = found.changes
    assert (bits.metric, allocated.metric) == ("bits_per_value", "allocated_bits_per_value")
    assert (bits.low, bits.is_regression, found.tests) == (bits.high, True, 0)
    assert change_cells(bits, several=False)[2] == "4.25 → 4.2500001"


def test_noise_alone_marks_less_than_the_stated_rate():
    """A page of 200 rows of pure noise has a mark in 1% of all draws; two of ten pages have one in 0.4%."""
    rng = np.random.default_rng(0)
    rows = [[measured(day, 2 + row / 100) for day in range(2)] for row in range(200)]

    def drawn(record: Record) -> Record:
        noise = np.array(record.samples["kld_mean"]) * (1 + 0.1 * rng.standard_normal(16))
        return record.model_copy(update={"samples": record.samples | {"kld_mean": noise.tolist()}})

    pages = [change_points([drawn(record) for row in rows for record in row]) for _ in range(10)]
    assert {page.tests for page in pages} == {200}
    assert sum(bool(page.changes) for page in pages) <= 1


def test_measured_noise_is_no_change():
    """One state of the code under two settings of its BLAS, whose sums round differently: four arms, none marked."""
    settings = read_rates(ROOT / "records" / "gate" / "travelling.json").settings.samples
    records = [
        measured(day, kld=samples["kld_mean"], model=MODEL.model_copy(update={"name": arm}))
        for day, arms in enumerate(settings.values())
        for arm, samples in arms.items()
        if "kld_mean" in samples
    ]
    found = change_points(records)
    assert (found.tests, found.changes) == (4, ())


@pytest.mark.parametrize(("rows", "marks"), [(327, 1), (328, 0)])
def test_more_tests_than_sign_flips_can_serve_are_said_to_be_too_many(rows, marks):
    """The rarest of 2 x 32768 flips either way has p = 2/65536: below .01/327 and above .01/328."""
    pair = [measured(day, kld=damage(0.058)) for day in range(2)]
    planted = [measured(day, kld=damage(0.058) + (0.02 + 1e-4 * np.arange(16)) * (day == 1)) for day in range(2)]

    def of_text(record: Record, name: str) -> Record:
        text = record.subject.text.model_copy(update={"name": name})
        return record.model_copy(update={"subject": record.subject.model_copy(update={"text": text})})

    noise = np.random.default_rng(0).standard_normal((rows, 16))
    records = list(planted)
    for row in range(1, rows):
        drawn = pair[1].model_copy(update={"samples": {"kld_mean": (damage(0.058) + 0.01 * noise[row]).tolist()}})
        records += [of_text(pair[0], f"text {row}"), of_text(drawn, f"text {row}")]
    found = change_points(records)
    assert (found.tests, len(found.changes)) == (rows, marks)
    assert ("are too many" in judged_changes(found)) == (marks == 0)


FEW = damage(0.058, n=8)


@pytest.mark.parametrize(
    ("fields", "reason", "compared"),
    [
        ({"hardware": {**HARDWARE, "chip": "another"}}, None, 0),
        ({"implementation": "code 0"}, None, 0),
        ({"machine_class": "another"}, changes.OTHER_ROUNDING, 0),
        ({"refused": "no"}, changes.REFUSED, 0),
        ({"kld": damage(0.1, n=17)}, changes.UNPAIRED, 1),
        ({"drop": ("kld_mean",)}, changes.UNPAIRED, 1),
    ],
)
def test_what_cannot_be_compared_is_left_out_with_its_reason(fields, reason, compared):
    """Twice the loss is no change of the code on another machine, of the same code, or where nothing can be paired."""
    found = change_points([measured(0), measured(1, **{"kld": damage(0.116), **fields})])
    assert found.changes == ()
    assert found.left_out == ({} if reason is None else {reason: 1})
    assert found.compared == compared


def test_eight_sequences_are_too_few():
    """Their sign flips are 256, fewer than a page's tests may ask for; bytes are compared all the same."""
    found = change_points([measured(day, kld=FEW * (1 + day)) for day in range(2)])
    assert (found.changes, dict(found.left_out), found.compared) == ((), {changes.TOO_FEW: 1}, 1)


def test_another_rounding_between_two_records_does_not_part_them(series):
    """Each rounding has its own neighbours: what a library changed for a day is no change of the code."""
    days = [measured(day, kld=damage(0.058) + 0.03 * (day == 1), machine_class="ab"[day % 2]) for day in range(3)]
    found = change_points(days)
    assert (found.changes, found.compared, dict(found.left_out)) == ((), 1, {changes.OTHER_ROUNDING: 1})


def test_the_command_is_one_that_bisect_takes(series):
    """A name with spaces stays one word and steers no terminal; `veloxbench bisect` has every option."""
    (change,) = change_points(series).changes
    subject = change.after.subject
    moved = subject.model_copy(update={"model": MODEL.model_copy(update={"name": "my $(models)/a\x1b b"})})
    after = change.after.model_copy(update={"subject": moved})
    command, is_command = bisection(dataclasses.replace(change, after=after))
    assert is_command
    program, name, *arguments = shlex.split(command)
    context = typer.main.get_command(app).commands[name].make_context(name, arguments)
    given = {key: context.params[key] for key in ("good", "bad", "subject", "model", "suite")}
    ends = {"good": commit(2)[:12], "bad": commit(3)[:12]}
    assert program == "veloxbench"
    assert given == ends | {"subject": "turboquant_mse@4", "model": "my $(models)/a\ufffd b", "suite": "perplexity"}


@pytest.mark.parametrize(
    ("factor", "commits", "said"),
    [
        (0.5, ("a" * 40, "b" * 40), "better"),
        (1.01, ("a" * 40, "b" * 40), "within the gate's limit, 0.00600"),
        (2.0, ("a" * 40, "a" * 40), "not between two known commits"),
        (2.0, ("a" * 40, "$(reboot)"), "not between two known commits"),
        (2.0, (None, "b" * 40), "not between two known commits"),
    ],
)
def test_where_bisect_would_find_nothing_the_reason_stands(factor, commits, said):
    """A gain, a loss within the gate's limit, and records of no commit have no command."""
    klds = np.linspace(0.04, 0.08, 16), np.linspace(0.04, 0.08, 16) * factor
    records = [measured(day, kld=klds[day], commit=commits[day]) for day in range(2)]
    (change,) = change_points(records).changes
    assert bisection(change) == (said, False)


def test_the_page_marks_it_and_has_the_table(series):
    """The planted change has a diamond that says so and one row with the command; names of the user are text."""
    hostile = "</script><b>&"
    model = MODEL.model_copy(update={"name": hostile})
    page = render_html([*series, *(measured(day, model=model, bits=4 + day) for day in range(2))])
    told = {json.loads(text) for text in re.findall(r'"change":("[^"]*")', page)}
    assert len(told) == 2
    assert any(re.match(r"kld_mean 0.0\d+ → 0.0\d+, \+0.0[12]", text) for text in told)
    section = page[page.index('id="changes"') : page.index('id="tables"')]
    assert section.count("<tr data-model") == 3
    assert f"<code>veloxbench bisect {commit(2)[:12]} {commit(3)[:12]} --subject turboquant_mse@4" in unescape(section)
    assert "<b>" not in page
    assert "of a hundred pages one at most" in section


def test_a_page_without_two_states_of_the_code_has_no_such_section(series):
    """The records of one commit."""
    page = render_html([record for record in series if record.provenance.commit == commit(0)])
    assert 'id="changes"' not in page


def test_the_command_line_says_it(series, tmp_path, capsys):
    """The table, then the bisection; of one state of the code a sentence, and of no records exit code 4."""
    several, one = tmp_path / "several.jsonl", tmp_path / "one.jsonl"
    several.write_text("".join(record.to_line() for record in reversed(series)))
    one.write_text(measured(0).to_line())
    assert veloxbench(["changes", str(several)]) == 0
    printed = capsys.readouterr().out
    assert (
        f"\nveloxbench bisect {commit(2)[:12]} {commit(3)[:12]} --subject turboquant_mse@4 --model smollm2-135m\n"
        in printed
    )
    assert "metrics changed: 1." in printed
    assert veloxbench(["changes", str(one)]) == 0
    assert capsys.readouterr().out.startswith(f"no row in {one} has records of two states of the code")
    assert veloxbench(["changes", str(tmp_path / "none")]) == 4
