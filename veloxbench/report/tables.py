"""The tables of each suite: the one place of this room that knows suites by name.

A suite's tables are one function from its records to sections of Markdown, registered under the suite's name. Another
package registers its own with :func:`register_table` in a module that an entry point of the group
``veloxbench.tables`` names. A suite without a function is shown whole, each metric a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from veloxbench.gate.paired_test import MIN_SEQUENCES
from veloxbench.records.arm import REFERENCE
from veloxbench.records.plugins import load_plugins
from veloxbench.records.record import NO_MODEL, Estimate, Record
from veloxbench.records.suites import all_suites
from veloxbench.report.allocation import comparisons, summary
from veloxbench.report.cells import (
    Column,
    all_in,
    figure,
    format_estimate,
    megabytes,
    memory_ratio,
    method,
    pipe_table,
    ratio,
    record_table,
    scaled,
    significant,
    target,
    verdict,
)

SuiteTables = Callable[[Sequence[Record]], list[str]]

TABLES: dict[str, SuiteTables] = {}
"""What writes each suite's sections.

Its argument is the suite's records of one model, without controls; of a suite that reads no model all of them. The
headings are of the third level below a model's, else of the second.
"""


def register_table(suite: str) -> Callable[[SuiteTables], SuiteTables]:
    """Register the decorated function as the tables of a suite; a second one for a suite raises ``ValueError``."""

    def decorate(function: SuiteTables) -> SuiteTables:
        if suite in TABLES:
            raise ValueError(f"the tables of the suite {suite!r} are registered twice")
        TABLES[suite] = function
        return function

    return decorate


def sections(records: Sequence[Record]) -> list[str]:
    """The tables of every suite that has records, in the suites' order; suites that are unknown here come last.

    Args:
        records: of one model, or all that read none.
    """
    load_plugins("veloxbench.tables")
    by_suite: dict[str, list[Record]] = {}
    for record in records:
        by_suite.setdefault(record.subject.suite, []).append(record)
    order = [*filter(by_suite.__contains__, all_suites()), *sorted(by_suite.keys() - all_suites().keys())]
    return [section for suite in order for section in TABLES.get(suite, every_metric)(by_suite[suite])]


def every_metric(records: Sequence[Record]) -> list[str]:
    """The tables of a suite that nobody wrote any for: each metric is a column of one of them."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    level = "##" if records[0].subject.model == NO_MODEL else "###"
    suite = records[0].subject.suite.capitalize()
    parts: list[str] = []
    for title, rows in groups(records).items():
        tables = [
            record_table([("method", method), *((name, figure(name)) for name in of_table)], rows)
            for of_table in (
                names[first : first + MOST_COLUMNS - 1] for first in range(0, len(names), MOST_COLUMNS - 1)
            )
        ]
        parts.append(f"{level} {suite}, {title}\n\n" + "\n\n".join(tables))
    return parts


MOST_COLUMNS = 8
"""Of a table, so that it fits on a page of 1000 pixels, with a ninth where rows come from several machines."""


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of one suite that share protocol, settings and tokens, by a line that says so."""
    by_title: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        settings = ", ".join(
            f"{name} {value}" for name, value in record.subject.settings.items() if name not in ("name", "seed")
        )
        title = f"{record.subject.protocol}: {settings}; text {record.subject.text.name}"
        by_title.setdefault(title, {}).setdefault(record.subject.text.tokens_sha256, []).append(record)
    return {
        title + (f", tokens {sha256[:8]}" if len(by_tokens) > 1 else ""): rows
        for title, by_tokens in by_title.items()
        for sha256, rows in by_tokens.items()
    }


def quality_groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The quality records among those of one model, in groups that may be paired sequence by sequence."""
    return groups([record for record in records if record.subject.suite == "perplexity"])


