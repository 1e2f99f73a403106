"""BENCHMARK_RESULTS.md from records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from veloxbench.records.intervals import MIN_RATIO_PAIRS
from veloxbench.records.record import Estimate, FailedMeasurement, Record, Subject, content_hash
from veloxbench.report.allocation import CONTROL, comparisons, is_control, summary

REFERENCE = "fp16"
GATE_SEQUENCES = 16


@dataclass(frozen=True)
class Claim:
    """What the mixed-precision guide promises at a target, without saying how it was measured."""

    memory: str
    delta_ppl: str


GUIDE_CLAIMS: Mapping[float, Claim] = {
    4.0: Claim("4x", "< 0.01"),
    2.0: Claim("8x", "~0.03-0.08"),
    1.5: Claim("10x", "~0.07-0.15"),
    1.0: Claim("16x", "~0.20-0.35"),
}

Column = tuple[str, Callable[[Record], str]]


def render(records: Sequence[Record], failures: Sequence[FailedMeasurement] = ()) -> str:
    """The whole page.

    Args:
        records: any order; of several records of one row the newest stands, and the others are counted.
        failures: what crashed; a row that was recorded later is left out.
    """
    failed = _failed(failures, records)
    if not records:
        return "# Benchmark results\n\nNo records yet: `veloxbench run` makes them.\n" + (failed and f"\n{failed}\n")
    standing = latest(records)
    models = by_model(standing)
    parts = [_preamble(standing, len(records) - len(standing)), failed]
    parts += ["## Choosing a target bit rate", _choosing_intro()]
    for model, of_model in models.items():
        parts += _choosing(model, _uncontrolled(of_model))
    for model, of_model in models.items():
        parts += _model_section(model, _uncontrolled(of_model)) + _allocation(of_model)
    parts.append(_exact([record for record in standing if record.subject.suite == "exact"]))
    parts += _provenance(standing)
    return "\n\n".join(part for part in parts if part) + "\n"


def _exact(records: Sequence[Record]) -> str:
    if not records:
        return ""
    facts = sum(len(record.metrics) + len(record.samples) for record in records)
    return (
        f"## Exact facts\n\n{len(records)} cases on fixed inputs gave {facts} digests, sizes and sums; they are not "
        "for reading but for `veloxbench gate`, which compares them."
    )


def newest(records: Iterable[Record]) -> list[Record]:
    """The rows of the tables: the latest records without shuffled allocations, which are controls."""
    return _uncontrolled(latest(records))


def _uncontrolled(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if not is_control(record)]


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of the same weights, whole or cut, by a heading that tells them from others of the same name."""
    groups: dict[tuple[str, str, int | None], list[Record]] = {}
    for record in records:
        if record.subject.suite != "exact":  # which has no model
            model = record.subject.model
            groups.setdefault((model.name, model.weights_sha256, model.n_layers), []).append(record)
    weights = {(name, sha256) for name, sha256, _ in groups}
    shared = Counter(name for name, _ in weights)
    return {
        name
        + (f", weights {sha256[:8]}" if shared[name] > 1 else "")
        + (f", cut to its first {n_layers} layers" if n_layers else ""): group
        for (name, sha256, n_layers), group in groups.items()
    }


def latest(records: Iterable[Record]) -> list[Record]:
    """One record per subject: the same one measured with other code or elsewhere is superseded."""
    found: dict[str, Record] = {}
    for record in records:
        row = _row(record.subject)
        if row not in found or record.provenance.started > found[row].provenance.started:
            found[row] = record
    return sorted(found.values(), key=_order)


def _row(subject: Subject) -> str:
    """What the same measurement shares with other code or elsewhere."""
    fields = subject.model_dump(mode="json", exclude={"harness", "machine_class"})
    fields["method"].pop("implementation")
    return content_hash(fields)


