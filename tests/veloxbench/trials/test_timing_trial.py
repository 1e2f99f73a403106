"""The experiment on the gate: its journal, its resampling, its page; on synthetic series, without clocks."""

import hashlib
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from veloxbench.cli.app import _run
from veloxbench.compare.timed_decode import DecodeSpec
from veloxbench.compare.timing_blocks import TimedBlock
from veloxbench.compare.timing_test import Block, Start, TimingSpec, mirrored_order, run_gate
from veloxbench.errors import ExitCode, IntegrityError, UnfitEnvironmentError, UsageError
from veloxbench.gate.verdicts import Verdict
from veloxbench.trials.timing_live import LiveGate, LiveJournal, read_live, run_live
from veloxbench.trials.timing_page import plot, render
from veloxbench.trials.timing_record import Setup, check_same
from veloxbench.trials.timing_resample import (
    STRETCH,
    ErrorRates,
    Rate,
    disjoint_gates,
    error_rates,
    outcomes,
    read_error_rates,
    resampled_gates,
    starts_of,
)
from veloxbench.trials.timing_series import (
    BASE,
    Segment,
    SeriesHeader,
    append_line,
    appending,
    read_series,
    series_bytes,
    slot_name,
)

ROOT = Path(__file__).parents[3]
SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.10)
SPEC = TimingSpec()
GATES = 16  # drawn for each slowdown


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


def timed_block(rng, started, slowdown=0.0, noise=0.01, drift=0.0, luck=0.0):
    """A block as a machine with that much noise per sample would give it: 20 ms steps, 5 ms canary."""
    factors = {BASE: 1.0, slot_name(slowdown): (1 + slowdown) * math.exp(luck)}
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


LAUNCH_S = 10.0


