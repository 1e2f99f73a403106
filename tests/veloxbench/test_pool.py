"""One grid carried out by a pool: a real scheduler, real worker processes, and what becomes of them when they die."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import UsageError
from veloxbench.records.merge import figures
from veloxbench.records.store import open_store, read_records
from veloxbench.records.suites import suite_row

pytest.importorskip("distributed", reason="the extra `pool` is not installed")

from veloxbench.run import pool
from veloxbench.run.grid import parse_grid
from veloxbench.run.plan import measurements_without_model
from veloxbench.run.pool import Flight, Pool, PoolRun, Station, Stream

WORKER = """
import sys, time
from pathlib import Path
from veloxbench.cli import main
from veloxbench.measure import suite
from veloxbench.run import pool_worker

kind, folder = sys.argv.pop(1), Path(sys.argv.pop(1))
measure, done = pool_worker.measure, []

def watched(item, *arguments):
    if kind == "victim":
        (folder / "victim measures").touch()
        time.sleep(600)
    while done and not (folder / "go").exists():  # the first at once, the second while the scheduler dies
        time.sleep(0.05)
    record = measure(item, *arguments)
    done.append(record)
    with (folder / "measured").open("a") as file:
        file.write(f"{record.key}\\n")
    return record

pool_worker.measure = watched
if kind == "stranger":
    suite.harness_hash = lambda: "f" * 64
main()
"""


def wait_for(condition, what, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def processes(tmp_path):
    """Starts processes that end with the test, each with a log of its own."""
    started = []

    def start(name, *command):
        with (tmp_path / f"{name}.log").open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_pool_loses_no_record_and_measures_none_twice(tmp_path, processes, monkeypatch, capsys):
    """Four workers and one of other code: one is killed in a cell, then the scheduler dies; the same command goes on.

    Every cell is measured once and has the figures of a run without a pool; the stranger measures nothing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, grid, out = f"tcp://127.0.0.1:{port}", tmp_path / "exact.toml", tmp_path / "pooled"
    grid.write_text('summary = "a moment"\nsuites = ["exact"]\n')
    monkeypatch.setattr(pool, "PATIENCE_S", 5.0)

    def scheduler():
        return processes(
            "scheduler", "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"
        )

    first, workers = scheduler(), {}
    for name in ("victim", "one", "two", "three", "stranger"):
        kind = name if name in ("victim", "stranger") else "plain"
        workers[name] = processes(name, "-c", WORKER, kind, str(tmp_path), "worker", address)
    run = ["run", "--profile", str(grid), "--shard", "1/8"]
    assert veloxbench([*run, "--out", str(tmp_path / "local")]) == 0
    logs = [tmp_path / f"{name}.log" for name in workers]
    wait_for(lambda: all("measuring for" in log.read_text() for log in logs), "the start of every worker")

    def disturb():
        wait_for((tmp_path / "victim measures").exists, "a cell of the victim")
        workers["victim"].send_signal(signal.SIGKILL)
        wait_for(lambda: len(read_records(out)) == 3, "a record of each other worker")
        first.kill()

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    command = [*run, "--scheduler", address, "--out", str(out)]
    assert veloxbench(command) == 5
    disturbing.join()
    said = capsys.readouterr().err
    assert "3 records of this run are kept" in said
    assert "type the same command again to go on" in said
    assert "is refused: the code that measures exact is ffff" in said
    kept = {record.id for record in read_records(out)}
    assert len(kept) == 3
    assert said.count("takes part") == 4
    assert "FAILED" not in said

    (tmp_path / "go").touch()
    second = scheduler()
    wait_for(lambda: answers(port), "the start of the second scheduler")
    back = [tmp_path / f"{name}.log" for name in ("one", "two", "three")]
    wait_for(lambda: all(log.read_text().count("measuring for") == 2 for log in back), "the workers' return")
    assert veloxbench(command) == 0
    assert second.poll() is None

    def lines(folder):
        return sorted(json.dumps(figures(record), sort_keys=True) for record in read_records(folder))

    assert lines(out) == lines(tmp_path / "local")
    assert kept < {record.id for record in read_records(out)}
    measured = (tmp_path / "measured").read_text().split()
    assert sorted(measured) == sorted(record.key for record in read_records(out))
    assert "3 recorded before, 0 failed" in capsys.readouterr().err


