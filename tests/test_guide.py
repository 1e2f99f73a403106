"""docs/guide.md: its code runs in the order in which it stands, and its figures are those of the records."""

import re
from pathlib import Path

import pytest

from veloxbench.errors import UsageError
from veloxbench.methods.ratequant import RECIPES, Recipe
from veloxbench.report.guide import BLOCK, PAGES, TABLES, Sources, candidates, fill

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)

FOR_A_SMALL_MODEL = {
    "mlx-community/Llama-3.2-3B-Instruct-4bit": None,
    "num_samples=32": "num_samples=2, seq_len=64, quiet=True",
    "num_samples=16": "num_samples=2, quiet=True",
    "range(32)": "range(2)",
    "range(8, 17)": "range(1, 2)",
    "prompt_cache=cache)": "prompt_cache=cache, max_tokens=8)",
}
"""What stands in the snippets, and what the test puts in its place; nothing for a folder in place of the model."""


def test_the_code_of_the_guide_runs(cut_model):
    """Every snippet, one after the other in one session, as a reader would type them.

    On two layers of the default model, with two short calibration sequences and eight generated tokens: that it runs
    is what is said here. ``impl/test_ratequant_examples.py`` runs such code on all layers and looks at what it gives.
    """
    session: dict[str, object] = {}
    source = "\n".join(SNIPPETS)
    for shown, run in FOR_A_SMALL_MODEL.items():
        assert shown in source
        source = source.replace(shown, run or str(cut_model))
    exec(compile(source, "docs/guide.md", "exec"), session)
    assert session["bit_allocation"]
    # each layer saw the prompt; among 153 tokens of two layers no key is an outlier, on all layers some are
    assert [row.token_count > 100 for row in session["report"].layers] == [True, True]
    assert {row.code_bits for row in session["quantizer"].observer.report().rows} == {4}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_figures_are_those_of_the_records(page):
    """``python -m veloxbench.report.guide`` would change nothing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text, Sources.read(ROOT / "records")) == text


def test_every_table_is_used():
    """No block is written for a page that does not exist."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert {name for _, name, _ in BLOCK.findall(text)} == set(TABLES)


def test_a_figure_changed_by_hand_is_found():
    """One digit of a table altered is not what the records say."""
    altered = re.sub(r"(<!-- figures: allocation -->.*?)\d", r"\g<1>x", GUIDE, count=1, flags=re.DOTALL)
    assert altered != GUIDE
    assert fill(altered, Sources.read(ROOT / "records")) == GUIDE


def test_the_registry_keeps_the_recipes_that_won_on_calibration_text():
    """For each target, the form of least KLD in the records of ``ratequant-recipes`` is the registry's."""
    found = candidates(Sources.read(ROOT / "records").records)
    assert set(found) == set(RECIPES)
    for target, (best, *others) in found.items():
        assert others
        chosen = {name: value for name, value in best.subject.method.parameters.items() if name != "at_tokens"}
        assert Recipe(**chosen) == RECIPES[target]


def test_an_unknown_block_is_named():
    """A typing error in a marker is an error with the known names."""
    with pytest.raises(UsageError, match="no figures are called 'claim'; known: claims"):
        fill("<!-- figures: claim -->\n<!-- end -->", Sources([], []))
