"""Attacks that are no damaged files: records made to deceive the gate, killed writers, odd command lines."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import written

ODD_WORDS = (
    *("-1", "0", "1e400", "nan", "inf", "-inf", "1e-400", "9" * 400, "", " ", "--", "-", "é", "\udcff", "x" * 5000),
    *("..", "../x", "a/b/c", ".", "no such", "|x|", "\x1b[31mred", "a\nb", "%s%n", "{x}", "$(id)", "*", "~nobody/x"),
    *("4", "4,2", "4,,2", "turboquant_mse@4", "turboquant_mse@", "@4", "turboquant_mse@4:sinks=", "a:b:c", "fp16@1"),
    *("/dev/null", "/dev/full", "exact", "gate", "smoke", "true", "[]", "{}", "None"),
)

# --- the gate -------------------------------------------------------------------------------------------------------


def _remade(record: Any, **changes: Any) -> Any:
    """The record with other parts, its hashes computed anew: no checksum tells on it."""
    parts = {name: getattr(record, name) for name in ("subject", "status", "reason", "metrics", "samples")}
    parts |= {"engagement": record.engagement, "provenance": record.provenance}
    return type(record).create(**(parts | changes))


def _subject(record: Any, **changes: Any) -> Any:
    return _remade(record, subject=record.subject.model_copy(update=changes))


def _method(record: Any, **changes: Any) -> Any:
    return _subject(record, method=record.subject.method.model_copy(update=changes))


def _scaled(record: Any, name: str, by: float) -> Any:
    samples = {**record.samples, name: [value * by for value in record.samples[name]]}
    return _remade(record, samples=samples)


def _metric(record: Any, name: str, by: float) -> Any:
    estimate = record.metrics[name]
    return _remade(record, metrics={**record.metrics, name: estimate.model_copy(update={"value": estimate.value + by})})


def _without(record: Any, name: str) -> Any:
    return _remade(
        record,
        metrics={key: value for key, value in record.metrics.items() if key != name},
        samples={key: value for key, value in record.samples.items() if key != name},
    )


def _attack(record: Any, chance: random.Random) -> Any:
    """A record that a gate must not let pass in the place of this one; None: left out."""
    samples = [name for name in ("kld_mean", "delta_nll") if name in record.samples] or ["nll"]
    name = chance.choice(samples)
    worse = chance.uniform(1.6, 20)
    exact = chance.choice(("bits_per_value", "allocated_bits_per_value", "engaged_layers"))
    model = record.subject.model
    attacks: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: _scaled(record, name, worse),
        lambda: _scaled(record, name, -worse if name != "kld_mean" else 1 / (3 * worse)),
        lambda: _remade(record, samples={**record.samples, name: record.samples[name][: chance.randrange(16)]}),
        lambda: _remade(record, samples={**record.samples, name: [*record.samples[name], 0.0]}),
        lambda: _without(record, name),
        lambda: _without(record, exact),
        lambda: _metric(record, exact, chance.choice((-1, 1)) * chance.uniform(1e-9, 2)),
        lambda: _remade(record, status="unsupported", reason="said so", metrics={}, samples={}),
        lambda: _method(record, implementation=f"veloxquant_mlx {chance.randrange(10**9)}"),
        lambda: _method(record, name="turboquant_mse" if record.subject.method.name == "fp16" else "fp16"),
        lambda: _method(record, target=chance.choice((1.0, 3.0, 8.0, None))),
        lambda: _method(record, parameters={"sinks": chance.randrange(1, 9)}),
        lambda: _subject(record, harness=f"{chance.randrange(10**9)}"),
        lambda: _subject(record, suite="memory"),
        lambda: _subject(record, settings={**record.subject.settings, "length": chance.randrange(10**6)}),
        lambda: _subject(record, model=model.model_copy(update={"weights_sha256": f"{chance.random()}"})),
        lambda: _subject(record, model=model.model_copy(update={"name": "another"})),
        lambda: _subject(record, model=model.model_copy(update={"n_layers": chance.randrange(1, 30)})),
        lambda: _remade(
            record,
            provenance=record.provenance.model_copy(
                update={"started": record.provenance.started + timedelta(days=chance.uniform(10, 30_000))}
            ),
        ),
    )
    return chance.choice(attacks)()


def attack_gate(work: Path, chance: random.Random) -> str:
    """One to three records of a run are replaced by well-formed others; the gate must not pass."""
    out = work / "results"
    records = list(written.pristine_run()[0])
    for place in chance.sample(range(len(records)), chance.choice((1, 1, 1, 2, 3))):
        records[place] = _attack(records[place], chance)
    kept = [record for record in records if record is not None]
    keys = [record.key for record in (kept if chance.random() < 0.5 else written.pristine_run()[0])]
    (out / "records.jsonl").write_text("".join(record.to_line() for record in kept))
    (out / "last-run.json").write_text(json.dumps({"keys": keys, "planned": chance.random() < 0.95}))
    if chance.random() < 0.1:
        (out / "last-run.json").unlink()
    return written.judged(out)


# --- kills ----------------------------------------------------------------------------------------------------------


@functools.cache
def _written() -> list[Any]:
    """Eight times the records of a run, under keys of their own."""
    return [_subject(record, protocol=f"{i}") for i in range(8) for record in written.pristine_run()[0]]


def attack_store(work: Path, chance: random.Random) -> str:
    """A writer is killed at a random moment: what it had reported is there, and nothing else; the next one goes on."""
    from veloxbench.records.store import open_store, read_records

    out = work / "killed"
    shutil.rmtree(out, ignore_errors=True)
    records = _written()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), open_store(out) as store:
            store.begin([record.key for record in records])
            os.write(tell, b"b")
            for record in records:
                store.append(record)
                os.write(tell, b"r")
        os._exit(0)
    os.close(tell)
    said = os.read(told, 1)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(told, 1 << 16):
        said += more
    os.close(told)
    reported = said.count(b"r")
    with open_store(out) as store:
        kept = read_records(out)
        if [record.id for record in kept] != [record.id for record in records[: len(kept)]] or len(kept) < reported:
            raise AssertionError(f"{reported} records were reported, {len(kept)} are there")
        if store.get(records[-1].key) is None:
            store.append(records[-1])
    if read_records(out)[-1].id != records[-1].id:
        raise AssertionError("the next run could not go on")
    return "healed"


# --- options --------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[str, ...]] = {
    "run": (
        "--profile",
        "--models",
        "--methods",
        "--targets",
        "--suites",
        "--corpus",
        "--memory-budget",
        "--out",
        "--shard",
        "--scheduler",
    ),
    "gate": ("--records", "--baseline", "--profile", "--tier", "--unknown-machine", "--junit"),
    "report": ("", "--out", "--check"),
    "baseline show": ("--baseline",),
    "baseline verify": ("--baseline",),
    "baseline diff": ("--baseline", "--records", "--profile"),
    "baseline approve": ("--baseline", "--records", "--profile", "--reason"),
    "compare": ("", "", "--repo", "--profile", "--timed", "--model", "--tiers", "--minutes", "--threads", "--seed"),
    "bisect": ("", "", "--subject", "--profile"),
    "recommend": ("--model", "--context", "--memory", "--max-kld", "--min-verdict", "--speed", "--records"),
    "merge": ("", "--out"),
    "verify": ("", "--records", "--model"),
    "submit": ("", "--out"),
    "changes": ("",),
    "models": ("",),
    "corpora": ("",),
    "methods": ("",),
    "trial damages": ("--study", "--profile", "--out", "--check"),
    "trial timing record": ("--out", "--hours", "--core", "--threads", "--model", "--depth", "--steps", "--arm"),
    "trial timing live": ("--out", "--gates", "--slowdown", "--core", "--threads", "--depth", "--steps", "--arm"),
    "trial timing resample": ("", "--out", "--gates", "--live", "--clock", "--canary-drift", "--seed"),
    "trial timing report": ("", "--out", "--check"),
    "trial travelling": ("--record", "--measured", "--study", "--gates", "--out", "--check"),
    "trial instruments": ("--record", "--out", "--check"),
}


class Started(Exception):
    """A command got past its options; what it starts is not part of this attack."""


def _starts(*_: Any, **__: Any) -> Any:
    raise Started


@functools.cache
def _nothing_starts() -> None:
    from veloxbench.compare import revisions
    from veloxbench.run import runner
    from veloxbench.trials import timing_live, timing_record

    runner.Run.__init__ = _starts  # type: ignore[method-assign]
    revisions.prepare = _starts  # type: ignore[assignment]
    timing_live.run_live = _starts  # type: ignore[assignment]
    timing_record.record = _starts  # type: ignore[assignment]


def attack_options(work: Path, chance: random.Random) -> str:
    """A command with odd values: one sentence and a documented exit code, or it starts."""
    from veloxbench.cli import app
    from veloxbench.errors import ExitCode

    _nothing_starts()
    inner = work / "a" / "b" / "c"
    shutil.rmtree(work / "a", ignore_errors=True)
    inner.mkdir(parents=True)
    command, options = chance.choice(list(COMMANDS.items()))
    arguments = command.split()
    for option in chance.sample(options, chance.randint(min(1, len(options)), min(3, len(options)))):
        arguments += [option] * bool(option) + [chance.choice(ODD_WORDS)]
    if "--out" not in arguments and command == "trial timing resample":
        arguments += ["--out", "rates.json"]
    before = Path.cwd()
    os.chdir(inner)
    printed, said = io.StringIO(), io.StringIO()
    started = False
    original = app.app

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal started
        try:
            return original(*args, **options)
        except Started:
            started = True
            return None

    app.app = watched  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            code = app._run(arguments)
    finally:
        app.app = original
        os.chdir(before)
    text = said.getvalue()
    if "defect of veloxbench" in text or "Traceback" in text:
        raise AssertionError(f"{arguments}: {text[-200:]}")
    if code not in set(ExitCode) | {130}:
        raise AssertionError(f"{arguments}: exit {code}")
    return "followed" if started or code == 0 else "refused"
