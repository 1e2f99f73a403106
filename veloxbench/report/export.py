"""Records in the forms that other programs read: flat rows (CSV, JSON, Parquet), LaTeX tables, JUnit."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from veloxbench.errors import unknown_name
from veloxbench.records.journal import encoded
from veloxbench.records.record import Estimate, FailedMeasurement, Record
from veloxbench.records.selection import newest_per_row, table_rows
from veloxbench.report.cells import Column, figure, memory_ratio, method, verdict
from veloxbench.report.model_card import perplexity_blocks
from veloxbench.report.page import by_model, method_names, paretos, render
from veloxbench.report.tables import quality_groups

Records = Sequence[Record]
Failures = Sequence[FailedMeasurement]


def flat_rows(records: Records) -> Iterator[dict[str, Any]]:
    """One row for each metric of each record, of the same columns for every suite.

    ``value``, ``low`` and ``high`` are None where a configuration is not supported, and ``reason`` says why.
    ``settings`` and ``parameters`` are JSON text, so that a column has one type whatever the suite or method.
    """
    for record in records:
        subject, made = record.subject, record.provenance
        shared = {
            "record": record.id,
            "key": record.key,
            "model": subject.model.name,
            "weights_sha256": subject.model.weights_sha256,
            "n_layers": subject.model.n_layers,
            "suite": subject.suite,
            "protocol": subject.protocol,
            "settings": json.dumps(subject.settings, sort_keys=True),
            "text": subject.text.name,
            "tokens_sha256": subject.text.tokens_sha256,
            "arm": subject.method.label,
            "method": subject.method.name,
            "target": subject.method.target,
            "target_means": subject.method.target_means,
            "parameters": json.dumps(subject.method.parameters, sort_keys=True),
            "implementation": subject.method.implementation,
            "status": record.status,
            "reason": record.reason,
        }
        last = {
            "started": made.started.isoformat(),
            "commit": made.commit,
            "dirty": made.dirty,
            "chip": made.hardware.get("chip"),
            "device": made.hardware.get("device"),
            "mlx": made.versions.get("mlx"),
            "mlx_lm": made.versions.get("mlx-lm"),
        }
        for name, estimate in record.metrics.items() or [("", None)]:
            fields = dict.fromkeys(Estimate.model_fields) if estimate is None else estimate.model_dump()
            yield {**shared, "metric": name or None, **fields, **last}


def as_csv(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    """The flat rows, with a header; what crashed has no figures and is left out."""
    rows = list(flat_rows(records))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0] if rows else ["record"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def as_json(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    """The records as they are, with raw samples, and what crashed."""
    content = {
        "records": [record.model_dump(mode="json") for record in records],
        "failures": [failure.model_dump(mode="json") for failure in failures],
    }
    return (json.dumps(content, indent=1) + "\n").encode("utf-8", "backslashreplace")


_COLUMN_TYPES = {"n_layers": "int64", "dirty": "bool_"} | dict.fromkeys(("target", "value", "low", "high"), "float64")
"""Types in Parquet that are no text."""


def as_parquet(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    """The flat rows, with the same types whatever the records: ``datasets.load_dataset("parquet", ...)`` reads them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(flat_rows(records))
    columns = {
        name: pa.array([row[name] for row in rows], getattr(pa, _COLUMN_TYPES.get(name, "string"))())
        for name in (rows[0] if rows else ["record"])
    }
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


LATEX_COLUMNS: tuple[Column, ...] = (
    ("method", method),
    ("bits/value", figure("bits_per_value", "{:.3f}")),
    ("memory", memory_ratio),
    ("ΔPPL", figure("delta_ppl")),
    ("KLD", figure("kld_mean")),
    ("top-1", figure("top1_agreement")),
    ("verdict", verdict),
)