@dataclass(frozen=True)
class Claim:
    """What the mixed-precision guide promises at a target, without saying how it was measured.

    Attributes:
        ratio: how many times smaller than fp16.
        low: change of perplexity from which its range goes; 0 where it names an upper limit alone.
        high: the change up to which it goes.
    """

    ratio: float
    low: float
    high: float

    @property
    def memory(self) -> str:
        """The ratio as the guide writes it."""
        return f"{self.ratio:g}x"

    @property
    def delta_ppl(self) -> str:
        """The change as the guide writes it."""
        return f"~{self.low:.2f}-{self.high:.2f}" if self.low else f"< {self.high:.2f}"

    def verdict(self, change: Estimate, ratio: float, all_in: float) -> str:
        """Whether measured figures keep it.

        Args:
            change: of perplexity, judged by its interval's ends.
            ratio: how many times smaller than fp16 the tokens held are.
            all_in: likewise, with tables that do not grow.
        """
        low, high = (change.value if end is None else end for end in (change.low, change.high))
        enough = 0.975 * self.ratio  # 1.5 bits are 10.7x, of which the guide makes 10x: it rounds
        if ratio < enough or low > self.high:
            return "not reproduced"
        word = "kept" if high <= self.high else "open"
        return word if all_in >= enough else f"{word}, tables apart"


GUIDE_CLAIMS: Mapping[float, Claim] = {
    4.0: Claim(4, 0.0, 0.01),
    2.0: Claim(8, 0.03, 0.08),
    1.5: Claim(10, 0.07, 0.15),
    1.0: Claim(16, 0.20, 0.35),
}


def _partial_engagement(records: Sequence[Record]) -> str:
    """Which methods left layers as they were, and in what."""
    notes = []
    for record in records:
        others = sorted({layer.cache_class for layer in record.engagement if not layer.engaged})
        if others:
            engaged = sum(layer.engaged for layer in record.engagement)
            layers = f"{engaged} of {len(record.engagement)} layers; the others stay in {', '.join(others)}"
            notes.append(f"{method(record)}: {layers}")
    return f"\n\nNot every layer is quantized. {'; '.join(notes)}." if notes else ""


@register_table("perplexity")
def quality(records: Sequence[Record]) -> list[str]:
    """What each method loses on each text, and the noise floor under it."""
    columns: list[Column] = [
        ("method", method),
        ("bits/value", figure("bits_per_value", "{:.3f}")),
        ("ΔPPL", figure("delta_ppl")),
        ("ΔNLL", figure("delta_nll")),
        ("KLD", figure("kld_mean")),
        ("99%", figure("kld_p99", plain=True)),
        ("top-1", figure("top1_agreement")),
        ("verdict", verdict),
    ]
    return [
        f"### Quality, {title}\n\n{record_table(columns, rows)}\n\n{_noise_floor(rows)}{_partial_engagement(rows)}"
        for title, rows in groups(records).items()
    ]


RETRIEVAL: Mapping[str, str] = {
    "repeated": "A random sequence comes twice; the second time every token can be copied from half the length back.",
    "needles": "Numbers are told at depths of a text and asked for at its end; only the digits of the answers count.",
    "by depth": "Plain text in chunks of 64 tokens, in equal parts from the first token to the last.",
}


@register_table("retrieval")
def retrieval(records: Sequence[Record]) -> list[str]:
    """What is still found, and the divergence from fp16 there, together and by depth."""
    parts = []
    for title, rows in groups(records).items():
        depths = dict.fromkeys(name for row in rows for name in row.metrics if name.startswith("kld_mean_"))
        columns: list[Column] = [
            ("method", method),
            ("bits/value", figure("bits_per_value", "{:.3f}")),
            ("recalled", figure("recalled", "{:.1%}")),
            ("KLD", figure("kld_mean")),
            ("ΔNLL", figure("delta_nll")),
            ("top-1", figure("top1_agreement")),
        ]
        parts.append(
            f"### Retrieval, {title}\n\n{record_table(columns, rows)}\n\n{RETRIEVAL[rows[0].subject.protocol]} "
            "*Recalled* are tokens that the model gives more than half of the probability; KLD and NLL against fp16 at "
            "the same positions, nats per token."
        )
        if depths:
            by_depth = [("method", method), *((_depth(name), figure(name, plain=True)) for name in depths)]
            parts.append(f"KLD by depth:\n\n{record_table(by_depth, rows)}")
    return parts


def _depth(metric: str) -> str:
    where, _, depth = metric.removeprefix("kld_mean_").partition("_")
    return f"{where} {depth}"


