"""What a page of results says first: which cache is good enough, what it costs, what nobody measured, and one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from veloxbench.records.record import Record
from veloxbench.report.cells import format_estimate, hardware_name, pipe_table
from veloxbench.report.points import BEST, FP16_BITS, QUOTED, Point
from veloxbench.report.recommend import GOOD, size
from veloxbench.report.tables import GUIDE_CLAIMS

Points = Mapping[str, Mapping[str, Sequence[Point]]]
"""Points of each model by group, as :func:`veloxbench.report.points.points` has them."""

ASKED_FOR = {
    "8 bits": "@8",
    "KIVI": "kivi",
    "residual vector quantization": "rvq",
    "TurboQuant Prod": "turboquant_prod",
}
"""What users ask about, with a part of the arm's label by which a record of it is known."""

COLUMNS = (
    "*target*: what was asked of the cache; the row has the one that loses least there. *all-in bits*: everything "
    f"resident at {QUOTED:,} tokens, tables counted (\\*: not measured, left out); fp16 holds 16. *KLD*: how far "
    "predictions move from the fp16 cache's, nats a token. *ΔPPL*: growth of perplexity. ± and [ ] are 95% intervals "
    "over sequences. *verdict*: the word that KLD, its 99% and top-1 earn at the worse ends of their intervals "
    "(`docs/recommend.md`). *often-quoted*: what the mixed-precision guide claims for that target, memory and "
    "ΔPPL, and whether these records keep or reproduce it (*tables apart*: the tokens are as small as that in the "
    "longest sequence measured, but not with tables counted; *open*: the interval crosses the limit)."
)


def sentences(by_model: Points, records: Sequence[Record]) -> list[str]:
    """Three: which cache at which bits is good enough, what it costs, and what nobody measured yet."""
    chosen = {model: choice(groups[BEST]) for model, groups in by_model.items()}
    good = {model: point for model, point in chosen.items() if point is not None}
    nothing = [model for model, point in chosen.items() if point is None]
    parts = [f"on {model} {_named(point)}" for model, point in good.items()]
    if nothing:
        nearest = [_nearest(model, by_model[model][BEST]) for model in nothing]
        parts.append(f"nothing that was measured is good on {_listed(nothing)} ({'; '.join(filter(None, nearest))})")
    which = f"**Good enough:** {'; '.join(parts)}." if parts else ""
    costs = [f"on {model} {_cost(point, by_model[model][BEST])}" for model, point in good.items()]
    cost = f"**The cost:** {'; '.join(costs)}." if costs else ""
    return [sentence for sentence in (which, cost, f"**Not measured yet:** {_missing(by_model, records)}.") if sentence]


def choice(of_model: Sequence[Point]) -> Point | None:
    """The smallest cache that is good, one whose tables were counted before any other; None where none is good."""
    good = [p for p in of_model if p.word is not None and p.word.kld_mean <= GOOD.kld_mean]
    return min(good, key=lambda point: (point.footprint is None, point.all_in(QUOTED)), default=None)


def _named(point: Point) -> str:
    kld, word = point.metric("kld_mean"), point.word
    assert kld is not None
    assert word is not None
    return (
        f"{point.label} is {word.word} at {point.all_in(QUOTED):.2f} bits a value where fp16 holds 16 "
        f"(KLD {format_estimate(kld)} nats a token)"
    )


def _nearest(model: str, of_model: Sequence[Point]) -> str:
    losses = [(kld.value, point) for point in of_model if (kld := point.metric("kld_mean")) is not None]
    if not losses:
        return ""
    _, point = min(losses, key=lambda pair: pair[0])
    word = "" if point.word is None else f" is {point.word.word} at"
    return f"the nearest, {point.label},{word} {point.all_in(QUOTED):.2f} bits"


def _cost(point: Point, of_model: Sequence[Point]) -> str:
    fp16 = next((one.footprint for one in of_model if one.is_reference), None)
    if point.footprint is None:
        memory = f"the size of {point.label}'s tables"
        return f"{memory}{' and its speed were' if point.speed_ratio is None else ' was'} not measured yet"
    held = f"{point.label} holds {size(point.footprint.all_in(QUOTED))} at {QUOTED:,} tokens, tables counted"
    beside = "" if fp16 is None else f" (fp16 {size(fp16.all_in(QUOTED))})"
    ratio = point.speed_ratio
    speed = "its speed was not measured" if ratio is None else f"decodes at {format_estimate(ratio)} of fp16's speed"
    return f"{held}{beside}, and {speed}"


def _missing(by_model: Points, records: Sequence[Record]) -> str:
    points = [point for groups in by_model.values() for point in groups[BEST]]
    labels = {point.label for point in points}
    lengths = [record.engagement[0].tokens for record in records if "kld_mean" in record.metrics and record.engagement]
    longest = f", loss beyond {max(lengths):,} tokens" if lengths else ""
    absent = [name for name, part in ASKED_FOR.items() if not any(part in label for label in labels)]
    methods = f", and {_listed(absent)}" if absent else ""
    return f"{hardware(records)}{longest}{methods}"


def hardware(records: Iterable[Record]) -> str:
    """Whether there are records from Apple's chips, and where all of them are from."""
    machines = sorted({hardware_name(record) for record in records})
    apple = any("Apple" in name for name in machines)
    return f"{'other machines than' if apple else 'any Apple chip: every record is from'} {'; '.join(machines)}"


def choosing_a_target(by_model: Points) -> str:
    """The best cache at each target of each model, with what the guide claims there; one that holds no less than fp16
    is no choice."""
    header = ("model", "target", "cache", "all-in bits", "KLD", "verdict", "ΔPPL", "often-quoted", "which is")
    body = []
    for model, groups in by_model.items():
        best: dict[float, Point] = {}
        for point in sorted(groups[BEST], key=_loss):
            target = point.record.subject.method.target
            if target is not None and point.word is not None and point.resident < FP16_BITS:
                best.setdefault(target, point)
        for target, point in sorted(best.items(), reverse=True):
            body.append([model if target == max(best) else "", f"{target:g}", *_cells(point, target)])
    return pipe_table(header, body, ["left", "right", "left", "right", "right", "left", "right", "left", "left"])


def _loss(point: Point) -> float:
    kld = point.metric("kld_mean")
    return float("inf") if kld is None else kld.value


def _cells(point: Point, target: float) -> list[str]:
    claim, change = GUIDE_CLAIMS.get(target), point.metric("delta_ppl")
    kld, word, bits = point.metric("kld_mean"), point.word, point.all_in(QUOTED)
    return [
        point.label,
        f"{bits:.2f}" + ("" if point.footprint else "\\*"),
        "" if kld is None else format_estimate(kld),
        "" if word is None else word.word,
        "" if change is None else format_estimate(change),
        "" if claim is None else f"{claim.memory}, {claim.delta_ppl}",
        "" if claim is None or change is None else claim.verdict(change, FP16_BITS / point.resident, FP16_BITS / bits),
    ]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
