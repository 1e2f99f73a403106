"""The cells of tables: a record's figures as text, with as many digits as their intervals deserve, and the pipe table.

A column is a heading with a function that writes a record's cell; a cell that is empty in all rows takes its column
away.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from veloxbench.errors import printable
from veloxbench.records.frozen import Frozen
from veloxbench.records.intervals import MIN_RATIO_PAIRS
from veloxbench.records.quality_words import quality_word
from veloxbench.records.record import Estimate, Record
from veloxbench.report.recommend import Footprint

Cell = Callable[[Record], str]
Column = tuple[str, Cell]


_MARKUP = re.compile(r"[&<|`*\[\]\\~$]|(?<!\w)_|_(?!\w)")


@functools.lru_cache(1 << 16)
def markdown_text(text: str) -> str:
    """A text of somebody's as Markdown that shows it: it makes no cell, heading, link, image or tag, and no formula.

    Its special characters become entities, which no table takes for the end of a cell.
    """
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", printable(text))


def in_markdown(value: Any) -> Any:
    """A record (or a part of one) with every text in it as :func:`markdown_text`, for pages."""
    if isinstance(value, str):
        text = markdown_text(value)
        return value if text == value else text
    if isinstance(value, Frozen):
        changed = _changed(vars(value))
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, dict):
        changed = _changed(value)
        if not changed and all(markdown_text(name) == name for name in value):
            return value
        return {markdown_text(name): changed.get(name, part) for name, part in value.items()}
    if isinstance(value, list) and value and not isinstance(value[0], float):
        texts = [in_markdown(part) for part in value]
        return value if texts == value else texts
    return value


def _changed(parts: dict[str, Any]) -> dict[str, Any]:
    """Those parts that are another text as Markdown; most of what a record holds are numbers."""
    return {
        name: new
        for name, part in parts.items()
        if type(part) not in _NUMBERS and (new := in_markdown(part)) is not part
    }


_NUMBERS = frozenset((float, int, bool, type(None)))


def pipe_table(header: Sequence[str], body: Sequence[Sequence[str]], aligned: Sequence[str] | None = None) -> str:
    """A Markdown table of texts as they are, each column as wide as its widest cell.

    Args:
        header: of each column.
        body: rows of cells.
        aligned: ``left`` or ``right`` for each column; all left where it is absent.
    """
    sides = [str.rjust if side == "right" and body else str.ljust for side in aligned or ["left"] * len(header)]
    rows = [header, *([cell.strip() for cell in row] for row in body)]
    widths = [max(len(column[0]) + 2, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(side(c, width) for side, c, width in zip(sides, row, widths, strict=True)) for row in rows]
    mark = ":" if body else "-"
    rules = [
        "-" * (width + 1) + mark if side is str.rjust else mark + "-" * (width + 1)
        for side, width in zip(sides, widths, strict=True)
    ]
    return "\n".join([f"| {lines[0]} |", f"|{'|'.join(rules)}|", *(f"| {line} |" for line in lines[1:])])


def record_table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    """A table of records; where they come from several machines, each row says from which.

    The reason of a record that is not supported stands in its first empty cell.
    """
    if len({machine(record) for record in rows}) > 1:
        columns = [*columns, ("machine", machine)]
    body = []
    for record in rows:
        cells = [cell(record) for _, cell in columns]
        if record.status == "unsupported":
            first_empty = next((i for i, cell in enumerate(cells) if not cell), len(cells) - 1)
            cells[first_empty] = record.reason or "not supported"
        body.append(cells)
    kept = [i for i in range(len(columns)) if any(row[i] for row in body)]
    header = [columns[i][0] for i in kept]
    aligned = ["left" if name == "method" else "right" for name in header]
    return pipe_table(header, [[row[i] for i in kept] for row in body], aligned)


def figure(name: str, form: str | None = None, *, plain: bool = False) -> Cell:
    """A metric with its interval (``plain`` leaves the interval to the record)."""

    def cell(record: Record) -> str:
        estimate = record.metrics.get(name)
        return "" if estimate is None else format_estimate(estimate, form, plain=plain)

    return cell


def ratio(name: str) -> Cell:
    """A ratio of paired timings, or its bare value with the number of pairs where they are too few for an interval."""

    def cell(record: Record) -> str:
        if name not in record.metrics:
            return ""
        estimate, pairs = paired_ratio(record, name)
        if estimate.low is None:
            return f"{significant(estimate.value)} (n={pairs})"
        return format_estimate(estimate)

    return cell


def scaled(name: str, divisor: float, form: str) -> Cell:
    """A metric in a larger unit, without its interval."""

    def cell(record: Record) -> str:
        estimate = record.metrics.get(name)
        return "" if estimate is None else form.format(estimate.value / divisor)

    return cell


def megabytes(name: str, form: str = "{:.2f}") -> Cell:
    """A metric in bytes, as MB."""
    return scaled(name, 1e6, form)


def method(record: Record) -> str:
    """The method with its target and parameters."""
    return record.subject.method.label


def method_alone(record: Record) -> str:
    """The method with its parameters, the target left out."""
    return record.subject.method.at_any_target.label


def target(record: Record) -> str:
    """The target, marked ≤ where it is an upper limit."""
    of_method = record.subject.method
    if of_method.target is None:
        return ""
    return f"{'≤ ' if of_method.target_means == 'bits_per_value' else ''}{of_method.target:g}"


def memory_ratio(record: Record) -> str:
    """How many times fewer bits are held than in fp16."""
    bits = record.metrics.get("bits_per_value")
    return "" if bits is None else f"{16 / bits.value:.2f}x"


def verdict(record: Record) -> str:
    """The word that the record's loss of quality earns."""
    word = quality_word(record.metrics)
    return "" if word is None else word.word