def _noise_floor(records: Sequence[Record]) -> str:
    notes = []
    for record in records:
        floor = record.metrics.get("kld_floor_mean")
        if floor is not None:
            notes.append(
                f"Noise floor (fp16 against fp16, {len(record.samples['kld_floor'])} sequences): KLD "
                f"{floor.value:.2g}, at most {record.metrics['kld_floor_max'].value:.2g} at one position."
            )
        if record.subject.method.name == REFERENCE.name and "ppl" in record.metrics:
            notes.append(f"fp16's perplexity is {format_estimate(record.metrics['ppl'])}.")
        n = len(record.samples.get("nll", []))
        if record.subject.method.name == REFERENCE.name and 0 < n < MIN_SEQUENCES:
            notes.append(f"{n} sequences: enough to compare methods, too few for a gate (which needs {MIN_SEQUENCES}).")
    return " ".join(notes)


def bit_allocation(records: Sequence[Record]) -> list[str]:
    """Whether each allocation beats its shuffles and the next dearer uniform widths.

    Args:
        records: of one model, with controls.
    """
    header = ("target", "bits/value", "KLD", "against", "its bits/value", "its KLD", "worse by", "RateQuant is")
    aligned = ["left" if name == "against" else "right" for name in header]
    parts = []
    for title, rows in quality_groups(records).items():
        compared = list(comparisons(rows))
        if not compared:
            continue
        body = [
            (
                target(c.record),
                figure("bits_per_value", "{:.3f}")(c.record),
                figure("kld_mean")(c.record),
                c.rival,
                f"{c.rival_bits:.3f}",
                significant(c.rival_kld),
                format_estimate(c.worse_by),
                c.verdict.split()[0],
            )
            for c in compared
        ]
        own = dict.fromkeys(c.record.id for c in compared)
        sentences = [summary([c for c in compared if c.record.id == record_id]) for record_id in own]
        n = len(compared[0].record.samples["kld_mean"])
        parts.append(
            f"### Bit allocation, {title}\n\n{pipe_table(header, body, aligned)}\n\n{'. '.join(sentences)}. "
            f"*Worse by* is the rival's KLD minus RateQuant's, nats per token, paired over {n} sequences."
        )
    if parts:
        parts[-1] += (
            " A shuffle deals RateQuant's own widths to other units at random: same bytes, no knowledge of the model. "
            "Of every uniform method the cheapest that costs more stands here, first the next larger cost of all."
        )
    return parts


@register_table("memory")
def memory(records: Sequence[Record]) -> list[str]:
    """Bytes held, and the peaks on the way."""
    parts = []
    for title, rows in groups(records).items():
        budget = rows[0].subject.settings.get("budget_gib")
        held: list[Column] = [
            ("method", method),
            ("bits/value", figure("bits_per_value", "{:.3f}")),
            *((f"all-in at {tokens:,}", all_in(tokens)) for tokens in (2048, 8192, 32768)),
            ("memory", memory_ratio),
            ("cache MB", megabytes("cache_bytes")),
            ("static kB", scaled("static_bytes", 1e3, "{:.1f}")),
        ]
        peaks: list[Column] = [
            ("method", method),
            ("allocated", figure("allocated_bits_per_value", "{:.3f}")),
            ("full buffers", figure("filled_allocated_bits_per_value", "{:.3f}")),
            ("unaccounted MB", megabytes("unaccounted_bytes")),
            ("prefill peak MB", megabytes("prefill_peak_bytes")),
            ("decode peak MB", megabytes("decode_peak_bytes")),
            ("process peak MB", megabytes("process_prefill_peak_bytes", "{:.0f}")),
            (f"tokens in {budget:g} GiB", scaled("tokens_in_budget", 1, "{:,.0f}")),
        ]
        parts.append(
            f"### Memory, {title}\n\n{record_table(held, rows)}\n\n"
            "*bits/value* is what these tokens take, tables left out; *all-in* extrapolates to one sequence of that "
            "many tokens, tables (*static*) counted and sliding windows no longer than they are; *memory* is 16 / "
            "bits/value.\n\n"
            f"{record_table(peaks, rows)}\n\n"
            "*allocated* counts whole buffers, which grow in steps; *full buffers* is the same where they are full; "
            "*unaccounted* is what MLX holds beyond weights and the arrays counted. Peaks are MLX's, above the "
            "weights; the process peak is its resident size in prefill. Each arm ran in a process of its own."
        )
    return parts