def write_series(path, starts=110, runs=2, start_noise=0.01, **how):
    """Runs with an hour between them; each start is faster or slower as a whole."""
    rng = np.random.default_rng(0)
    lines, now = [header()], 0.0
    for _ in range(runs):
        for _ in range(starts):
            lines.append(Segment(started=now, seed=0, state={}))
            luck = rng.normal(0, start_noise)
            for slowdown in SLOWDOWNS * SPEC.blocks_per_start:
                lines.append(timed_block(rng, now, slowdown, luck=luck, **how))
                now += 2
            now += LAUNCH_S
        now += 3600
    path.write_text("".join(line.model_dump_json() + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def series_file(tmp_path_factory):
    return write_series(tmp_path_factory.mktemp("series") / "aa.jsonl")


@pytest.fixture(scope="module")
def rates(series_file):
    return error_rates(series_file, SPEC, "wall", gates=GATES, live=[live_journal()])


def n_blocks(series):
    return sum(len(start.blocks) for start in series.starts)


def live_gate(slowdown=0.05, verdict=Verdict.REGRESS):
    return LiveGate(
        started=0.0,
        slowdown=slowdown,
        clock="wall",
        gate=LiveGate.described(SPEC),
        load=2.0,
        verdict=verdict,
        log_ratios=(0.05,) * 12,
        voids=1,
        seconds=13.0,
        stopped=None,
    )


def live_journal(*gates):
    """Of another machine than the series: live gates need not share it."""
    return LiveJournal(
        header(core=0, implementation="synthetic 2", hardware={"chip": "another"}), gates or (live_gate(),)
    )


def test_a_series_is_read_back_in_runs_of_starts_that_no_stop_crosses(tmp_path):
    """Three starts: the second follows the first by 30 s, its launch; the third comes after an hour."""
    path, rng = tmp_path / "aa.jsonl", np.random.default_rng(0)
    append_line(path, header())
    for starts_at in ([0, 2], [34, 36, 98], [3700]):
        append_line(path, Segment(started=0.0, seed=0, state={}))
        for started in starts_at:
            append_line(path, timed_block(rng, float(started)))
    series = read_series(path)
    assert [[[block.started for block in start.blocks] for start in run] for run in series.runs] == [
        [[0, 2], [34, 36, 98]],
        [[3700]],
    ]
    assert [start.launch_seconds for start in series.starts] == [30, 30, 30]  # the unknown ones as the known one
    assert series.seconds == 3 * 30 + 6 * 2


def test_a_compressed_series_is_the_same_series(series_file, tmp_path):
    """What is committed is what was recorded."""
    packed = tmp_path / "aa.jsonl.xz"
    packed.write_bytes(lzma.compress(series_file.read_bytes()))
    assert read_series(packed) == read_series(series_file)


def test_a_torn_last_line_is_taken_away_and_recording_goes_on(series_file, tmp_path):
    """A killed recorder leaves half a line: the blocks before it stay, the next one is whole."""
    path = tmp_path / "aa.jsonl"
    path.write_bytes(series_file.read_bytes()[:-50])
    whole = n_blocks(read_series(path))
    with appending(path):
        append_line(path, timed_block(np.random.default_rng(0), 1e6))
    assert n_blocks(read_series(path)) == whole + 1 == n_blocks(read_series(series_file))


def test_two_recorders_cannot_write_one_file(tmp_path):
    """The second one is told so."""
    with (
        appending(tmp_path / "aa.jsonl"),
        pytest.raises(UnfitEnvironmentError, match="another process"),
        appending(tmp_path / "aa.jsonl"),
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


def test_a_resampled_gate_is_the_gate_on_stretches_of_the_series(series_file):
    """The same places drawn by hand, their starts in order, give the same result."""
    runs = starts_of(read_series(series_file), 0.03, "wall", SPEC.blocks_per_start)
    (gate,) = resampled_gates(runs, SPEC, 1, np.random.default_rng(3))
    found = [(run, first) for run in runs for first in range(len(run) - STRETCH + 1)]
    drawn = [found[int(np.random.default_rng(3).integers(len(found), size=20)[k])] for k in range(20)]
    by_hand = [start for run, first in drawn for start in run[first : first + STRETCH]]
    assert gate == run_gate(iter(by_hand), SPEC)


def test_gates_that_do_not_overlap_use_every_start_once(series_file):
    """Laid end to end they fit into the runs."""
    runs = starts_of(read_series(series_file), 0.0, "wall", SPEC.blocks_per_start)
    used = [gate.starts + gate.voids for gate in disjoint_gates(runs, SPEC)]
    assert len(used) >= 4
    assert sum(used) <= sum(map(len, runs))


def test_a_gate_that_the_series_end_cuts_off_is_left_out(series_file):
    """No change at all passes at the first look; what is too short for a look decides nothing."""
    start = Start([Block({"decode": ((1.0,), (1.0,))}, (1.0, 1.0), 1.0)], 1.0)
    look = SPEC.looks[0]
    found = disjoint_gates([[start] * (2 * look + 3), [start] * (look - 1), [start] * look], SPEC)
    assert [gate.starts for gate in found] == [look] * 3
    with pytest.raises(UsageError, match="record longer"):
        resampled_gates([[start] * (STRETCH - 1)] * 9, SPEC, 1, np.random.default_rng(0))


def test_a_start_that_was_cut_off_ends_its_run(tmp_path):
    """A recorder stopped in the middle of a start: nothing is drawn across it, the rest is used."""
    path = write_series(tmp_path / "aa.jsonl", starts=5, runs=1)
    lines = path.read_text().splitlines(keepends=True)
    per_start = 1 + len(SLOWDOWNS) * SPEC.blocks_per_start
    path.write_text("".join(lines[: 1 + 3 * per_start - 5] + lines[1 + 3 * per_start :]))
    runs = starts_of(read_series(path), 0.0, "wall", SPEC.blocks_per_start)
    assert [len(run) for run in runs] == [2, 2]


def test_a_gate_costs_the_time_of_its_starts_and_its_own_blocks(series_file):
    """Ten seconds a start and two a block, whatever lay between two blocks of the same slowdown."""
    runs = starts_of(read_series(series_file), 0.05, "wall", SPEC.blocks_per_start)
    for gate in disjoint_gates(runs, SPEC):
        assert gate.seconds == pytest.approx((LAUNCH_S + 2 * SPEC.blocks_per_start) * gate.starts)


def test_clopper_pearson_of_no_alarm_in_a_thousand():
    """The upper end is 1 - 0.025 ** (1 / n): the rule of three, two-sided."""
    rate = Rate.of(0, 1000)
    assert (rate.low, rate.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 1000)))


def test_error_rates_of_a_calm_machine(rates):
    """At 1% noise: nothing at 0%, everything at 10%, and each slowdown measured within half a percent."""
    effects = {effect.slowdown: effect for effect in rates.effects}
    assert effects[0.0].resampled.regress.count == 0
    assert effects[0.10].resampled.regress.count == effects[0.10].resampled.regress.gates == GATES
    for slowdown, effect in effects.items():
        assert effect.measured[0] == pytest.approx(slowdown, abs=0.005)
        assert effect.measured[1] < slowdown < effect.measured[2]
        # 1% a sample, two of each side in a block; 1% a start, known to 6% from 160 starts
        assert effect.block_sd == pytest.approx(0.01, rel=0.1)
        assert effect.start_sd == pytest.approx(0.01, rel=0.25)
        assert (
            effect.resampled.regress.count + effect.resampled.passed.count + effect.resampled.inconclusive.count
            == GATES
        )


def test_void_blocks_are_counted_and_never_used(tmp_path):
    """With every canary moved by 30% nothing can be decided, and the series says why."""
    path = write_series(tmp_path / "aa.jsonl", starts=70, runs=1, drift=0.3)
    found = error_rates(path, SPEC, "wall", gates=5)
    assert found.series.void_share == 1.0
    assert all(effect.resampled.inconclusive.count == 5 for effect in found.effects)


def test_live_gates_are_counted_by_slowdown(rates):
    """One live gate at 5% regressed after 12 starts and a void one."""
    live = {effect.slowdown: effect.live for effect in rates.effects}
    assert [slowdown for slowdown, found in live.items() if found] == [0.05]
    assert live[0.05].outcomes == outcomes([live_gate().result()])
    assert live[0.05].outcomes.cost.starts == (13, 13)
    assert live[0.05].measured[0] == pytest.approx(math.expm1(0.05))
    assert [journal.void_share for journal in rates.live] == [1 / 13]


def test_live_gates_of_another_benchmark_or_slowdown_are_refused(series_file):
    """They say nothing about the gate on the series' benchmark."""
    other = LiveJournal(header(decode=DecodeSpec(depth=64)), (live_gate(),))
    with pytest.raises(UsageError, match="another benchmark"):
        error_rates(series_file, SPEC, "wall", gates=1, live=[live_journal(), other])
    with pytest.raises(UsageError, match="slowdown of 7%"):
        error_rates(series_file, SPEC, "wall", gates=1, live=[live_journal(live_gate(0.07))])


def test_live_gates_of_another_specification_are_refused(series_file):
    """Their outcomes are not those of the gate on the page."""
    other = live_gate().model_copy(update={"gate": LiveGate.described(TimingSpec(margin=0.01))})
    with pytest.raises(UsageError, match="1 of 2 live gates"):
        error_rates(series_file, SPEC, "wall", gates=1, live=[live_journal(live_gate(), other)])
    with pytest.raises(UsageError, match="another clock"):
        error_rates(series_file, SPEC, "cpu", gates=1, live=[live_journal()])


def test_a_series_grows_only_with_the_code_that_times_it(tmp_path):
    """Another hash of the timing code is named; a series from before it was kept has none to compare."""
    now = {"harness": "new", "threads": 1}
    check_same(header(), now, tmp_path)
    check_same(header(harness="new"), now, tmp_path)
    with pytest.raises(UsageError, match="another harness"):
        check_same(header(harness="old"), now, tmp_path)


def test_a_live_journal_is_read_back_and_damage_is_named(tmp_path):
    """Line by line: the header, then the gates."""
    path, journal = tmp_path / "live.jsonl", live_journal(live_gate(), live_gate(0.0))
    for line in (journal.header, *journal.gates):
        append_line(path, line)
    assert read_live(path) == journal
    whole = path.read_text()
    for damaged, place in (
        (whole + "{}\n", ":4 is not of live gates"),
        (whole + whole, ":4: one header comes first"),
        (whole.split("\n", 1)[1], ":1: one header comes first"),
        ("", "does not begin with a header"),
    ):
        path.write_text(damaged)
        with pytest.raises(IntegrityError, match=place):
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
        assert f"({effect.resampled.regress.count} of {GATES};" in page
    assert "## Live gates" in page
    assert "1 gates on another, both sides on core 0, with synthetic 2; load 2.0" in page
    assert render(ErrorRates.model_validate_json(rates.model_dump_json())) == page
    assert plot(rates) == plot(rates)
    assert plot(rates).startswith("<svg")


def test_a_page_edited_by_hand_is_stale(rates, tmp_path, capsys):
    """`trial timing report --check` exits 1 and names the page."""
    record, page = tmp_path / "error-rates.json", tmp_path / "page.md"
    record.write_text(rates.model_dump_json())
    assert _run(["trial", "timing", "report", str(record), "--out", str(page)]) == ExitCode.PASS
    assert (tmp_path / "gate-error-rates.svg").exists()
    assert _run(["trial", "timing", "report", str(record), "--check", str(page)]) == ExitCode.PASS
    page.write_text(page.read_text().replace(f"of {GATES};", f"of {GATES - 1};", 1))
    assert _run(["trial", "timing", "report", str(record), "--check", str(page)]) == ExitCode.REGRESSION
    assert f"{page} is stale" in capsys.readouterr().err


def test_commands_name_what_is_missing(tmp_path, capsys):
    """One sentence each, exit code 4."""
    for arguments in (
        ["trial", "timing", "resample", str(tmp_path / "none.jsonl")],
        ["trial", "timing", "report", str(tmp_path / "none.json")],
        ["trial", "timing", "resample", str(tmp_path / "some.jsonl"), "--live", str(tmp_path / "none.jsonl")],
    ):
        assert _run(arguments) == ExitCode.USAGE
        assert str(tmp_path / "none") in capsys.readouterr().err


def test_a_series_goes_on_only_as_it_was_begun(series_file, tmp_path, capsys):
    """Other options than the header's are refused by name before anything is loaded; the file stays as it is."""
    path = tmp_path / "aa.jsonl"
    path.write_bytes(series_file.read_bytes())
    assert _run(["trial", "timing", "record", "--out", str(path), "--threads", "2", "--depth", "64"]) == ExitCode.USAGE
    assert "another decode, threads" in capsys.readouterr().err
    assert path.read_bytes() == series_file.read_bytes()


def test_live_gates_go_on_only_as_they_were_begun(tmp_path, capsys):
    """Other options than the header's are refused by name before anything is loaded; nothing is lost."""
    path, journal = tmp_path / "live.jsonl", live_journal()
    for line in (journal.header, *journal.gates):
        append_line(path, line)
    before = path.read_bytes()
    assert _run(["trial", "timing", "live", "--out", str(path), "--threads", "2", "--depth", "64"]) == ExitCode.USAGE
    assert "another decode, threads, core" in capsys.readouterr().err
    assert path.read_bytes() == before


def record_command(model, out, hours):
    command = ["trial", "timing", "record", "--model", str(model), "--arm", "fp16", "--depth", "8", "--steps", "1"]
    return [sys.executable, "-m", "veloxbench.cli", *command, "--hours", str(hours), "--out", str(out)]


@pytest.mark.slow
def test_a_live_series_is_stopped_and_goes_on(cut_model, tmp_path):
    """Two real layers: an interrupt ends a series, the same command goes on in a new start; so do live gates."""
    out = tmp_path / "aa.jsonl"
    process = subprocess.Popen(record_command(cut_model, out, 1), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.exists() and out.read_bytes().count(b"\n") > 4):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    before = read_series(out)
    assert n_blocks(before) >= 2
    hours = (before.seconds + 0.5) / 3600
    assert subprocess.run(record_command(cut_model, out, hours), check=False).returncode == 0
    after = read_series(out)
    assert len(after.starts) == len(before.starts) + 1
    assert after.header == before.header
    gates = tmp_path / "live.jsonl"
    spec = TimingSpec(looks=(1,), blocks_per_start=1)  # one start decides nothing, and is all that this needs
    setup = Setup(after.header.decode)
    first = run_live(setup, gates, [0.0, 0.05], 1, spec, "cpu", print)
    assert [(gate.slowdown, gate.verdict) for gate in first.gates] == [(0.0, "inconclusive"), (0.05, "inconclusive")]
    assert run_live(setup, gates, [0.0, 0.05], 1, spec, "cpu", print) == first == read_live(gates)
    with pytest.raises(UsageError, match="no slowdown of 10%"):
        run_live(setup, gates, [0.1], 1, spec, "cpu", print)


def test_the_committed_page_is_what_the_committed_series_says():
    """The page and its plot are the record's, and the record is of the series beside it, of two hours."""
    folder = ROOT / "records" / "timing-gate"
    page = ROOT / "docs" / "gate-error-rates.md"
    assert _run(["trial", "timing", "report", str(folder / "error-rates.json"), "--check", str(page)]) == ExitCode.PASS
    found = read_error_rates(folder / "error-rates.json")
    series = series_bytes(folder / "aa.jsonl.xz")
    assert hashlib.sha256(series).hexdigest() == found.series.sha256
    assert found.series.hours >= 2
    journals = [read_live(path) for path in sorted(folder.glob("live-*.jsonl"))]
    assert [(live.header, live.gates) for live in found.live] == [(j.header, len(j.gates)) for j in journals]
    lived = sum(effect.live.outcomes.regress.gates for effect in found.effects if effect.live)
    assert lived == sum(len(journal.gates) for journal in journals) > 0
