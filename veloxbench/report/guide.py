"""The figures of hand-written pages, between markers, from records: ``python -m veloxbench.report.guide``.

A block starts with ``<!-- figures: NAME -->`` and ends with ``<!-- end -->``; what stands between is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veloxbench.errors import UsageError
from veloxbench.records.intervals import mean_interval
from veloxbench.records.quality_words import WORDS
from veloxbench.records.record import Record
from veloxbench.records.selection import is_control, newest_per_row, table_rows
from veloxbench.records.store import read_records
from veloxbench.report.allocation import METHOD, comparisons
from veloxbench.report.cells import format_estimate, pipe_table
from veloxbench.report.points import BEST, QUOTED, points
from veloxbench.report.tables import GUIDE_CLAIMS, quality_groups

CALIBRATED = "fisher_klt"

BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SENSITIVITY = "sensitivity.json"
README_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Sources:
    """What figures come from: records, and what ``examples/sensitivity_by_depth.py`` measured of each model."""

    records: Sequence[Record]
    depth: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Sources:
        """A folder's records and, where it has that file, what was measured by depth."""
        return cls(read_records(folder), cls.read_depth(folder))

    @staticmethod
    def read_depth(folder: Path) -> list[Mapping[str, Any]]:
        """What was measured by depth, where the folder has it."""
        file = folder / SENSITIVITY
        return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