@register_table("holds")
def holds(records: Sequence[Record]) -> list[str]:
    """Every array that can be reached from the caches."""
    columns: list[Column] = [
        ("method", method),
        ("bits/value", figure("bits_per_value", "{:.3f}")),
        ("at 32768, extrapolated", figure("long_bits_per_value", "{:.3f}")),
        ("of it uncoded K and V", figure("full_width_bits_per_value", "{:.3f}")),
        ("constant kB", scaled("constant_bytes", 1e3, "{:.1f}")),
        ("cache MB", megabytes("cache_bytes")),
        ("unaccounted MB", megabytes("unaccounted_bytes")),
        ("update peak MB", megabytes("update_peak_bytes")),
        ("engaged layers", figure("engaged_layers", "{:.0f}")),
    ]
    return [
        f"### Holds, {title}\n\n{record_table(columns, rows)}\n\n"
        "Keys and values are fed to the caches without a forward pass, and everything that can be reached from them "
        "counts: whole buffers, fp16 copies, tables. *Constant* does not grow from the first half of the tokens to "
        "the second; *uncoded* lies in arrays of floats as wide as a head."
        for title, rows in groups(records).items()
    ]


@register_table("throughput")
def throughput(records: Sequence[Record]) -> list[str]:
    """Speeds beside fp16's, a table for each depth."""
    columns: list[Column] = [
        ("method", method),
        ("decode / fp16", ratio("decode_speed_ratio")),
        ("prefill / fp16", ratio("prefill_speed_ratio")),
        ("first token / fp16", ratio("ttft_ratio")),
        ("decode tok/s", figure("decode_tok_s", "{:.1f}", plain=True)),
        ("fp16 tok/s", figure("decode_tok_s_fp16", "{:.1f}", plain=True)),
        ("prefill tok/s", figure("prefill_tok_s", "{:.0f}", plain=True)),
        ("first token s", figure("ttft_s", "{:.2f}", plain=True)),
    ]
    parts = [f"### Throughput, {title}\n\n{record_table(columns, rows)}" for title, rows in groups(records).items()]
    return [
        *parts,
        "Ratios are geometric means over interleaved pairs with fp16 in one process: speeds above 1 beat "
        "fp16, a first token above 1 is later. The fp16 row pairs fp16 with itself: its distance from 1 is noise. "
        "(n=2) rests on two timings of each side, too few for an interval. "
        "Absolute rates are this machine's at that moment; compare ratios.",
    ]


@register_table("kernels")
def kernels(records: Sequence[Record]) -> list[str]:
    """The traffic of one fused decode step, a table for each number of tokens."""
    kinds = ("partials", "codebooks", "signs", "mask", "queries")
    columns: list[Column] = [
        ("method", method),
        ("packed bytes", scaled("packed_bytes", 1, "{:,.0f}")),
        ("read", figure("packed_reads", "{:.3f}x")),
        ("all else", figure("other_percent", "{:.2f}%")),
        *((kind, figure(f"{kind}_percent", "{:.2f}%")) for kind in kinds),
    ]
    by_tokens: dict[object, list[Record]] = {}
    for record in records:
        by_tokens.setdefault(record.subject.settings["tokens"], []).append(record)
    return [
        f"### Kernels, fused decode attention over {tokens} packed tokens\n\n{record_table(columns, rows)}\n\n"
        "Bytes that one step moves for one KV head, counted without a GPU, by running the Metal source on the CPU: how "
        "often each packed byte is read, and all else in percent of the packed bytes, by what it is. Exact on "
        "any machine."
        for tokens, rows in by_tokens.items()
    ]


@register_table("exact")
def exact(records: Sequence[Record]) -> list[str]:
    """How many facts there are: they are not for reading."""
    facts = sum(len(record.metrics) + len(record.samples) for record in records)
    return [
        f"## Exact facts\n\n{len(records)} cases on fixed inputs gave {facts} digests, sizes and sums; they are not "
        "for reading but for `veloxbench gate`, which compares them."
    ]