def _failed(failures: Sequence[FailedMeasurement], records: Sequence[Record]) -> str:
    """What crashed last time, one line each."""
    if not failures:
        return ""
    recorded = {_row(record.subject): record.provenance.started for record in latest(records)}
    last = {_row(failure.subject): failure for failure in sorted(failures, key=lambda failure: failure.when)}
    lines = [
        f"- {failure.subject.model.name} {failure.subject.suite}/{failure.subject.protocol} "
        f"{failure.subject.method.label}, {failure.when:%Y-%m-%d %H:%M}: {' '.join(failure.reason.split())}"
        for row, failure in last.items()
        if row not in recorded or failure.when > recorded[row]
    ]
    if not lines:
        return ""
    return (
        "## Failed measurements\n\nThese crashed; a row of theirs below, if there is one, is from before. "
        "Measuring the same again, with whatever code, takes its line away.\n\n" + "\n".join(lines)
    )


def _order(record: Record) -> tuple[Any, ...]:
    method = record.subject.method
    return (
        method.name != REFERENCE,
        method.name,
        sorted(method.parameters.items()).__repr__(),
        -(method.target or 0.0),
    )


def _preamble(rows: Sequence[Record], superseded: int) -> str:
    commits = sorted({(r.provenance.commit or "outside a checkout")[:12] for r in rows})
    chips = sorted({f"{r.provenance.hardware['chip']}, {r.provenance.hardware['physical_cores']} cores" for r in rows})
    text = (
        "# Benchmark results\n\n"
        "<!-- generated by `veloxbench report`; a change by hand is found by CI -->\n\n"
        f"Generated from {len(rows)} records by `veloxbench report`: every figure was measured on the real model, "
        "through the real cache, and none was typed. "
        f"Machine: {'; '.join(chips)}. Code: {', '.join(commits)}."
    )
    return text + (f" {superseded} older records of the same rows were left out." if superseded else "")


def _choosing_intro() -> str:
    return (
        "Quality is what attention loses by reading the compressed cache, against the same weights' fp16 cache on "
        "the same tokens. *Target* is what was asked of the method: a code width (scales cost extra) or, where "
        "marked ≤, an upper limit of bits_per_value. *bits/value* is read from the arrays held, everything counted; "
        "*memory* is 16 / that. ± and [ ] are 95% intervals over sequences. The last columns repeat what the "
        "mixed-precision guide claims for that target."
    )


def _choosing(model: str, rows: Sequence[Record]) -> list[str]:
    """One table for each text and size that the decode protocol (or else the first) was measured on."""
    arms = [r for r in rows if r.subject.method.name != REFERENCE]
    groups = _groups(arms, "perplexity")
    protocols = list(dict.fromkeys(group[0].subject.protocol for group in groups.values()))
    protocol = "decode" if "decode" in protocols else protocols[0] if protocols else None
    chosen = {title: group for title, group in groups.items() if group[0].subject.protocol == protocol}
    columns: list[Column] = [
        ("target", _target),
        ("method", lambda r: _method(r, with_target=False)),
        ("bits/value", _figure("bits_per_value", "{:.3f}")),
        ("memory", _memory_ratio),
        ("ΔPPL", _figure("delta_ppl")),
        ("ΔNLL", _figure("delta_nll")),
        ("KLD", _figure("kld_mean")),
        ("top-1", _figure("top1_agreement")),
        ("guide: memory", lambda r: _claim(r).memory),
        ("guide: ΔPPL", lambda r: _claim(r).delta_ppl),
    ]
    parts = []
    for title, group in chosen.items():
        where = title if len(chosen) > 1 else f"{protocol} protocol; text {group[0].subject.text.name}"
        listed = sorted(group, key=lambda r: (-(r.subject.method.target or 0), r.subject.method.name))
        parts.append(f"### {model} ({where})\n\n" + _table(columns, listed) + _partial_engagement(listed))
    return parts


def _claim(record: Record) -> Claim:
    return GUIDE_CLAIMS.get(record.subject.method.target or 0.0, Claim("", ""))


def _target(record: Record) -> str:
    method = record.subject.method
    if method.target is None:
        return ""
    return f"{'≤ ' if method.target_means == 'bits_per_value' else ''}{method.target:g}"