def fill(page: str, sources: Sources) -> str:
    """The page with every block of figures written anew.

    Raises:
        UsageError: a block that nothing here writes.
    """

    def write(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise UsageError(f"no figures are called {match[2]!r}; known: {', '.join(TABLES)}")
        known = sources.depth or match[2] not in OF_DEPTH
        return f"{match[1]}{TABLES[match[2]](sources) if known else NOT_MEASURED}\n{match[3]}"

    return BLOCK.sub(write, page)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return pipe_table(header, body, ["left"] + ["right"] * (len(header) - 1))


def _texts(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Quality records of each text on which RateQuant was shuffled."""
    return {
        group[0].subject.text.name: group
        for group in quality_groups(newest_per_row(records)).values()
        if any(is_control(record) for record in group)
    }


def _claims(sources: Sources) -> str:
    """The original guide's table beside what was measured, of the allocator that it speaks of and of fisher_klt."""
    texts = _texts(sources.records)
    calibrated = [record for record in newest_per_row(sources.records) if record.subject.method.name == CALIBRATED]
    body = []
    for target, claim in GUIDE_CLAIMS.items():
        rows = [_plain(group, target) for group in texts.values()]
        own = [r for r in calibrated if r.subject.method.target == target and not r.subject.method.parameters]
        bits = [
            next(r for r in some if "bits_per_value" in r.metrics).metrics["bits_per_value"].value
            for some in (rows, [r for r in own if r.subject.suite == "memory"])
        ]
        change = next(r.metrics["delta_ppl"] for r in own if "delta_ppl" in r.metrics)
        body.append(
            [
                f"{target:g}",
                claim.memory,
                *(f"{16 / held:.2f}x" for held in bits),
                claim.delta_ppl,
                *(format_estimate(row.metrics["delta_ppl"]) for row in rows),
                format_estimate(change),
            ]
        )
    header = ("target", "memory: claimed", METHOD, CALIBRATED, "ΔPPL: claimed", *(f"{METHOD}, {t}" for t in texts))
    return _table((*header, f"{CALIBRATED}, wikitext-2"), body)


def _plain(group: Sequence[Record], target: float) -> Record:
    return next(r for r in table_rows(group) if r.subject.method.name == METHOD and r.subject.method.target == target)


def _allocation(sources: Sources) -> str:
    """Every verdict on RateQuant's allocations in the chunked protocol, on evaluation text."""
    groups = [
        group
        for group in quality_groups(newest_per_row(sources.records)).values()
        if group[0].subject.protocol == "chunked" and not _is_calibration(group[0])
    ]
    body = [
        [
            f"{c.record.subject.text.name}, {c.record.subject.method.target:g}",
            f"{c.record.subject.settings['sequences']}",
            f"{c.record.metrics['kld_mean'].value:.3f}",
            c.rival,
            f"{c.rival_bits:.3f}",
            f"{c.rival_kld:.3f}",
            format_estimate(c.worse_by),
            c.verdict.split()[0],
        ]
        for group in groups
        for c in comparisons(group)
    ]
    header = ("text, target", "sequences", "KLD", "against", "its bits/value", "its KLD", "worse by", "RateQuant is")
    return _table(header, body)


def _is_calibration(record: Record) -> bool:
    return record.subject.text.name.endswith("(calibration)")


def candidates(records: Sequence[Record]) -> dict[float, list[Record]]:
    """RateQuant's forms measured on calibration text, by target, best first."""
    by_target: dict[float, list[Record]] = {}
    for record in table_rows(records):
        subject = record.subject
        if subject.method.name == METHOD and _is_calibration(record):
            by_target.setdefault(subject.method.target or 0.0, []).append(record)
    ordered = {target: sorted(rows, key=lambda r: r.metrics["kld_mean"].value) for target, rows in by_target.items()}
    return dict(sorted(ordered.items(), reverse=True))


def _recipes(sources: Sources) -> str:
    """Every form of RateQuant beside the others on calibration text."""
    forms_of = candidates(sources.records)
    forms: dict[str, dict[float, str]] = {}
    for target, rows in forms_of.items():
        for record in rows:
            parameters = {"weighting": "coherent", "refined_at": 0, "trust": 1.0, **record.subject.method.parameters}
            form = "{base}, {unit}, {sinks} sinks, from {min_bits} bits, {weighting}".format(**parameters)
            form += (
                f", corrected at {parameters['refined_at']} bits ({parameters['trust']:g})"
                if parameters["refined_at"]
                else ""
            )
            cell = f"{record.metrics['kld_mean'].value:.3f}"
            forms.setdefault(form, {})[target] = f"**{cell}**" if record is rows[0] else cell
    body = [[form, *(cells.get(target, "") for target in forms_of)] for form, cells in forms.items()]
    return _table(("base, unit, sinks, widths, forecast", *(f"KLD at {target:g}" for target in forms_of)), body)


def _bands(sources: Sources) -> str:
    """KLD per layer of each band at 2 bits, and the layers that would lose most."""
    body = []
    for entry in sources.depth:
        cells = []
        for band in entry["divergence"].values():
            per_layer = np.array(band["kld_nats"]) / band["layers"]
            cells.append(format_estimate(mean_interval(1000 * per_layer, "")))
        losses = {row["layer"]: row["keys_forecast_nats"] + row["values_forecast_nats"] for row in entry["layers"]}
        worst = sorted(losses, key=lambda layer: -losses[layer])[:5]
        share = sum(losses[layer] for layer in worst) / sum(losses.values())
        body.append([entry["model"], f"{len(losses)}", *cells, f"{', '.join(map(str, worst))} ({share:.0%})"])
    bands = [f"{band}: KLD per layer, 1/1000" for band in sources.depth[0]["divergence"]]
    return _table(("model", "layers", *bands, "five dearest layers (share of the forecast loss)"), body)


def _durations(sources: Sources) -> str:
    """How long the calibration took."""
    body = []
    for entry in sources.depth:
        calibration, hardware = entry["calibration"], entry["provenance"]["hardware"]
        tokens = calibration["num_samples"] * calibration["seq_len"]
        body.append(
            [
                entry["model"],
                f"{calibration['num_samples']} x {calibration['seq_len']}",
                f"{entry['calibration_seconds']:.0f}",
                f"{tokens / entry['calibration_seconds']:.0f}",
                f"{hardware['chip']}, {hardware['device']}",
            ]
        )
    return _table(("model", "sequences x tokens", "seconds", "tokens/s", "machine"), body)


def _outliers(sources: Sources) -> str:
    """Tokens that stand out by the norm of their keys, and how much the loss minds errors in them."""
    body = []
    for entry in sources.depth:
        rows = entry["key_outliers"]
        tokens, gradients = sum(r["tokens"] for r in rows), sum(r["gradient_sum"] for r in rows)
        cells = []
        for tail in ("high", "low"):
            share = sum(r[f"{tail}_flagged"] for r in rows) / tokens
            weight = sum(r[f"{tail}_gradient_sum"] for r in rows) / gradients / share if share else float("nan")
            cells += [f"{share:.2%}", f"{weight:.2f}x" if share else ""]
        for kind in ("keys", "values"):
            first = [r for r in entry["first_token"] if r["kind"] == kind]
            cells += [f"{np.median([r[f'{what}_ratio'] for r in first]):.2f}x" for what in ("norm", "gradient")]
        body.append([entry["model"], *cells])
    header = ["model"]
    header += [cell for tail in ("high", "low") for cell in (f"{tail} outliers", "their squared gradient")]
    header += [cell for kind in ("key", "value") for cell in (f"first {kind}'s norm", "its squared gradient")]
    return _table(header, body)


def _best(sources: Sources) -> str:
    """The README's table: caches that none beats in both bytes and loss, and what is not bad though its tables were
    not counted, which is marked and gets no ratio.
    """
    of_model = [r for r in sources.records if (r.subject.model.name, r.subject.model.n_layers) == (README_MODEL, None)]
    body, least, least_counted = [], float("inf"), float("inf")
    for one in sorted(points(of_model)[BEST], key=lambda point: point.all_in(QUOTED)):
        loss, top1, bits = one.metric("kld_mean"), one.metric("top1_agreement"), one.all_in(QUOTED)
        if loss is None or top1 is None or one.word is None:
            continue
        counted = one.footprint is not None
        shown = loss.value < least_counted if counted else loss.value < least and one.word is not WORDS[-1]
        least = min(least, loss.value)
        if shown:
            size = (f"{bits:.2f}", f"{16 / bits:.1f} times smaller") if counted else (f"{bits:.2f}\\*", "")
            changed = f"{100 * (1 - top1.value):.1f} of 100"
            body.append([one.label, *size, format_estimate(loss), changed, one.word.word])
            least_counted = loss.value if counted else least_counted
    reference = ["fp16", "16.00", "", "none", "none", "lossless"]
    header = ("cache", "bits a value", "than fp16", "loss", "changed", "verdict")
    return _table(header, [reference, *reversed(body)])


TABLES: Mapping[str, Callable[[Sources], str]] = {
    "claims": _claims,
    "allocation": _allocation,
    "recipes": _recipes,
    "bands": _bands,
    "durations": _durations,
    "outliers": _outliers,
    "best": _best,
}
"""Every block that a page may have."""

OF_DEPTH = ("bands", "durations", "outliers")
NOT_MEASURED = "No record yet; `examples/sensitivity_by_depth.py` makes one."

PAGES = (Path("README.md"), Path("docs/guide.md"), Path("docs/ratequant.md"))


def main() -> None:
    """Write the blocks of pages in place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", type=Path, nargs="*", default=PAGES)
    parser.add_argument("--records", type=Path, default=Path("records"))
    options = parser.parse_args()
    sources = Sources.read(options.records)
    for page in options.pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), sources), encoding="utf-8")


if __name__ == "__main__":
    main()
