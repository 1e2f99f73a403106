"""The experiment on the gate: its journal, its resampling, its page; on synthetic series, without clocks."""

import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from veloxbench.aa.live import LiveGate, read_live
from veloxbench.aa.page import plot, render
from veloxbench.aa.resample import (
    ErrorRates,
    Rate,
    blocks_of,
    disjoint_gates,
    error_rates,
    outcomes,
    read_error_rates,
    resampled_gates,
    starts,
)
from veloxbench.aa.series import BASE, Segment, SeriesHeader, append_line, open_journal, read_series, slot_name
from veloxbench.cli import _run
from veloxbench.decode_timing import DecodeSpec
from veloxbench.errors import ExitCode, IntegrityError, UnfitEnvironmentError, UsageError
from veloxbench.timing_gate import Block, TimingSpec, mirrored_order, run_gate
from veloxbench.timing_pairs import TimedBlock
from veloxbench.verdicts import Verdict

SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.10)
SPEC = TimingSpec()


def header(**changes):
    fields = {
        "decode": DecodeSpec(),
        "extra_rows": {slowdown: round(1e5 * slowdown) for slowdown in SLOWDOWNS},
        "threads": 1,
        "core": None,
        "implementation": "synthetic",
        "commit": None,
        "dirty": None,
        "versions": {},
        "hardware": {"chip": "no machine"},
    }
    return SeriesHeader(**{**fields, **changes})


def timed_block(rng, started, slowdown=0.0, noise=0.01, drift=0.0):
    """A block as a machine with that much noise per sample would give it: 20 ms steps, 5 ms canary."""
    factors = {BASE: 1.0, slot_name(slowdown): 1 + slowdown}
    order = mirrored_order(list(factors), rng)
    steps = tuple((round(20_000 * factors[name] * math.exp(rng.normal(0, noise))),) * 3 for name in order)
    canary = ((5000,) * 15, (round(5000 * (1 + drift)),) * 15)
    return TimedBlock(
        started=started,
        seconds=2.0,
        order=tuple(order),
        wall_us=steps,
        cpu_us=steps,
        canary_wall_us=canary,
        canary_cpu_us=canary,
        load=1.0,
    )


def write_series(path, rounds=290, segments=2, **how):
    rng = np.random.default_rng(0)
    append_line(path, header())
    for segment in range(segments):
        append_line(path, Segment(started=10_000.0 * segment, seed=0, state={}))
        for index, slowdown in enumerate(SLOWDOWNS * rounds):
            append_line(path, timed_block(rng, 10_000.0 * segment + 2 * index, slowdown, **how))
    return path


@pytest.fixture(scope="module")
def series_file(tmp_path_factory):
    return write_series(tmp_path_factory.mktemp("series") / "aa.jsonl")


@pytest.fixture(scope="module")
def rates(series_file):
    return error_rates(series_file, SPEC, "wall", gates=100, live=[live_gate()])


def live_gate(slowdown=0.05, verdict=Verdict.REGRESS):
    return LiveGate(
        started=0.0,
        slowdown=slowdown,
        clock="wall",
        core=0,
        load=2.0,
        verdict=verdict,
        log_ratios=(0.05,) * 12,
        voids=1,
        seconds=13.0,
        stopped=None,
    )


def test_a_series_is_read_back_in_runs_that_no_restart_or_pause_crosses(tmp_path):
    """Two segments, and a pause of a minute inside the second: three runs."""
    path, rng = tmp_path / "aa.jsonl", np.random.default_rng(0)
    append_line(path, header())
    for starts_at in ([0, 2, 4], [100, 102, 162, 164]):
        append_line(path, Segment(started=0.0, seed=0, state={}))
        for started in starts_at:
            append_line(path, timed_block(rng, float(started)))
    assert [[block.started for block in run] for run in read_series(path).runs] == [[0, 2, 4], [100, 102], [162, 164]]


def test_a_compressed_series_is_the_same_series(series_file, tmp_path):
    """What is committed is what was recorded."""
    packed = tmp_path / "aa.jsonl.xz"
    packed.write_bytes(lzma.compress(series_file.read_bytes()))
    assert read_series(packed) == read_series(series_file)