def _method(record: Record, *, with_target: bool = True) -> str:
    method = record.subject.method
    return (method if with_target else method.model_copy(update={"target": None})).label


def _memory_ratio(record: Record) -> str:
    bits = record.metrics.get("bits_per_value")
    return "" if bits is None else f"{16 / bits.value:.2f}x"


def _partial_engagement(rows: Sequence[Record]) -> str:
    partial = [r for r in rows if r.engagement and not all(layer.engaged for layer in r.engagement)]
    if not partial:
        return ""
    lines = []
    for record in partial:
        engaged = sum(layer.engaged for layer in record.engagement)
        others = sorted({layer.cache_class for layer in record.engagement if not layer.engaged})
        lines.append(
            f"{_method(record)}: {engaged} of {len(record.engagement)} layers; the others stay in {', '.join(others)}"
        )
    return "\n\nNot every layer is quantized. " + "; ".join(lines) + "."


def _model_section(model: str, rows: Sequence[Record]) -> list[str]:
    return [f"## {model}", *_quality(rows), *_memory(rows), *_throughput(rows), *_kernels(rows)]


def _groups(rows: Sequence[Record], suite: str) -> dict[str, list[Record]]:
    """Rows of a suite that share protocol, settings and tokens, by a line that says so."""
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in rows:
        if record.subject.suite == suite:
            settings = ", ".join(
                f"{name} {value}" for name, value in record.subject.settings.items() if name not in ("name", "seed")
            )
            title = f"{record.subject.protocol}: {settings}; text {record.subject.text.name}"
            groups.setdefault(title, {}).setdefault(record.subject.text.tokens_sha256, []).append(record)
    return {
        title + (f", tokens {sha256[:8]}" if len(texts) > 1 else ""): group
        for title, texts in groups.items()
        for sha256, group in texts.items()
    }


def _quality(rows: Sequence[Record]) -> list[str]:
    parts: list[str] = []
    for title, group in _groups(rows, "perplexity").items():
        columns: list[Column] = [
            ("method", _method),
            ("bits/value", _figure("bits_per_value", "{:.3f}")),
            ("PPL", _figure("ppl")),
            ("ΔNLL", _figure("delta_nll")),
            ("KLD mean", _figure("kld_mean")),
            ("median", _figure("kld_median", plain=True)),
            ("99%", _figure("kld_p99", plain=True)),
            ("99.9%", _figure("kld_p999", plain=True)),
            ("top-1", _figure("top1_agreement")),
            ("Δp RMS", _figure("delta_p_rms")),
        ]
        parts.append(f"### Quality, {title}\n\n{_table(columns, group)}\n\n{_floor(group)}")
    return parts


def _floor(group: Sequence[Record]) -> str:
    notes = []
    for record in group:
        floor = record.metrics.get("kld_floor_mean")
        if floor is not None:
            notes.append(
                f"Noise floor (fp16 against fp16, {len(record.samples['kld_floor'])} sequences): KLD "
                f"{floor.value:.2g}, at most {record.metrics['kld_floor_max'].value:.2g} at one position."
            )
        n = len(record.samples.get("nll", []))
        if record.subject.method.name == REFERENCE and 0 < n < GATE_SEQUENCES:
            notes.append(
                f"{n} sequences: enough to compare methods, too few for a gate (which needs {GATE_SEQUENCES})."
            )
    return " ".join(notes) + " KLD and NLL in nats per token." if notes else ""