def all_in(tokens: int) -> Cell:
    """Bits a value of the caches of one sequence of ``tokens`` tokens, static tables counted."""

    def cell(record: Record) -> str:
        if "static_bytes" not in record.metrics or not record.engagement:
            return ""
        return f"{Footprint(record).bits(tokens):.3f}"

    return cell


def hardware_name(record: Record) -> str:
    """What a reader would call another machine (:data:`veloxbench.records.store.MACHINE`)."""
    hardware = record.provenance.hardware
    facts = [hardware["chip"], f"{hardware['physical_cores']} cores", hardware.get("device"), hardware.get("blas")]
    return ", ".join(str(fact) for fact in facts if fact)


def machine(record: Record) -> str:
    """A record's :func:`hardware_name`, and the library there."""
    versions = record.provenance.versions
    return hardware_name(record) + (f", mlx {versions['mlx']}" if "mlx" in versions else "")


def paired_ratio(record: Record, name: str) -> tuple[Estimate, int]:
    """A ratio of paired timings with its number of pairs, and without an interval where they are too few for one."""
    estimate = record.metrics[name]
    pairs = len(record.samples[f"{name.removesuffix('_ratio').removesuffix('_speed')}_arm"])
    if pairs < MIN_RATIO_PAIRS:  # records from before that rule carry one
        estimate = Estimate(value=estimate.value, unit=estimate.unit)
    return estimate, pairs


def format_estimate(estimate: Estimate, form: str | None = None, *, plain: bool = False) -> str:
    """``0.127 ± 0.012``, or ``3.7 [3.1, 4.4]`` where the interval is not symmetric; digits follow the interval."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if form is not None:
        return form.format(value)
    if plain or low is None or high is None:
        return significant(value)
    half = (high - low) / 2
    if half == 0:
        return significant(value)
    decimals = _decimals(half)
    if abs((high - value) - (value - low)) < 0.1 * half:
        return f"{value:.{decimals}f} ± {half:.{decimals}f}"
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _decimals(uncertainty: float) -> int:
    """Decimals that show two digits of the uncertainty."""
    return max(0, 1 - int(f"{uncertainty:e}".split("e")[1]))


def significant(value: float) -> str:
    """Three significant digits."""
    if value == 0:
        return "0"
    exponent = int(f"{value:e}".split("e")[1])
    return f"{value:.{max(0, 2 - exponent)}f}" if exponent >= -5 else f"{value:.2e}"
