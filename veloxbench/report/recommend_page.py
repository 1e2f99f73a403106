"""A recommendation in words, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veloxbench.records.record import Estimate
from veloxbench.report.cells import format_estimate, machine, pipe_table
from veloxbench.report.recommend import Answer, Candidate, Wish, size

LISTED = 3
"""Arms without figures that are named in words."""


def render_answer(answer: Answer, how: Sequence[str], chip: str | None = None) -> str:
    """The answer for readers: the choice, its cost, how it is used, what else there is, and what to be careful with.

    Args:
        how: lines of Python and of shell that use the choice.
        chip: of this machine, where speed is used; other machines' figures are named as such.
    """
    parts = [f"{answer.model}, {_wish(answer.wish)}", _choice(answer), *(["\n".join(how)] if answer.choice else [])]
    parts += [_table(answer), *_others(answer)]
    parts.append("\n".join(["With care:", *(f"- {line}" for line in caveats(answer, chip))]))
    return "\n\n".join(parts) + "\n"


def _wish(wish: Wish) -> str:
    wanted = [f"{wish.context:,} tokens of context"]
    if wish.memory is not None:
        wanted.append(f"at most {size(wish.memory)} in all")
    if wish.max_kld is not None:
        wanted.append(f"a KLD of at most {wish.max_kld:g}")
    if wish.verdict is not None:
        wanted.append(f"at least {wish.verdict.word}")
    if wish.speed is not None:
        wanted.append(f"decode at {wish.speed:g} of fp16's speed or more")
    return ", ".join(wanted)


def _choice(answer: Answer) -> str:
    chosen, wish = answer.choice, answer.wish
    if chosen is None:
        near = min(answer.candidates, key=lambda c: _distance(c, wish))
        return f"Nothing that was measured keeps that. The nearest is {near.arm}: {'; '.join(near.objections(wish))}."
    footprint, context = chosen.footprint, wish.context
    lines = [
        f"Use {chosen.arm}: {chosen.word.word} ({chosen.word.meaning}).",
        f"  quality  {_loss(chosen)}",
        f"  cache    {size(footprint.all_in(context))} with its tables, {footprint.bits(context):.2f} bits a value; "
        f"fp16 takes {size(2 * footprint.values(context))}",
        f"  peak     {size(footprint.peak(context))} above the weights' {size(footprint.weights)}",
        f"  speed    {_speed(chosen)}",
    ]
    if wish.memory is not None:
        lines.append(f"  fits     {footprint.longest(wish.memory, answer.limit):,} tokens in {size(wish.memory)}")
    if chosen.is_reference:
        why = "nothing smaller that was measured keeps the wish" if wish.names_quality else "nothing smaller is needed"
        lines.append(f"  That is mlx-lm's own cache: {why}.")
    return "\n".join(lines)


def _distance(candidate: Candidate, wish: Wish) -> tuple[int, float]:
    """How far it is from the wish: by the number of its objections, then by bytes where they are bounded."""
    size_or_loss = candidate.kld.value if wish.memory is None else candidate.footprint.peak(wish.context)
    return len(candidate.objections(wish)), size_or_loss


def _loss(candidate: Candidate) -> str:
    if candidate.quality is None:
        return "none: it is what the others are compared with"
    subject = candidate.quality.subject
    sequences = len(candidate.quality.samples["kld_mean"])
    return (
        f"KLD {format_estimate(candidate.kld)} nats a token; {_per_hundred(candidate.changed)} of 100 tokens change "
        f"({subject.protocol} protocol, {subject.text.name}, {sequences} sequences of {_length(candidate):,} tokens)"
    )


def _per_hundred(estimate: Estimate) -> str:
    return "none" if estimate.value == 0 else format_estimate(estimate)


def _length(candidate: Candidate) -> int:
    """Tokens of a sequence on which the quality was measured."""
    assert candidate.quality is not None
    settings = candidate.quality.subject.settings
    parts = ("length",) if "length" in settings else ("prefix", "steps")
    return sum(int(str(settings[part])) for part in parts)


def _speed(candidate: Candidate) -> str:
    ratio = candidate.speed_ratio
    if candidate.is_reference:
        return "fp16's"
    if ratio is None or candidate.speed is None:
        return "not measured"
    depth = candidate.speed.subject.settings["depth"]
    return f"decodes at {format_estimate(ratio)} of fp16's speed, {depth:,} tokens deep ({machine(candidate.speed)})"


def _table(answer: Answer) -> str:
    context, memory = answer.wish.context, answer.wish.memory
    header = ["", "cache", "all-in bits", "cache size", "peak", "KLD", "verdict", "changed of 100", "decode speed"]
    rows = []
    for one in answer.candidates:
        ratio, mark = one.speed_ratio, "→" if one is answer.choice else "*" if one in answer.pareto else ""
        row = [
            mark,
            str(one.arm),
            f"{one.footprint.bits(context):.2f}",
            size(one.footprint.all_in(context)),
            size(one.footprint.peak(context)),
            format_estimate(one.kld),
            one.word.word,
            format_estimate(one.changed),
            "" if ratio is None else format_estimate(ratio),
        ]
        rows.append([*row, *([] if memory is None else [f"{one.footprint.longest(memory, answer.limit):,}"])])
    if memory is not None:
        header.append(f"tokens in {size(memory)}")
    return (
        pipe_table(header, rows)
        + f"\n\n→ chosen; * none is both smaller and better. Sizes at {context:,} tokens, the peak above the weights."
    )


def _others(answer: Answer) -> list[str]:
    lines = [
        f"- {one.arm}: {'; '.join(one.objections(answer.wish))}"
        for one in answer.candidates
        if one is not answer.choice and one.objections(answer.wish)
    ]
    lines += [f"- {arm}: {missing}" for arm, missing in answer.without[:LISTED]]
    if len(answer.without) > LISTED:
        lines.append(f"- {len(answer.without) - LISTED} more without figures of quality or memory (--json lists them)")
    return ["\n".join(["Not chosen:", *lines])] if lines else []


def caveats(answer: Answer, chip: str | None = None) -> list[str]:
    """Where the answer goes beyond what was measured."""
    shown = answer.choice or answer.candidates[0]
    context, tokens = answer.wish.context, shown.footprint.tokens
    lines = []
    if context != tokens:
        lines.append(
            f"bytes and peak were measured at {tokens:,} tokens (512 at a time) and are scaled to {context:,}, "
            "working memory too: an upper bound where a part of it does not grow"
        )
    weights = shown.footprint.record.provenance.hardware
    lines.append(
        f"weights and peak are those of {weights.get('device') or 'the device'} on {machine(shown.footprint.record)}; "
        "where the model is loaded in fewer bytes, more fits"
    )
    if answer.elsewhere:
        lines.append(
            f"every figure is that machine's; records of {', '.join(answer.elsewhere)} are there too and were left out"
        )
    lengths = {_length(one) for one in answer.candidates if one.quality is not None}
    if lengths and context > max(lengths):
        lines.append(f"quality was measured on sequences of up to {max(lengths):,} tokens, not of {context:,}")
    texts = {one.quality.subject.text.name for one in answer.candidates if one.quality is not None}
    if texts:
        lines.append(f"quality is that on {', '.join(sorted(texts))}; on other text it differs")
    groups = {
        (c.quality.subject.protocol, c.quality.subject.text.tokens_sha256) for c in answer.candidates if c.quality
    }
    if len(groups) > 1:
        lines.append("the caches were not all measured on the same tokens: compare their KLD with care")
    measured = {str(c.speed.provenance.hardware["chip"]) for c in answer.candidates if c.speed is not None}
    if chip is not None and measured - {chip}:
        lines.append(f"speed was measured on {', '.join(sorted(measured))}, not on this {chip}")
    return lines


def answer_as_json(answer: Answer, how: Sequence[str], chip: str | None = None) -> dict[str, Any]:
    """The answer for programs; ``choice`` is the label of a candidate or null, intervals are [low, high]."""
    wish = answer.wish
    return {
        "model": answer.model,
        "wish": {
            "context": wish.context,
            "memory_bytes": wish.memory,
            "max_kld": wish.max_kld,
            "verdict": None if wish.verdict is None else wish.verdict.word,
            "speed": wish.speed,
        },
        "choice": None if answer.choice is None else str(answer.choice.arm),
        "use": list(how),
        "candidates": [_candidate_as_json(one, answer) for one in answer.candidates],
        "without_figures": {str(arm): missing for arm, missing in answer.without},
        "caveats": caveats(answer, chip),
    }


def _candidate_as_json(one: Candidate, answer: Answer) -> dict[str, Any]:
    context, footprint, ratio = answer.wish.context, one.footprint, one.speed_ratio
    records = (footprint.record, one.quality, one.speed)
    return {
        "cache": str(one.arm),
        "pareto": one in answer.pareto,
        "all_in_bytes": footprint.all_in(context),
        "all_in_bits_per_value": footprint.bits(context),
        "static_bytes": footprint.static,
        "peak_bytes": footprint.peak(context),
        "weight_bytes": footprint.weights,
        "longest_context": None if answer.wish.memory is None else footprint.longest(answer.wish.memory, answer.limit),
        "kld_mean": _interval(one.kld),
        "changed_of_100": _interval(one.changed),
        "verdict": one.word.word,
        "decode_speed_ratio": None if ratio is None else _interval(ratio),
        "objections": one.objections(answer.wish),
        "records": [record.id for record in records if record is not None],
    }


def _interval(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "interval": [estimate.low, estimate.high]}
