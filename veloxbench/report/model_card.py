"""What stands elsewhere of a measurement: a badge for a model card, and a block for a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from veloxbench.errors import UsageError, unknown_name
from veloxbench.records.arm import REFERENCE
from veloxbench.records.quality_words import WORDS, quality_word
from veloxbench.records.record import Estimate, Record
from veloxbench.records.selection import machine_of, table_rows
from veloxbench.report.cells import format_estimate
from veloxbench.report.page import by_model
from veloxbench.report.recommend import best_quality
from veloxbench.report.tables import quality_groups

COLOURS = dict(zip((word.word for word in WORDS), ("brightgreen", "green", "yellow", "red"), strict=True))


def badges(records: Sequence[Record], label: str) -> str:
    """One line of Markdown for each model on which an arm was measured: its word, its loss and its size.

    Raises:
        UsageError: no quality record of that arm.
    """
    of_quality = [record for record in table_rows(records) if quality_word(record.metrics) is not None]
    labels = sorted({record.subject.method.label for record in of_quality})
    if not labels:
        raise UsageError("no record of quality is here, so that there is nothing that a badge could say")
    if label not in labels:
        raise unknown_name("arm", label, labels)
    of_arm = [record for record in of_quality if record.subject.method.label == label]
    return "".join(
        f"{badge(record)}\n" for _, rows in sorted(by_model(of_arm).items()) if (record := best_quality(rows))
    )


def badge(record: Record) -> str:
    """A shield whose text for readers without pictures has the figures, on what, and the record."""
    word = quality_word(record.metrics)
    assert word is not None
    subject, metrics = record.subject, record.metrics
    shield = "-".join(
        _escaped(part) for part in ("KV cache", f"{subject.method.label} {word.word}", COLOURS[word.word])
    )
    text = (
        f"KV cache {subject.method.label} of {subject.model.name}: {word.word}, KLD "
        f"{format_estimate(metrics['kld_mean'])} nats a token, {metrics['bits_per_value'].value:.2f} bits a value "
        f"({subject.protocol}, {subject.text.name}, record {record.id[:12]})"
    )
    return f"![{text}](https://img.shields.io/badge/{shield})"


def _escaped(part: str) -> str:
    """As shields.io reads a part of a badge: doubled dashes and underscores are themselves."""
    return quote(part.replace("-", "--").replace("_", "__").replace(" ", "_"), safe="")


def perplexity_blocks(records: Sequence[Record]) -> str:
    """Each quality record in the form of ``llama-perplexity --kl-divergence``, for pull requests.

    What stands behind ± is half a 95% interval over sequences, where llama-perplexity prints one standard error over
    tokens: tokens of one sequence are correlated, so that the latter is too small.
    """
    parts = []
    for model, of_model in by_model(table_rows(records)).items():
        for title, rows in quality_groups(of_model).items():
            bases = {machine_of(row): row for row in rows if row.subject.method.name == REFERENCE.name}
            parts += [
                f"{model}, {row.subject.method.label}; {title}; ± is half a 95% interval over sequences\n"
                f"record {row.id}\n\n{_block(row, bases.get(machine_of(row)))}"
                for row in rows
                if quality_word(row.metrics) is not None
            ]
    return "\n\n".join(parts) + "\n" if parts else ""


def _block(record: Record, base: Record | None) -> str:
    metrics, word = record.metrics, quality_word(record.metrics)
    lines = [
        "====== Perplexity statistics ======",
        _line("Mean PPL(Q)", metrics["ppl"]),
        *([] if base is None else [_line("Mean PPL(base)", base.metrics["ppl"])]),
        _line("Mean ln(PPL(Q)/PPL(base))", metrics["delta_nll"]),
        _line("Mean PPL(Q)-PPL(base)", metrics["delta_ppl"]),
        "",
        "====== KL divergence statistics ======",
        _line("Mean    KLD", metrics["kld_mean"]),
        _line("99.9%   KLD", metrics["kld_p999"]),
        _line("99.0%   KLD", metrics["kld_p99"]),
        _line("Median  KLD", metrics["kld_median"]),
        "",
        "====== Token probability statistics ======",
        _line("RMS Δp", metrics["delta_p_rms"], 100, " %"),
        _line("Same top p", metrics["top1_agreement"], 100, " %"),
        "",
        f"Bits per value: {metrics['bits_per_value'].value:.3f}; verdict: {word.word if word else ''}",
    ]
    return "\n".join(lines)


def _line(name: str, estimate: Estimate, factor: float = 1, unit: str = "") -> str:
    half = None if estimate.low is None or estimate.high is None else (estimate.high - estimate.low) / 2 * factor
    return f"{name:<30}: {estimate.value * factor:11.6f}{'' if half is None else f' ± {half:10.6f}'}{unit}"