MILLION = """
summary = "a million cells"
models = ["smollm2-135m"]
n_layers = 1
corpus = "bundled"
suites = ["perplexity"]
[[arms]]
method = "turboquant_mse"
targets = [4]
parameters = { sinks = [%s] }
""" % ", ".join(map(str, range(999)))  # noqa: UP031 (braces)


def test_a_million_cells_begin_at_once(tmp_path):
    """The first thousand cells are ready to go in seconds and in less memory than a list of a million would take."""
    protocols = "".join(
        f'[[protocols]]\nname = "chunked"\nsequences = 2\nlength = 1024\nchunk = 64\nscore_from = {n}\n'
        for n in range(1, 1001)
    )
    grid = parse_grid(MILLION + protocols, "the grid")
    with open_store(tmp_path) as store:
        run = PoolRun(grid, store, None, None, scheduler="tcp://nowhere:1")
        began = time.process_time()
        assert run.size() == 1_000_000
        tracemalloc.start()
        (stream,) = run.streams()
        run.pool.bound[stream.group] = "some class"
        keys = set()
        for _ in range(1000):
            keys.add(run.head(stream).item.subject.key)
            stream.head = None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(keys) == 1000
    assert time.process_time() - began < 60  # a tenth of what it takes to plan them all, under the tracer too
    assert peak < 100e6  # 100 bytes a cell: a cell has more in its arm's name alone


def station(name, machine, classes=("r", "s")):
    return Station(name, machine, "a chip", dict(zip(("rounding", "speed"), classes, strict=True)), set())


def test_timings_are_alone_on_their_machine():
    """While another worker of the machine measures, none gets a timing, and none gets anything beside a timing."""
    item = next(measurements_without_model(parse_grid('summary = "s"\nsuites = ["exact"]\n', "a grid")))
    quality, timing = (
        Flight(Stream("m", None, None, suite_row(name), iter(())), item) for name in ("perplexity", "throughput")
    )
    here, beside, elsewhere = station("a", "one"), station("b", "one"), station("c", "two")
    known = Pool({each.address: each for each in (here, beside, elsewhere)})
    known.bound = {("m", "rounding"): "r", ("m", "speed"): "s"}
    beside.under_way = quality, None
    assert (known.fits(here, timing), known.fits(here, quality), known.fits(elsewhere, timing)) == (False, True, True)
    beside.under_way = timing, None
    assert (known.fits(here, quality), known.fits(elsewhere, quality)) == (False, True)


def test_one_model_goes_to_one_class_of_machines():
    """A worker whose rounding is another gets none of a model's quality, and may get its timings."""
    item = next(measurements_without_model(parse_grid('summary = "s"\nsuites = ["exact"]\n', "a grid")))
    other = station("a", "one", classes=("another", "s"))
    known = Pool({"a": other}, bound={("m", "rounding"): "r", ("m", "speed"): "s"})
    assert not known.fits(other, Flight(Stream("m", None, None, suite_row("memory"), iter(())), item))
    assert known.fits(other, Flight(Stream("m", None, None, suite_row("throughput"), iter(())), item))


def test_an_address_without_a_protocol_is_refused(tmp_path):
    """The message has the form that is wanted."""
    with open_store(tmp_path) as store, pytest.raises(UsageError, match="tcp://host:port"):
        PoolRun(None, store, None, None, scheduler="localhost:8786")


@pytest.mark.parametrize(
    "command", [["run", "--profile", "gate", "--scheduler", "tcp://nowhere:1"], ["worker", "tcp://nowhere:1"]]
)
def test_without_dask_the_extra_is_named(command, tmp_path, monkeypatch, capsys):
    """Exit code 5, and what to type."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert veloxbench(command) == 5
    assert "pip install 'veloxbench[pool]'" in capsys.readouterr().err