def test_a_torn_last_line_is_taken_away_and_recording_goes_on(series_file, tmp_path):
    """A killed recorder leaves half a line: the blocks before it stay, the next one is whole."""
    path = tmp_path / "aa.jsonl"
    path.write_bytes(series_file.read_bytes()[:-50])
    whole = read_series(path).blocks
    with open_journal(path) as journal:
        assert journal.series is not None
        journal.append(timed_block(np.random.default_rng(0), 1e6))
    assert read_series(path).blocks == whole + 1 == read_series(series_file).blocks


def test_two_recorders_cannot_write_one_file(tmp_path):
    """The second one is told so."""
    with (
        open_journal(tmp_path / "aa.jsonl"),
        pytest.raises(UnfitEnvironmentError, match="another process"),
        open_journal(tmp_path / "aa.jsonl"),
    ):
        pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:3], "{}", *lines[3:]], ":4 is not a line"),
        (lambda lines: lines[1:], "header"),
        (lambda lines: [*lines, lines[0]], "second header"),
        (lambda lines: [*lines, lines[-1].replace('"seconds":2.0', '"seconds":2.0,"more":1')], "not a line"),
    ],
)
def test_a_damaged_series_is_an_error_that_names_the_line(series_file, tmp_path, damage, message):
    """A damaged journal is never read around."""
    path = tmp_path / "aa.jsonl"
    path.write_text("\n".join(damage(series_file.read_text().splitlines())) + "\n")
    with pytest.raises(IntegrityError, match=message):
        read_series(path)


def test_a_gate_drawn_from_the_series_is_the_gate_run_on_its_blocks(series_file):
    """From place (run, first): the same result as the gate on that slice, and never beyond the run."""
    runs = blocks_of(read_series(series_file), 0.0, "wall")
    for index, first in starts(runs, SPEC):
        assert len(runs[index]) - first >= SPEC.looks[-1]
    (gate,) = resampled_gates(runs, SPEC, 1, np.random.default_rng(3))
    places = starts(runs, SPEC)
    index, first = places[np.random.default_rng(3).integers(len(places), size=1)[0]]
    assert gate == run_gate(iter(runs[index][first:]), SPEC)


def test_gates_that_do_not_overlap_use_every_block_once(series_file):
    """Laid end to end they fit into the runs."""
    runs = blocks_of(read_series(series_file), 0.0, "wall")
    used = [gate.blocks + gate.voids for gate in disjoint_gates(runs, SPEC)]
    assert len(used) >= 4
    assert sum(used) <= sum(map(len, runs))


def test_no_gate_starts_where_its_budget_would_cross_a_gap():
    """A run as long as a gate's budget has one place; one more for each further block; none if a run is shorter."""
    block = Block({"decode": ((1.0,), (1.0,))}, (1.0, 1.0), 1.0)
    budget = SPEC.looks[-1]
    assert starts([[block] * (budget - 1), [block] * (budget + 2)], SPEC) == [(1, 0), (1, 1), (1, 2)]
    with pytest.raises(UsageError, match="record longer"):
        resampled_gates([[block] * (budget - 1)], SPEC, 1, np.random.default_rng(0))


def test_a_gate_costs_the_time_of_its_own_blocks(series_file):
    """Two seconds a block, whatever lay between two blocks of the same slowdown."""
    runs = blocks_of(read_series(series_file), 0.05, "wall")
    for gate in disjoint_gates(runs, SPEC):
        assert gate.seconds == 2 * gate.blocks


def test_clopper_pearson_of_no_alarm_in_a_thousand():
    """The upper end is 1 - 0.025 ** (1 / n): the rule of three, two-sided."""
    rate = Rate.of(0, 1000)
    assert (rate.low, rate.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 1000)))


def test_error_rates_of_a_calm_machine(rates):
    """At 1% noise: nothing at 0%, everything at 10%, and each slowdown measured within half a percent."""
    effects = {effect.slowdown: effect for effect in rates.effects}
    assert effects[0.0].resampled.regress.count == 0
    assert effects[0.10].resampled.regress.count == effects[0.10].resampled.regress.gates == 100
    for slowdown, effect in effects.items():
        assert effect.measured[0] == pytest.approx(slowdown, abs=0.005)
        assert effect.measured[1] < slowdown < effect.measured[2]
        assert (
            effect.resampled.regress.count + effect.resampled.passed.count + effect.resampled.inconclusive.count == 100
        )


def test_void_blocks_are_counted_and_never_used(tmp_path):
    """With every canary moved by 30% nothing can be decided, and the series says why."""
    path = write_series(tmp_path / "aa.jsonl", rounds=70, segments=1, drift=0.3)
    found = error_rates(path, SPEC, "wall", gates=5)
    assert found.series.void_share == 1.0
    assert all(effect.resampled.inconclusive.count == 5 for effect in found.effects)