def _allocation(rows: Sequence[Record]) -> list[str]:
    """Whether each allocation beats its shuffles and the next dearer uniform widths."""
    parts = []
    for title, group in _groups(rows, "perplexity").items():
        found = list(comparisons(group))
        if not found:
            continue
        body = [
            (
                _target(c.record),
                f"{c.record.metrics['bits_per_value'].value:.3f}",
                _figure("kld_mean")(c.record),
                c.rival,
                f"{c.rival_bits:.3f}",
                _significant(c.rival_kld),
                format_estimate(c.worse_by),
                c.verdict.split()[0],
            )
            for c in found
        ]
        header = ("target", "bits/value", "KLD", "against", "its bits/value", "its KLD", "worse by", "RateQuant is")
        table = tabulate(
            body, header, tablefmt="pipe", disable_numparse=True, colalign=("right",) * 3 + ("left",) + ("right",) * 4
        )
        said = [summary([c for c in found if c.record.id == own]) for own in dict.fromkeys(c.record.id for c in found)]
        n = len(found[0].record.samples["kld_mean"])
        parts.append(
            f"### Bit allocation, {title}\n\n{table}\n\n{'. '.join(said)}. "
            f"*Worse by* is the rival's KLD minus RateQuant's, nats per token, paired over {n} sequences."
        )
    if parts:
        parts[-1] += (
            " A shuffle deals RateQuant's own widths to other units at random: same bytes, no knowledge of the model. "
            "Of every uniform method the cheapest that costs more stands here, first the next larger cost of all."
        )
    return parts


def _memory(rows: Sequence[Record]) -> list[str]:
    parts = []
    for title, group in _groups(rows, "memory").items():
        budget = group[0].subject.settings.get("budget_gib")
        columns: list[Column] = [
            ("method", _method),
            ("bits/value", _figure("bits_per_value", "{:.3f}")),
            ("allocated", _figure("allocated_bits_per_value", "{:.3f}")),
            ("allocated, full buffers", _figure("filled_allocated_bits_per_value", "{:.3f}")),
            ("memory", _memory_ratio),
            ("cache MB", _megabytes("cache_bytes")),
            ("unaccounted MB", _megabytes("unaccounted_bytes")),
            ("static kB", _scaled("static_bytes", 1e3, "{:.1f}")),
            ("prefill peak MB", _megabytes("prefill_peak_bytes")),
            ("decode peak MB", _megabytes("decode_peak_bytes")),
            ("process peak MB", _megabytes("process_prefill_peak_bytes", "{:.0f}")),
            (f"tokens in {budget:g} GiB", _scaled("tokens_in_budget", 1, "{:,.0f}")),
        ]
        parts.append(
            f"### Memory, {title}\n\n{_table(columns, group)}\n\n"
            "Each arm in a process of its own. bits/value equals the method's formula exactly, or the run fails; "
            "*allocated* counts whole buffers, which grow in steps; *unaccounted* is what MLX holds beyond weights and "
            "the arrays counted. Peaks are MLX's, above the weights; the process peak is its resident size in prefill."
        )
    return parts


def _throughput(rows: Sequence[Record]) -> list[str]:
    parts = []
    for title, group in _groups(rows, "throughput").items():
        columns: list[Column] = [
            ("method", _method),
            ("decode vs fp16", _ratio("decode_speed_ratio")),
            ("prefill vs fp16", _ratio("prefill_speed_ratio")),
            ("first token vs fp16", _ratio("ttft_ratio")),
            ("decode tok/s", _figure("decode_tok_s", "{:.1f}", plain=True)),
            ("fp16 beside it", _figure("decode_tok_s_fp16", "{:.1f}", plain=True)),
            ("prefill tok/s", _figure("prefill_tok_s", "{:.0f}", plain=True)),
            ("first token s", _figure("ttft_s", "{:.2f}", plain=True)),
        ]
        parts.append(f"### Throughput, {title}\n\n{_table(columns, group)}")
    if parts:
        parts.append(
            "Ratios are geometric means over interleaved pairs with fp16 in one process: speeds above 1 beat "
            "fp16, a first token above 1 is later. The fp16 row pairs fp16 with itself: its distance from 1 is noise. "
            "A prefill ratio without an interval rests on one timing of each side. "
            "Absolute rates are this machine's at that moment; compare ratios."
        )
    return parts


