"""Peers: caches of other projects in environments of their own, through the same protocols; what they are said to do.

The peer of these tests is a package made here, installed from its folder without a network.
"""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import UnfitEnvironmentError, UsageError
from veloxbench.measure.holds import Inventory, held_metrics
from veloxbench.methods import peers
from veloxbench.methods.registry import all_methods, checked
from veloxbench.records.arm import Arm
from veloxbench.records.record import NO_MODEL, MethodRef, Subject, TextRef
from veloxbench.records.store import open_store, read_records
from veloxbench.report.peers import claims, render
from veloxbench.run.apart import Limits, Worker
from veloxbench.run.grid import customise, load_grid, peers_grid
from veloxbench.run.runner import Outcome, Run
from veloxbench.run.worker import Request

BACKEND = """
import zipfile

def build_wheel(folder, settings=None, metadata=None):
    name = "veloxquant_fake-1.2-py3-none-any.whl"
    info = "veloxquant_fake-1.2.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.write("caches.py", "veloxquant_mlx/__init__.py")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: veloxquant-fake\\nVersion: 1.2\\n")
        tag = "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        files = ("veloxquant_mlx/__init__.py", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD")
        wheel.writestr(f"{info}/RECORD", "".join(f"{file},,\\n" for file in files))
    return name
"""
CACHES = '''
"""A peer whose import name is this project's."""
import os

import mlx.core as mx
from mlx_lm.models.cache import KVCache


class Halved(KVCache):
    """Reads bytes, and keeps the fp16 of everything beside them."""

    def __init__(self, scale=16.0):
        super().__init__()
        self.scale, self.codes = scale, []
        self.table = mx.zeros((64, 64), dtype=mx.float32)

    def update_and_fetch(self, keys, values):
        self.codes.append((keys * self.scale).astype(mx.int8))
        keys, values = super().update_and_fetch(keys, values)
        return mx.round(keys * self.scale) / self.scale, values


class Crashing(Halved):
    def update_and_fetch(self, keys, values):
        os.abort()


class Raising(Halved):
    def update_and_fetch(self, keys, values):
        print("what a peer prints does not end in the answers")
        raise RuntimeError("[metal_kernel] No Metal back-end.")
'''
ADAPTER = '''
import importlib
from veloxbench.methods.peers import entry
from veloxbench.methods.registry import plain_caches

@entry(targets=(8, 4))
def halved(context, target, *, scale=0.0):
    """Codes of a peer."""
    theirs = importlib.import_module("veloxquant_mlx")
    return plain_caches(context.model, lambda layer: theirs.Halved(scale or 2.0 ** (target - 4)))
'''
GRID = """
summary = "seconds"
models = ["smollm2-135m"]
corpus = "bundled"
suites = {suites}
arms = {arms}
protocols = [{{ name = "chunked", sequences = 2, length = 64, chunk = 32, score_from = 32 }}]
holds = {{ tokens = 512 }}
throughput = [{{ depth = 32, pairs = 2, steps = 2, prefill_pairs = 1 }}]
memory = {{ tokens = 64, decode_steps = 2, budget_gib = 1.0 }}
"""
NAME = "veloxquant-fake"
ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "records" / "peers" / "smollm2-135m.jsonl"
REQUEST = Request(
    subject=Subject(
        suite="holds",
        protocol="arrays",
        model=NO_MODEL,
        method=MethodRef(name="fp16", implementation=""),
        text=TextRef(name="none", tokens_sha256=""),
        settings={},
        harness="",
        machine_class="",
    ),
    arm=Arm(name="fp16"),
    task={},
    tokens=[],
    tokens_sha256="",
    text="none",
    role="evaluation",
    model={},
    n_layers=None,
    versions={},
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The peer's source: a folder that pip can build without a network."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "caches.py").write_text(CACHES)
    (folder / "adapter.py").write_text(ADAPTER)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    return folder


@pytest.fixture(scope="module")
def peer(package, cut_model):
    """The peer, added to a cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VELOXBENCH_CACHE", str(package / "cache"))
        peers.peer_method.cache_clear()
        yield peers.add(str(package), adapter=str(package / "adapter.py"))
    peers.peer_method.cache_clear()


def run(tmp_path, cut_model, *arms, suites=("perplexity", "holds")):
    grid = tmp_path / "peers.toml"
    grid.write_text(GRID.format(arms=list(arms), suites=list(suites)))
    code = veloxbench(["run", "--profile", str(grid), "--models", str(cut_model), "--out", str(tmp_path / "out")])
    assert code == 0
    return {(r.subject.suite, r.subject.method.label): r for r in read_records(tmp_path / "out")}


def test_a_peer_of_our_import_name_is_measured_in_its_own_environment(peer, cut_model, tmp_path):
    """Its records carry name, version and hash; its classes are its own; this process never saw them.

    One byte of codes and two of fp16 keep keys of 24 bits and values of 16 resident, 20 a value and its tables of
    16 KiB, whatever it calls itself. What crashes or raises is a row with its reason, and the others go on.
    """
    arms = [f"{NAME}/{arm}" for arm in ("halved@4", "veloxquant_mlx.Raising", "veloxquant_mlx.Crashing")]
    records = run(tmp_path, cut_model, *arms)
    quality, holds = (records[suite, arms[0]] for suite in ("perplexity", "holds"))
    assert re.fullmatch(rf"{NAME} 1\.2 [0-9a-f]{{16}}", quality.subject.method.implementation)
    assert {layer.cache_class for layer in quality.engagement} == {"Halved"}
    assert all(layer.engaged for layer in quality.engagement)
    assert quality.metrics["kld_mean"].value > 1e-3
    n_values = 3 * (64 + 64)
    tables = 8 * 64 * 64 * 4 / (512 * n_values)
    assert holds.metrics["bits_per_value"].value == pytest.approx(20 + tables)
    assert holds.metrics["full_width_bits_per_value"].value == 16.0
    assert holds.metrics["constant_bytes"].value == pytest.approx(2 * 64 * 64 * 4)
    # without what does not grow: a line through both points
    assert holds.metrics["long_bits_per_value"].value == pytest.approx(20 + tables * 512 / 32768)
    refused = {arm: {records[suite, arm].reason for suite in ("perplexity", "holds")} for arm in arms[1:]}
    assert all("No Metal back-end" in reason for reason in refused[arms[1]])
    assert all("was killed by SIGABRT" in reason for reason in refused[arms[2]])
    ours = sys.modules["veloxquant_mlx"]
    assert not hasattr(ours, "Halved")
    page = render(list(records.values()))
    assert f"| {NAME}/halved@4 " in page
    assert "No Metal back-end" in page
    assert f"veloxbench peers add {NAME}==1.2" in page


@pytest.mark.parametrize(
    ("code", "limits", "said"),
    [
        ("time.sleep(60)", Limits(seconds=0.5), "stopped after 0.5 s, the limit"),
        (
            "held = b'x' * 2**28; time.sleep(60)",
            Limits(resident=2.0**27),
            "stopped above 0.125 GiB resident, the limit",
        ),
        ("print('this is why', file=sys.stderr); sys.exit(3)", Limits(), "its process ended with 3: this is why"),
    ],
)
def test_a_worker_that_does_not_answer_has_a_reason(code, limits, said):
    """Too long, too much, or gone with its last words; nothing of it is left."""
    start = [sys.executable, "-c", f"import sys, time; sys.stdin.readline(); {code}"]
    worker = Worker("dumb", start, dict(os.environ))
    answer = worker.ask(REQUEST, limits, say=print, tick=lambda _: None)
    assert (answer.reason or "").startswith(said)
    assert not worker.lives
    worker.close()


def test_mlx_lms_own_cache_engages_late_as_its_users_run_it(cut_model, tmp_path):
    """From the first token 4 bits cost 4.5; as ``generate`` runs it, 512 tokens stay at 16 bits.

    It is timed so beside the strict one (a figure from a guess is none): an fp16 prefill, quantized before the steps.
    """
    arms = [f"mlx-lm/{arm}" for arm in ("strict@4", "generate@4", "generate@4:start=1")]
    records = run(tmp_path, cut_model, *arms, suites=["holds", "throughput"])
    for arm in arms:
        assert {"decode_speed_ratio", "prefill_speed_ratio"} <= records["throughput", arm].metrics.keys()
    late = records["throughput", arms[2]]
    assert {layer.cache_class for layer in late.engagement} == {"_LateCache"}
    bits = [records["holds", arm].metrics["bits_per_value"].value for arm in arms]
    assert bits == [4.5, 16.0, 4.5]


def test_what_grows_is_told_from_what_does_not():
    """100 bytes of tables and 2 a token: 8 * 4196 / 2048 bits a value at 2048 tokens, and 16.02 at 32768."""
    half = Inventory({"table": 100, "keys": 2048, "decoded": 0}, frozenset({"keys"}))
    whole = Inventory({"table": 100, "keys": 4096}, frozenset({"keys", "table"}))
    figures = {name: estimate.value for name, estimate in held_metrics(half, whole, 2048, 1).items()}
    assert figures["bits_per_value"] == 8 * 4196 / 2048
    assert figures["long_bits_per_value"] == pytest.approx(8 * (100 + 2 * 32768) / 32768)
    assert figures["constant_bytes"] == 100
    assert figures["full_width_bits_per_value"] == 16.0


def test_arms_of_peers_are_checked_before_anything_is_installed(tmp_path, monkeypatch):
    """An adapter of this package says methods and targets; a peer that nobody added is no method of the registry."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path))
    peers.peer_method.cache_clear()
    assert checked(Arm.parse("mlx-optiq/uniform@4:group_size=64")).label == "mlx-optiq/uniform@4"
    assert checked(Arm.parse("veloxquant-mlx/kivi@2:residual_length=32")).parameters == {"residual_length": 32}
    with pytest.raises(UsageError, match="did you mean"):
        checked(Arm.parse("mlx-optiq/unform@4"))
    with pytest.raises(UsageError, match=r"8, 4, 3, 2"):
        checked(Arm.parse("mlx-optiq/uniform@7"))
    with pytest.raises(UsageError, match="veloxbench peers add nobody"):
        checked(Arm.parse("nobody/cache.Class"))
    with pytest.raises(UsageError, match="veloxbench peers add mlx-optiq"):
        _ = peers.peer_method("mlx-optiq/uniform").implementation()
    assert not any("/" in name for name in all_methods())
    peers.peer_method.cache_clear()


def test_a_requirement_that_pip_cannot_install_leaves_nothing(tmp_path, monkeypatch):
    """Its folder has no pyproject.toml; the message is pip's, and no half of an environment stays."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnfitEnvironmentError, match="pip cannot install"):
        peers.add(str(tmp_path / "empty"))
    assert list((tmp_path / "cache" / "peers").iterdir()) == []


def test_every_claim_is_of_an_arm_of_the_profile():
    """Claims of arms that are not measured would never be shown."""
    assert claims().keys() <= {arm.label for arm in load_grid("peers").arm_list()}


def test_the_published_page_is_what_its_records_say():
    """docs/peers.md has at least twelve configurations of peers, each with its claim or its reason."""
    assert veloxbench(["peers", "report", str(RECORDS), "--check", str(ROOT / "docs" / "peers.md")]) == 0
    assert len({r.subject.method.label for r in read_records(RECORDS) if "/" in r.subject.method.name}) >= 12


def test_run_with_peers_plans_them_on_its_own_model_and_installs_what_is_missing(tmp_path, monkeypatch, capsys):
    """A plan names what pip will be asked for, and a run asks for it, once each, before it measures."""
    asked: list[str] = []
    monkeypatch.setattr(peers, "peers_folder", lambda: tmp_path)
    monkeypatch.setattr(peers, "add", asked.append)
    monkeypatch.setattr(Run, "all", lambda self: Outcome((), 0, 0, 0, ()))
    command = ["run", "--profile", "quick", "--peers", "--out", str(tmp_path / "results")]
    assert veloxbench([*command, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "holds/arrays" in planned
    assert "veloxquant-mlx==0.94.15" in planned
    assert not asked
    beside = peers_grid(customise(load_grid("quick"), models=["gemma3-270m"]))
    assert beside.models == ("gemma3-270m",)
    cut = load_grid("quick").model_copy(update={"n_layers": 2, "part": "calibration"})
    assert (peers_grid(cut).n_layers, peers_grid(cut).part) == (2, "calibration")  # one model and text is measured
    assert {"mlx-lm/strict@4", "veloxquant-mlx/kivi@2"} <= {arm.label for arm in beside.arm_list()}
    assert veloxbench(command) == 0
    assert asked == list(beside.peers)


def test_a_run_measures_both_grids_each_cell_once(tmp_path, monkeypatch):
    """Cells that a profile and the one beside it have in common are planned once."""
    handle = SimpleNamespace(name="m")
    of = {"one": ["a", "b"], "two": ["b", "c"]}
    monkeypatch.setattr("veloxbench.run.runner.resolve_model", lambda *args, **options: handle)

    def planned(grid, *_):
        return [SimpleNamespace(subject=SimpleNamespace(key=key)) for key in of[grid.summary]]

    monkeypatch.setattr("veloxbench.run.runner.plan_model", planned)
    one, two = (load_grid("quick").model_copy(update={"summary": name}) for name in of)
    with open_store(tmp_path) as store, Run(one, store, None, None, beside=two) as carried:
        carried.plan("m")
        assert carried.keys == ("a", "b", "c")
