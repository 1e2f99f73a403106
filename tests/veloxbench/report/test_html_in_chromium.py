"""The HTML page in a real browser: it draws, answers, fits every screen, and axe-core finds nothing serious."""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright

from veloxbench.records.record import Record
from veloxbench.records.store import read_records
from veloxbench.report.html import render_html

ROOT = Path(__file__).parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("VELOXBENCH_REQUIRE_CHROMIUM") == "1"
pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="there is no Chromium here")
GITHUB = (
    "body{font:16px/1.5 'Liberation Sans',sans-serif;width:1012px;margin:0} th,td{padding:6px 13px;border:1px solid}"
)
"""GitHub's page as far as the width of a table goes: its column, type size and padding."""


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM is not None, "VELOXBENCH_REQUIRE_CHROMIUM=1, and there is no Chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def with_other_code(record: Record, days: int) -> Record:
    """The same measurement days later, of other code: its KLD is half as large again on the second day."""
    made = record.provenance.model_copy(
        update={"started": record.provenance.started + timedelta(days=days), "commit": f"{days:012x}" + "0" * 28}
    )
    subject = record.subject.model_copy(update={"harness": f"{days}"})
    kld = [value * (1.5 if days == 2 else 1.0) for value in record.samples["kld_mean"]]
    kept = {name: getattr(record, name) for name in ("status", "metrics", "engagement")}
    return Record.create(subject=subject, provenance=made, samples={**record.samples, "kld_mean": kld}, **kept)


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The page of two models, opened as a file on a phone; what the console says is kept."""
    names = ("gemma3-270m", "smollm2-135m-fisher")
    file = tmp_path_factory.mktemp("page") / "page.html"
    records = [record for name in names for record in read_records(ROOT / "records" / f"{name}.jsonl")]
    later = [with_other_code(record, days) for days in (1, 2) for record in records if "kld_mean" in record.samples]
    file.write_text(render_html([*records, *later]), encoding="utf-8")
    opened = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light")
    opened.said = []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or opened.said.append(r.url))
    opened.goto(file.as_uri())
    opened.wait_for_selector("html[data-drawn]", timeout=120_000)
    return opened


def columns(page) -> dict[str, list[str]]:
    """Texts of the leaderboard's visible rows by heading."""
    lines = page.evaluate(
        "[...document.querySelectorAll('.board tr')].filter(l => !l.hidden)"
        ".map(l => [...l.cells].map(c => c.textContent))"
    )
    return dict(zip(lines[0], map(list, zip(*lines[1:], strict=True)), strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen_and_draws_within_the_first(page, scheme):
    """390 to 1920 px wide: nothing scrolls sideways but tables in their frames, and the first chart is in sight."""
    page.emulate_media(color_scheme=scheme)
    for width, height in ((390, 844), (1440, 900), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("draw()")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator(".pareto canvas").first.bounding_box()
        assert box["y"] + box["height"] <= height
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_changes_stand_below_the_histories(page):
    """Rows of 16 sequences have a marked second day; the table scrolls in its frame and has a command to type."""
    table = page.locator("#changes ~ .table table")
    assert table.locator("tbody tr").count() > 0
    command = table.locator("code").first.inner_text()
    assert command.startswith("veloxbench bisect 000000000001 000000000002 --subject ")
    marks = page.evaluate("specs.map(s => JSON.stringify(s)).filter(s => s.includes('since 0000')).length")
    assert marks >= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, scheme):
    """On a phone, in both schemes: no violation of serious or critical impact."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    found = Axe().run(page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


def test_the_controls_answer_from_the_keyboard(page):
    """The slider moves every size, memory says what fits, a heading sorts, a box hides a method."""
    page.focus("#step")
    page.keyboard.press("Home")
    small = columns(page)
    page.keyboard.press("End")
    large = columns(page)
    assert (page.locator("#tokens").inner_text(), large["fits"][0]) == ("131,072 tokens", "")
    affine = small["cache"].index("mlx-affine@4")
    assert float(large["bits at context"][affine]) < 5 < float(small["bits at context"][affine])
    page.fill("#memory", "1.2")
    assert set(columns(page)["fits"]) == {"no", ""}  # fisher_klt has no memory record: nothing is said
    page.focus("#step")
    page.keyboard.press("Home")
    assert set(columns(page)["fits"]) == {"yes", ""}
    assert page.locator("#fits").inner_text().startswith("Of what fits 1.2 GB at 512 tokens, this loses least. gemma")
    page.focus(".board th:nth-child(4) button")
    page.keyboard.press("Enter")
    klds = [float(text.split()[0]) for text in columns(page)["KLD"] if text]
    assert klds == sorted(klds)
    page.uncheck("[name=method][value=mlx-affine]")
    assert "mlx-affine@4" not in columns(page)["cache"]


def test_the_console_is_silent(page):
    """No error and no warning, and no request to anywhere, after all that."""
    assert page.said == []


def test_no_table_is_wider_than_githubs_page(browser):
    """The committed page's tables fit into 1012 px as they stand."""
    body = MarkdownIt("commonmark").enable("table").render((ROOT / "BENCHMARK_RESULTS.md").read_text(encoding="utf-8"))
    shown = browser.new_page(viewport={"width": 1100, "height": 900})
    shown.set_content(f"<style>{GITHUB}</style>{body}")
    widths = shown.evaluate("[...document.querySelectorAll('table')].map(t => t.scrollWidth)")
    assert widths
    assert max(widths) <= 1012