def as_latex(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    """A ``tabular`` of quality for each model, protocol and text, with ``booktabs`` rules; a comment says of what."""
    parts = ["% \\usepackage{booktabs}; written by `veloxbench report --format latex`"]
    for model, of_model in by_model(table_rows(records)).items():
        for title, rows in quality_groups(of_model).items():
            body = [[cell(record) for _, cell in LATEX_COLUMNS] for record in rows]
            header = [name for name, _ in LATEX_COLUMNS]
            table = tabulate(body, header, tablefmt="latex_booktabs", disable_numparse=True)
            table = table.replace("±", "$\\pm$").replace("Δ", "$\\Delta$")
            parts.append(f"% {model}, {title}\n{table}".replace("\r", " "))
    return ("\n\n".join(parts) + "\n").encode("utf-8", "backslashreplace")


def as_junit(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    """A test case for each record: one that is not supported is skipped, one that crashed is an error."""
    skipped = sum(record.status == "unsupported" for record in records)
    counts = {"tests": len(records) + len(failures), "failures": 0, "errors": len(failures), "skipped": skipped}
    suite = ET.Element("testsuite", {"name": "veloxbench", **{name: str(count) for name, count in counts.items()}})
    measured: list[Record | FailedMeasurement] = [*records, *failures]
    for each in measured:
        subject = each.subject
        name = f"{subject.model.name} {subject.method.label}"
        case = ET.SubElement(suite, "testcase", classname=f"{subject.suite}/{subject.protocol}", name=name)
        if isinstance(each, FailedMeasurement):
            ET.SubElement(case, "error", message=each.reason)
            continue
        case.set("time", f"{each.provenance.seconds:.3f}")
        if each.status == "unsupported":
            ET.SubElement(case, "skipped", message=each.reason or "")
            continue
        properties = ET.SubElement(case, "properties")
        for metric, estimate in each.metrics.items():
            ET.SubElement(properties, "property", name=metric, value=repr(estimate.value))
    ET.indent(suite)
    text: bytes = ET.tostring(suite, "utf-8")
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + text + b"\n"


def _as_markdown(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    return encoded(render(records, failures, others, drawn=False))


def _as_html(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    from veloxbench.report.html import render_html

    return encoded(render_html(records, failures, others))


def _picture(records: Records) -> Any:
    """The models' charts side by side."""
    import altair as alt

    newest = newest_per_row(records)
    drawn = paretos(newest, method_names(newest))
    return alt.hconcat(*drawn.values()) if drawn else alt.Chart(alt.InlineData(values=[])).mark_point()


def as_svg(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    """The charts as one picture in vectors, for a light page."""
    from veloxbench.report.charts import svg

    return encoded(svg(_picture(records)))


def as_png(records: Records, failures: Failures = (), others: int = 0) -> bytes:
    """The charts as one picture in pixels, for a light page."""
    from veloxbench.report.charts import png

    return png(_picture(records))


BINARY = ("parquet", "png")
"""Forms that are no text."""

FORMATS: Mapping[str, Callable[[Records, Failures, int], bytes]] = {
    "md": _as_markdown,
    "html": _as_html,
    "csv": as_csv,
    "json": as_json,
    "parquet": as_parquet,
    "latex": as_latex,
    "junit": as_junit,
    "svg": as_svg,
    "png": as_png,
    "llama": lambda records, failures, others: encoded(perplexity_blocks(records)),
}
"""What writes a report in each form, from records, failures and the number of older records that were left out."""

SUFFIXES: Mapping[str, str] = {
    "": "md",
    ".md": "md",
    ".markdown": "md",
    ".html": "html",
    ".htm": "html",
    ".csv": "csv",
    ".json": "json",
    ".parquet": "parquet",
    ".tex": "latex",
    ".xml": "junit",
    ".svg": "svg",
    ".png": "png",
}
"""The form that a file's name asks for."""


def format_of(name: str | None, suffix: str) -> str:
    """The form that an option names, or else a file's suffix.

    Raises:
        UsageError: an unknown one; names those that there are.
    """
    if name is not None:
        if name not in FORMATS:
            raise unknown_name("--format", name, FORMATS)
        return name
    if suffix.lower() not in SUFFIXES:
        raise unknown_name("suffix of a report", suffix, filter(None, SUFFIXES))
    return SUFFIXES[suffix.lower()]