def _kernels(rows: Sequence[Record]) -> list[str]:
    parts = []
    kinds = ("partials", "codebooks", "signs", "mask", "queries", "output")
    for tokens in dict.fromkeys(r.subject.settings["tokens"] for r in rows if r.subject.suite == "kernels"):
        group = [r for r in rows if r.subject.suite == "kernels" and r.subject.settings["tokens"] == tokens]
        columns: list[Column] = [
            ("method", _method),
            ("packed bytes", _scaled("packed_bytes", 1, "{:,.0f}")),
            ("read", _figure("packed_reads", "{:.3f}x")),
            ("all other traffic", _figure("other_percent", "{:.2f}%")),
            *((kind, _figure(f"{kind}_percent", "{:.2f}%")) for kind in kinds),
            ("head_dim", _figure("head_dim", "{:.0f}")),
            ("queries per KV head", _figure("queries_per_kv_head", "{:.0f}")),
        ]
        parts.append(
            f"### Kernels, fused decode attention over {tokens} packed tokens\n\n{_table(columns, group)}\n\n"
            "Bytes that one step moves for one KV head, counted by the emulator that runs the kernels' own text: how "
            "often each packed byte is read, and everything else in percent of the packed bytes. Exact on any machine."
        )
    return parts


def _provenance(rows: Sequence[Record]) -> list[str]:
    machines = {content_hash([r.provenance.hardware, r.provenance.versions]): r.provenance for r in rows}
    parts = ["## Provenance"]
    for provenance in machines.values():
        facts = [*provenance.hardware.items(), *provenance.versions.items()]
        parts.append(
            tabulate(
                [(name, "" if value is None else value) for name, value in facts], ("what", "value"), tablefmt="pipe"
            )
        )
    texts = sorted({(_block(r), r.subject.text.tokens_sha256[:16]) for r in rows if r.subject.text.name != "none"})
    weights = sorted({(r.subject.model.name, r.subject.model.weights_sha256[:16]) for r in rows})
    parts.append("Weights (sha256): " + ", ".join(f"{name} `{digest}`" for name, digest in weights) + ".")
    parts.append("Token blocks (sha256): " + ", ".join(f"{name} `{digest}`" for name, digest in texts) + ".")
    licences = sorted(
        {(r.subject.model.name, r.provenance.model_licence) for r in rows if r.provenance.model_licence}
        | {(r.subject.text.name, r.provenance.text_licence) for r in rows if r.provenance.text_licence}
    )
    if licences:
        parts.append("Licences: " + "; ".join(f"{name}: {licence}" for name, licence in licences) + ".")
    dirty = sum(bool(r.provenance.dirty) for r in rows)
    if dirty:
        parts.append(f"{dirty} of {len(rows)} records were made from a checkout with uncommitted changes.")
    table = [
        (
            r.id[:12] + (f" and {len(others)} more" if others else ""),
            r.subject.model.name,
            f"{r.subject.suite}/{r.subject.protocol}",
            _method(_as_listed(r)),
            r.status,
            f"{sum(one.provenance.seconds for one in (r, *others)):.1f}",
            (r.provenance.commit or "")[:12],
            f"{r.provenance.started:%Y-%m-%d %H:%M}",
        )
        for r, *others in _listed(rows)
    ]
    header = ("record", "model", "suite", "method", "status", "seconds", "commit", "started (UTC)")
    parts.append(tabulate(table, header, tablefmt="pipe", disable_numparse=True))
    return parts


def _listed(rows: Sequence[Record]) -> Iterable[list[Record]]:
    """Records that share a line: the shuffles of one allocation on one text."""
    lines: dict[str, list[Record]] = {}
    for record in rows:
        listed = _as_listed(record).subject
        lines.setdefault(content_hash(listed.model_dump(mode="json", exclude={"harness"})), []).append(record)
    return lines.values()


def _as_listed(record: Record) -> Record:
    """The record itself; of a shuffled allocation any, whatever its seed."""
    if not is_control(record):
        return record
    method = record.subject.method
    anyone = method.model_copy(update={"parameters": {**method.parameters, CONTROL: "…"}})
    return record.model_copy(update={"subject": record.subject.model_copy(update={"method": anyone})})


