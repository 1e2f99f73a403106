"""Grids: what a TOML file unfolds into."""

from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from veloxbench.errors import UsageError
from veloxbench.inputs.corpora import Text
from veloxbench.inputs.models import ModelHandle
from veloxbench.run.grid import customise, load_grid, parse_grid
from veloxbench.run.plan import cells, measurements, measurements_without_model
from veloxbench.run.session import measure

GRID = """
summary = "lists"
models = ["smollm2-135m"]
corpus = "wikitext-2"
part = "calibration"
suites = ["perplexity"]
throughput = []
arms = [{ method = "ratequant", targets = [2, 1.5], parameters = { unit = "head", shuffle = [1, 2, 3] } }]
protocols = [{ name = "chunked", sequences = 2, length = 96 }]
memory = { tokens = 64, decode_steps = 2, budget_gib = 1.0 }
"""


def test_a_list_of_parameters_is_measured_at_each_value():
    """Two targets and three seeds are six arms; what is no list is the same in all of them."""
    arms = parse_grid(GRID, "test").arm_list()
    assert [(arm.target, arm.parameters["shuffle"]) for arm in arms] == [(t, s) for t in (2.0, 1.5) for s in (1, 2, 3)]
    assert {arm.parameters["unit"] for arm in arms} == {"head"}


@pytest.mark.parametrize("file", [f.name for f in (resources.files("veloxbench.run") / "grids").iterdir()])
def test_every_profile_names_arms_that_exist(file):
    """Methods, parameters and targets of each grid of the package are known."""
    assert load_grid(file.removesuffix(".toml")).arm_list()


def test_the_ratequant_profile_has_twenty_shuffles_of_each_allocation_that_it_decides():
    """At 3, 2 and 1.5 bits every allocation has itself, twenty shuffles, and rivals that cost more."""
    arms = load_grid("ratequant").arm_list()
    for target in (3.0, 2.0, 1.5):
        ours = [arm.parameters for arm in arms if arm.name == "ratequant" and arm.target == target]
        plain, *shuffles = ours
        assert [s["shuffle"] for s in shuffles] == list(range(1, 21))
        assert all({k: v for k, v in s.items() if k != "shuffle"} == plain for s in shuffles)
    assert {arm.name for arm in arms} >= {"turboquant_mse", "turboquant_static"}


@pytest.mark.parametrize(
    "choice",
    [
        {"methods": ["mlx-affine"], "targets": [4, 4.0]},
        {"methods": ["mlx-affine", "mlx-affine:group_size=64"], "targets": [4]},
    ],
)
def test_an_arm_named_twice_is_measured_once(choice):
    """A target typed twice, or mlx-affine's default group size (64) typed out, is one measurement."""
    assert [cell.arm.label for cell in cells(customise(parse_grid(GRID, "test"), **choice))] == ["fp16", "mlx-affine@4"]


def test_targets_alone_keep_the_profiles_parameters():
    """``--profile full --targets 4`` still measures groups of 32."""
    arms = customise(load_grid("full"), targets=[4]).arm_list()
    assert [arm.label for arm in arms] == ["mlx-affine@4", "mlx-affine@4:group_size=32", "turboquant_mse@4"]


class Bytes:
    """A tokenizer of one token per character."""

    bos_token_id = None

    def encode(self, text: str, **_: bool) -> list[int]:
        return list(text.encode())


def handle(context: int, directory: Path) -> ModelHandle:
    """A model that nothing reads."""
    return ModelHandle("m", directory, "w", "t", "c", None, "test", context)


def test_a_window_as_long_as_the_context_fits(tmp_path):
    """96 tokens are fed of a window of 96 and its last target: a context of 96 holds them, one of 95 does not."""
    grid, text = parse_grid(GRID, "test"), Text("t", "evaluation", ("word " * 200,), None, "test")
    assert len(list(measurements(grid, handle(96, tmp_path), text, Bytes()))) == 7
    with pytest.raises(UsageError, match="needs 96 tokens of context, m has 95"):
        list(measurements(grid, handle(95, tmp_path), text, Bytes()))


def test_a_suite_that_needs_no_model_is_not_asked_of_one():
    """Beside suites that read a model the exact suite's arms are no methods to be probed on it: ``cache`` is none."""
    grid = parse_grid(GRID.replace('suites = ["perplexity"]', 'suites = ["exact", "perplexity"]'), "test")
    planned = list(measurements_without_model(customise(grid, suites=["exact"])))
    item = next(item for item in planned if item.cell.arm.name == "cache")
    assert measure(item, SimpleNamespace(), lambda _: None).status == "measured"