def test_live_gates_are_counted_by_slowdown(rates):
    """One live gate at 5% regressed after 12 blocks and a void one."""
    live = {effect.slowdown: effect.live for effect in rates.effects}
    assert [slowdown for slowdown, found in live.items() if found] == [0.05]
    assert live[0.05] == outcomes([live_gate().result()])
    assert live[0.05].cost.blocks == (13, 13)


def test_a_live_journal_is_read_back_and_damage_is_named(tmp_path):
    """Line by line."""
    path = tmp_path / "live.jsonl"
    append_line(path, live_gate())
    assert read_live(path) == [live_gate()]
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(IntegrityError, match=":2"):
        read_live(path)


def test_the_record_survives_its_file(rates, tmp_path):
    """Written and read, it is equal; another file is refused."""
    path = tmp_path / "error-rates.json"
    path.write_text(rates.model_dump_json())
    assert read_error_rates(path) == rates
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(IntegrityError, match="error rates"):
        read_error_rates(path)


def test_the_page_holds_the_record_s_counts_and_is_the_same_every_time(rates):
    """Every row's counts stand in the page; the plot is a valid, repeatable SVG."""
    page = render(rates)
    for effect in rates.effects:
        assert f"({effect.resampled.regress.count} of 100;" in page
    assert "## Live gates" in page
    assert "on core 0; load 2.0" in page
    assert render(ErrorRates.model_validate_json(rates.model_dump_json())) == page
    assert plot(rates) == plot(rates)
    assert plot(rates).startswith("<svg")


def test_a_page_edited_by_hand_is_stale(rates, tmp_path, capsys):
    """`aa report --check` exits 1 and names the page."""
    record, page = tmp_path / "error-rates.json", tmp_path / "page.md"
    record.write_text(rates.model_dump_json())
    assert _run(["aa", "report", str(record), "--out", str(page)]) == ExitCode.PASS
    assert (tmp_path / "gate-error-rates.svg").exists()
    assert _run(["aa", "report", str(record), "--check", str(page)]) == ExitCode.PASS
    page.write_text(page.read_text().replace("100", "99", 1))
    assert _run(["aa", "report", str(record), "--check", str(page)]) == ExitCode.REGRESSION
    assert f"{page} is stale" in capsys.readouterr().err


def test_commands_name_what_is_missing(tmp_path, capsys):
    """One sentence each, exit code 4."""
    for arguments in (
        ["aa", "resample", str(tmp_path / "none.jsonl")],
        ["aa", "report", str(tmp_path / "none.json")],
        ["aa", "live", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "live.jsonl")],
    ):
        assert _run(arguments) == ExitCode.USAGE
        assert str(tmp_path / "none") in capsys.readouterr().err


def test_a_series_goes_on_only_as_it_was_begun(series_file, tmp_path, capsys):
    """Other options than the header's are refused by name before anything is loaded; the file stays as it is."""
    path = tmp_path / "aa.jsonl"
    path.write_bytes(series_file.read_bytes())
    assert _run(["aa", "record", "--out", str(path), "--threads", "2", "--depth", "64"]) == ExitCode.USAGE
    assert "another decode, threads" in capsys.readouterr().err
    assert path.read_bytes() == series_file.read_bytes()


def record_command(model, out, hours):
    command = ["aa", "record", "--model", str(model), "--method", "fp16", "--depth", "8", "--steps", "1"]
    return [sys.executable, "-m", "veloxbench.cli", *command, "--hours", str(hours), "--out", str(out)]


@pytest.mark.slow
def test_a_live_series_is_stopped_and_goes_on(cut_model, tmp_path):
    """Two real layers: blocks appear, an interrupt ends it, the same command goes on in a new segment."""
    out = tmp_path / "aa.jsonl"
    process = subprocess.Popen(record_command(cut_model, out, 1), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.exists() and out.read_bytes().count(b"\n") > 4):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    before = read_series(out)
    assert before.blocks >= 2
    hours = (before.seconds + 0.5) / 3600
    assert subprocess.run(record_command(cut_model, out, hours), check=False).returncode == 0
    after = read_series(out)
    assert after.blocks > before.blocks
    assert len(after.runs) == len(before.runs) + 1
    assert after.header == before.header