def _block(record: Record) -> str:
    """What a token block was read for: one text is read in windows of several sizes."""
    subject = record.subject
    return f"{subject.text.name} for {subject.model.name} {subject.suite}/{subject.protocol}"


def _machine(record: Record) -> str:
    """What a reader would call another machine, and the library that measured there."""
    hardware, versions = record.provenance.hardware, record.provenance.versions
    facts = [hardware["chip"], f"{hardware['physical_cores']} cores", hardware.get("device"), hardware.get("blas")]
    return ", ".join(str(fact) for fact in facts if fact) + (f", mlx {versions['mlx']}" if "mlx" in versions else "")


def _table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    """The rows; those of several machines say of which each is."""
    if len({_machine(record) for record in rows}) > 1:
        columns = [*columns, ("machine", _machine)]
    body = []
    for record in rows:
        cells = [cell(record) for _, cell in columns]
        if record.status == "unsupported":
            first_empty = next((i for i, cell in enumerate(cells) if not cell), len(cells) - 1)
            cells[first_empty] = record.reason or "not supported"
        body.append(cells)
    keep = [i for i in range(len(columns)) if any(row[i] for row in body)]
    header = [columns[i][0] for i in keep]
    aligned = ["left" if columns[i][0] == "method" else "right" for i in keep]
    return tabulate(
        [[row[i] for i in keep] for row in body], header, tablefmt="pipe", disable_numparse=True, colalign=aligned
    )


def _figure(name: str, form: str | None = None, *, plain: bool = False) -> Callable[[Record], str]:
    """A cell: the metric with its interval (``plain`` leaves the interval to the record)."""

    def cell(record: Record) -> str:
        estimate = record.metrics.get(name)
        return "" if estimate is None else format_estimate(estimate, form, plain=plain)

    return cell


def paired_ratio(record: Record, name: str) -> tuple[Estimate, int]:
    """A ratio of paired timings with its number of pairs, and without an interval where they are too few for one."""
    estimate = record.metrics[name]
    pairs = len(record.samples[f"{name.removesuffix('_ratio').removesuffix('_speed')}_arm"])
    if pairs < MIN_RATIO_PAIRS:  # records from before that rule carry one
        estimate = Estimate(value=estimate.value, unit=estimate.unit)
    return estimate, pairs


def _ratio(name: str) -> Callable[[Record], str]:
    """A cell: a ratio of paired timings, or its bare value where it has no interval."""

    def cell(record: Record) -> str:
        if name not in record.metrics:
            return ""
        estimate, pairs = paired_ratio(record, name)
        if estimate.low is None:
            return f"{_significant(estimate.value)} (n={pairs}, no interval)"
        return format_estimate(estimate)

    return cell


def _scaled(name: str, divisor: float, form: str) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        estimate = record.metrics.get(name)
        return "" if estimate is None else form.format(estimate.value / divisor)

    return cell


def _megabytes(name: str, form: str = "{:.2f}") -> Callable[[Record], str]:
    return _scaled(name, 1e6, form)


def format_estimate(estimate: Estimate, form: str | None = None, *, plain: bool = False) -> str:
    """``0.127 ± 0.012``, or ``3.7 [3.1, 4.4]`` where the interval is not symmetric; digits follow the interval."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if form is not None:
        return form.format(value)
    if plain or low is None or high is None:
        return _significant(value)
    half = (high - low) / 2
    if half == 0:
        return _significant(value)
    decimals = _decimals(half)
    if abs((high - value) - (value - low)) < 0.1 * half:
        return f"{value:.{decimals}f} ± {half:.{decimals}f}"
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _decimals(uncertainty: float) -> int:
    """Decimals that show two digits of the uncertainty."""
    return max(0, 1 - int(f"{uncertainty:e}".split("e")[1]))


def _significant(value: float) -> str:
    if value == 0:
        return "0"
    exponent = int(f"{value:e}".split("e")[1])
    return f"{value:.{max(0, 2 - exponent)}f}" if exponent >= -5 else f"{value:.2e}"
