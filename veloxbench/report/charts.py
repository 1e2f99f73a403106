"""Charts as Vega-Lite specifications, as SVG text (the same bytes every time) and as PNG.

A chart names no colours: :data:`THEMES` has those of a light and of a dark page, and :func:`svg` or the HTML page
chooses. What a reader of the HTML page may turn (context, unit, group, memory, methods) is a parameter; an SVG shows
the parameters' first values.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import altair as alt
import platformdirs
import vl_convert

from veloxbench.errors import UnfitEnvironmentError, printable
from veloxbench.records.journal import write_text
from veloxbench.records.quality_words import WORDS
from veloxbench.records.record import Record
from veloxbench.report.points import BEST, CONTEXTS, KLD_FLOOR, QUOTED

Drawn: TypeAlias = Any
"""A chart of altair's; its classes describe what they may hold, not what they are, and differ with what is drawn."""
VEGA_LITE = alt.SCHEMA_VERSION.lstrip("v").rpartition(".")[0]
DIM = "#808890"
"""What is drawn for comparison, on either page."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
"""Marks of the methods, in turn; the colour repeats the distinction."""
MARKS = "●■▲◆✚▼▶"
"""The same as characters, for legends in HTML."""
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
"""The first one comes with vl-convert, so that texts are as wide on every machine that draws."""


def _theme(ink: str, dim: str, grid: str, paper: str, colours: Sequence[str]) -> dict[str, Any]:
    guide = {
        "labelColor": ink,
        "titleColor": ink,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    return {
        "background": paper,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**guide, "gridColor": grid, "domainColor": dim, "tickColor": dim},
        "legend": {**guide, "labelLimit": 220},
        "title": {"color": ink, "fontSize": 11, "fontWeight": "normal"},
        "text": {"color": ink},
        "rule": {"color": dim},
        "style": {"dim-text": {"fill": dim}},
        "range": {"category": list(colours), "heatmap": {"scheme": "viridis"}},
    }


COLOURS = ("#0072B2", "#B54A00", "#007A5A", "#A8487F", "#806000", "#3E6FB0", "#6A3D9A", "#555555")
_ON_DARK = ("#56B4E9", "#FF9A5C", "#2ED3A0", "#F0A6CF", "#E6C34A", "#9CC4F0", "#B79CED", "#CCCCCC")
THEMES: Mapping[str, Mapping[str, Any]] = {
    "light": _theme("#1f2328", "#59636e", "#e4e8ec", "#ffffff", COLOURS),
    "dark": _theme("#e6edf3", "#9198a1", "#2d333b", "#0d1117", _ON_DARK),
}
"""Vega-Lite's configuration for each kind of page; the colours keep apart for readers with any colour vision."""


def svg(chart: Drawn, theme: str = "light") -> str:
    """The chart as an ``<svg>`` element whose text stays text."""
    drawn: str = vl_convert.vegalite_to_svg(
        chart.to_json(validate=False), vl_version=VEGA_LITE, config=dict(THEMES[theme])
    )
    return drawn + "\n"


def png(chart: Drawn, theme: str = "light") -> bytes:
    """The chart as a picture of twice its size in pixels."""
    content: bytes = vl_convert.vegalite_to_png(
        chart.to_json(validate=False), vl_version=VEGA_LITE, config=dict(THEMES[theme]), scale=2
    )
    return content


def vega_library() -> str:
    """Vega, Vega-Lite and vega-embed as one script; made once for each version of vl-convert and kept in the cache."""
    version = importlib.metadata.version("vl-convert-python")
    kept = Path(platformdirs.user_cache_dir("veloxbench")) / f"vega-{VEGA_LITE}-{version}.js"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    bundle: str = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]  # its stub: no default
    made = bundle.replace("</script", "<\\/script")
    with contextlib.suppress(OSError, UnfitEnvironmentError):  # without a cache it costs seconds
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, made)
    return made


def _data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=tuple(dict(row) for row in rows))  # altair copies a list with every layer and option


def _looks(methods: Sequence[str], named: Sequence[str] | None = None) -> dict[str, Any]:
    """Colour and shape of a method, the same in every chart of a page, and a legend of those that are named."""
    colour = alt.Scale(domain=list(methods), range="category")
    shape = alt.Scale(domain=list(methods), range=[SHAPES[i % len(SHAPES)] for i in range(len(methods))])
    shown = None
    if named is not None:
        shown = alt.Legend(orient="bottom", columns=3, title=None, values=list(named), symbolOpacity=1)
    return {
        "colour": alt.Color("method:N", scale=colour, legend=shown),
        "stroke": alt.Stroke("method:N", scale=colour, legend=shown),
        "fill": alt.Fill("method:N", scale=colour, legend=shown),
        "shape": alt.Shape("method:N", scale=shape, legend=shown),
    }


def _wide(height: int) -> dict[str, Any]:
    """As wide as its place on the page."""
    return {"width": "container", "height": height, "autosize": alt.AutoSizeParams(type="fit-x", contains="padding")}


def pareto(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], *, picture: bool = False) -> Drawn:
    """KLD over all-in bits or megabytes at a context: lower left is better.

    Args:
        rows: of one model, as :func:`veloxbench.report.points.rows` makes them.
        methods: every method of the page, in the order of their colours.
        picture: whether it must say by itself what the controls of a page would: it gets a legend.
    """
    shown = [row for row in rows if row["kind"] != "arm" or row["method"] in methods or row["tag"] == "fp16"]
    top = 10.0 ** math.ceil(math.log10(max([row["kld"] for row in shown if row["kind"] == "arm"] + [0.1])) + 0.05)
    shown = [row for row in shown if row["kind"] != "bound" or row["kld"] < top]
    parameters = [
        alt.param(name="step", value=CONTEXTS.index(QUOTED)),
        alt.param(name="unit", value="bits"),
        alt.param(name="group", value=BEST),
        alt.param(name="memory", value=0),
        alt.param(name="hidden", value=[]),
    ]
    place = {
        "x": alt.X(
            "x:Q",
            title=f"bits a value at {QUOTED:,} tokens, everything counted" if picture else None,
            scale=alt.Scale(type="log", base=2, nice=False, padding=16),
            axis=alt.Axis(grid=True, tickCount=5, format="~g", labelOverlap="greedy"),
        ),
        "y": alt.Y(
            "kld:Q",
            title="KLD, nats a token" if picture else None,
            scale=alt.Scale(type="log", domain=[KLD_FLOOR, top], nice=False, clamp=True),
            axis=alt.Axis(grid=True, values=[10.0**n for n in range(-4, 3) if 10.0**n <= top], format="~g"),
        ),
    }
    base = (
        alt.Chart(_data(shown))
        .transform_filter("datum.group == group")
        .transform_calculate(
            x="unit == 'bits' ? datum.bits_at[step] : datum.mb_at ? datum.mb_at[step] : null",
            fits="!(memory > 0) ? 1 : datum.need_at ? (datum.need_at[step] <= memory ? 1 : 0.15) : 0.4",
            size="datum.speed ? clamp(110 * datum.speed, 15, 200) : 45",
            held="datum.x == null ? '' : unit == 'bits' ? format(datum.bits_at[step], '.2f') + ' bits a value' : ''",
        )
        .transform_filter("isValid(datum.x)")
    )
    arms = base.transform_filter("datum.kind == 'arm' && indexof(hidden, datum.method) < 0").transform_calculate(
        all_in="format(datum.bits_at[step], '.2f')"
        " + (datum.mb_at ? ', ' + format(datum.mb_at[step], '.1f') + ' MB' : '')",
        needs="datum.need_at ? format(datum.need_at[step], '.2f') + ' GB' : 'not measured'",
    )
    looks = _looks(
        methods, [name for name in methods if name in {row.get("method") for row in shown}] if picture else None
    )
    opacity = alt.Opacity("fits:Q", scale=None, legend=None)
    hover = [
        alt.Tooltip(f"{field}:N", title=title)
        for field, title in (
            ("arm", "cache"),
            ("all_in", "bits a value, size"),
            ("tables", "tables"),
            ("kld_text", "KLD, nats a token"),
            ("p99_text", "99% of positions"),
            ("top1_text", "same top token"),
            ("ppl_text", "ΔPPL"),
            ("verdict", "verdict"),
            ("speed_text", "decode speed / fp16"),
            ("needs", "needs at the peak"),
            ("machine", "machine"),
            ("record", "record"),
        )
    ]
    measured = arms.transform_filter("datum.tag != 'fp16'")
    lines = measured.mark_line(strokeWidth=1, strokeOpacity=0.45).encode(
        **place, color=looks["colour"], detail="series:N", order="target:Q"
    )
    intervals = measured.mark_rule(strokeWidth=1.5).encode(
        place["x"], alt.Y("low:Q"), alt.Y2("high:Q"), color=looks["colour"], opacity=opacity
    )
    marks = measured.mark_point(strokeWidth=1.5).encode(
        **place,
        fill=looks["fill"],
        stroke=looks["stroke"],
        shape=looks["shape"],
        fillOpacity=alt.condition("datum.counted", alt.value(1), alt.value(0)),
        size=alt.Size("size:Q", scale=None, legend=None),
        opacity=opacity,
        tooltip=hover,
    )
    tags = (
        measured.transform_filter("datum.front")
        .mark_text(dx=7, dy=-7, fontSize=10, align="left")
        .encode(**place, text="tag:N", opacity=opacity)
    )
    reference = arms.transform_filter("datum.tag == 'fp16'")
    claims = base.transform_filter("datum.kind == 'claim'")
    bound = base.transform_filter("datum.kind == 'bound'")
    told = [alt.Tooltip("arm:N", title="what")]
    layers = [
        *_words(top),
        bound.mark_line(color=DIM, strokeDash=[4, 3], strokeWidth=1).encode(**place, tooltip=told),
        claims.mark_rule(color=DIM, strokeWidth=5, strokeOpacity=0.7, strokeCap="butt").encode(
            place["x"], alt.Y("low:Q"), alt.Y2("high:Q"), tooltip=told
        ),
        lines,
        intervals,
        reference.mark_text(text="fp16", dy=-8, fontSize=10, fontWeight="bold").encode(**place, tooltip=hover),
        reference.mark_point(color=DIM, shape="triangle-down", size=40).encode(**place, tooltip=hover),
        marks,
        tags,
    ]
    under = "(unit == 'bits' ? 'bits a value' : 'MB') + ' at ' + format(pow(2, step + 9), ',') + ' tokens, all counted'"
    chart = alt.layer(*layers).add_params(*parameters)
    if picture:
        return chart.properties(width=300, height=300)
    title = alt.TitleParams(text=alt.ExprRef(under), orient="bottom", anchor="middle", offset=4)
    return chart.properties(title=title, **_wide(310))


def _words(top: float) -> list[Drawn]:
    """A line at each limit of a verdict's mean KLD, with the word under it."""
    limits = [{"at": min(word.kld_mean, top), "word": word.word} for word in WORDS]
    words = alt.Chart(_data(limits))
    lines = words.mark_rule(strokeDash=[2, 3], strokeOpacity=0.6).encode(y="at:Q")
    return [
        lines,
        words.mark_text(style="dim-text", align="left", dx=3, dy=8, fontSize=10).encode(
            x=alt.value(0), y="at:Q", text="word:N"
        ),
    ]


def speeds(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Drawn | None:
    """Decode speed over fp16's in the same run, arm by arm, with intervals; 1 is fp16. None where none was timed."""
    timed = [
        row for row in rows if row["kind"] == "arm" and row["group"] == BEST and row["speed"] and row["tag"] != "fp16"
    ]
    if not timed:
        return None
    base = alt.Chart(_data(timed))
    y = alt.Y("arm:N", title=None, sort=None, axis=alt.Axis(labelLimit=170))
    looks = _looks(methods)
    hover = [alt.Tooltip("arm:N", title="cache"), alt.Tooltip("speed_text:N", title="decode speed / fp16")]
    hover += [alt.Tooltip("machine:N"), alt.Tooltip("record:N")]
    x = alt.X("speed:Q", title="decode speed / fp16's", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5))
    marks = base.mark_point(size=60, fillOpacity=1).encode(
        x, y, fill=looks["fill"], shape=looks["shape"], stroke=alt.value(None), tooltip=hover
    )
    bars = (
        base.transform_filter("isValid(datum.speed_low)")
        .mark_rule(strokeWidth=1.5)
        .encode(alt.X("speed_low:Q"), y, x2="speed_high:Q", color=looks["colour"])
    )
    one = alt.Chart(_data([{"at": 1.0}])).mark_rule(strokeDash=[4, 3]).encode(x="at:Q")
    return alt.layer(one, bars, marks).properties(**_wide(20 * len({row["arm"] for row in timed}) + 4))


_TO = "kld_mean_to_"
"""Begins the names of the task ``by depth``, whose ends are positions."""

PHASES = (
    ("held, tables with it", ("cache_bytes", "static_bytes")),
    ("peak of decode", ("decode_peak_bytes",)),
    ("peak of prefill", ("prefill_peak_bytes",)),
)


def phases(records: Sequence[Record]) -> Drawn | None:
    """Bytes above the weights by phase, arm by arm, at the length that most arms were measured at.

    Args:
        records: of one model.
    """
    memory = [record for record in records if record.subject.suite == "memory" and record.status == "measured"]
    if not memory:
        return None
    lengths = Counter(int(str(record.subject.settings["tokens"])) for record in memory)
    tokens = max(lengths, key=lambda length: (lengths[length], length))
    bars = [
        {
            "arm": printable(record.subject.method.label),
            "phase": phase,
            "mb": sum(record.metrics[name].value for name in names) / 1e6,
            "record": record.id[:12],
        }
        for record in memory
        if record.subject.settings["tokens"] == tokens
        for phase, names in PHASES
    ]
    order = [phase for phase, _ in PHASES]
    return (
        alt.Chart(_data(bars))
        .mark_bar()
        .encode(
            alt.X("mb:Q", title=f"MB above the weights, {tokens:,} tokens", axis=alt.Axis(tickCount=5)),
            alt.Y("arm:N", title=None, sort=None, axis=alt.Axis(labelLimit=170)),
            alt.YOffset("phase:N", sort=order),
            alt.Color("phase:N", sort=order, title=None, legend=alt.Legend(orient="bottom", columns=1)),
            tooltip=["arm:N", "phase:N", alt.Tooltip("mb:Q", format=".2f", title="MB"), "record:N"],
        )
        .properties(**_wide(22 * len({bar["arm"] for bar in bars})))
    )


def by_position(records: Sequence[Record], methods: Sequence[str]) -> Drawn | None:
    """KLD by how deep in the text it is scored, arm by arm, with intervals. None where no record tells.

    Args:
        records: of one model; those of the retrieval suite's task ``by depth`` tell.
    """
    deep = [r for r in records if r.subject.protocol == "by depth" and r.status == "measured"]
    lengths = Counter(int(str(r.subject.settings["length"])) for r in deep)
    spots = [
        {
            "arm": printable(record.subject.method.label),
            "method": printable(record.subject.method.name),
            "position": int(name.removeprefix(_TO)),
            "kld": found.value,
            "low": found.low,
            "high": found.high,
            "record": record.id[:12],
        }
        for record in deep
        if record.subject.settings["length"] == max(lengths, key=lambda length: (lengths[length], length))
        for name, found in record.metrics.items()
        if name.startswith(_TO) and found.value > 0
    ]
    if not spots:
        return None
    base = alt.Chart(_data(spots)).encode(
        alt.X("position:Q", title="scored up to this token of the text", scale=alt.Scale(zero=True)),
        color=_looks(methods)["colour"],
        detail="arm:N",
    )
    hover = ["arm:N", alt.Tooltip("position:Q", title="up to token"), alt.Tooltip("kld:Q", format=".2g"), "record:N"]
    y = alt.Y("kld:Q", title="KLD, nats a token", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=5))
    lines = base.mark_line(point=True).encode(y, tooltip=hover)
    bars = base.transform_filter("datum.low > 0").mark_rule().encode(alt.Y("low:Q"), y2="high:Q")
    return alt.layer(lines, bars).properties(**_wide(260))


def layer_bits(records: Sequence[Record]) -> Drawn | None:
    """Bits of keys and values by layer, of arms whose layers differ. None where there is none.

    Args:
        records: of one model, the newest of each row.
    """
    by_arm = {
        printable(record.subject.method.label): record
        for record in records
        if record.subject.suite in ("memory", "perplexity") and "calibration" not in record.subject.text.name
    }
    cells = [
        {"arm": f"{side} {arm}", "layer": layer.layer, "bits": bits}
        for arm, record in by_arm.items()
        if len({(layer.key_bits, layer.value_bits) for layer in record.engagement if layer.engaged}) > 1
        for layer in record.engagement
        for side, bits in (("K", layer.key_bits), ("V", layer.value_bits))
        if bits is not None
    ]
    return _heat(cells, "bits", "bits of a code", "linear") if cells else None


def sensitivity(entry: Mapping[str, Any]) -> Drawn:
    """What a code of 2 bits in one layer's keys or values would lose, forecast: as ``sensitivity.json`` has it."""
    cells = [
        {"arm": side, "layer": row["layer"], "nats": row[f"{side}_forecast_nats"]}
        for row in entry["layers"]
        for side in ("keys", "values")
    ]
    return _heat(cells, "nats", "nats lost at 2 bits", "log")


def _heat(cells: Sequence[Mapping[str, Any]], field: str, title: str, scale: Literal["linear", "log"]) -> Drawn:
    hover: list[Any] = ["arm:N", "layer:O", alt.Tooltip(f"{field}:Q", format=".3g", title=title)]
    return (
        alt.Chart(_data(cells))
        .mark_rect()
        .encode(
            alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            alt.Y("arm:N", title=None, sort=None, axis=alt.Axis(labelLimit=200)),
            alt.Color(
                f"{field}:Q",
                title=title,
                scale=alt.Scale(type=scale, scheme="viridis"),
                legend=alt.Legend(orient="bottom", gradientLength=120, tickCount=4),
            ),
            tooltip=hover,
        )
        .properties(**_wide(16 * len({cell["arm"] for cell in cells})))
    )


HISTORIES = (
    ("kld_mean", "KLD, nats a token"),
    ("decode_speed_ratio", "decode speed / fp16's"),
)


def history(series: Mapping[str, Sequence[Record]], changes: Mapping[str, str]) -> dict[str, Drawn]:
    """A figure of each row over the records that it has, by the figure's name: only rows of more than one record.

    Args:
        series: records of one row, by a title that tells it from others.
        changes: by a record's id, what changed with it: its point gets a ring that says so.
    """
    charts = {}
    for metric, title in HISTORIES:
        spots = [
            {
                "row": printable(name),
                "at": record.provenance.started.isoformat(),
                "value": record.metrics[metric].value,
                "low": record.metrics[metric].low,
                "high": record.metrics[metric].high,
                "commit": (record.provenance.commit or "")[:12],
                "record": record.id[:12],
                "change": changes.get(record.id),
            }
            for name, records in series.items()
            if len(records) > 1
            for record in records
            if metric in record.metrics
        ]
        if spots:
            charts[title] = _over_time(spots, title)
    return charts


def _over_time(spots: Sequence[Mapping[str, Any]], title: str) -> Drawn:
    base = alt.Chart(_data(spots)).encode(
        alt.X("at:T", title="measured", axis=alt.Axis(labelOverlap="greedy", tickCount=4)),
        alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        alt.Color("row:N", title=None, legend=alt.Legend(orient="bottom", columns=1, labelLimit=280)),
    )
    hover: list[Any] = ["row:N", alt.Tooltip("value:Q", format=".4g", title=title), "commit:N", "record:N"]
    lines = base.mark_line(point=True).encode(tooltip=hover)
    rings = base.transform_filter("isValid(datum.change)").mark_point(size=220, strokeWidth=2, shape="diamond")
    return alt.layer(lines, rings.encode(tooltip=[*hover, alt.Tooltip("change:N")])).properties(**_wide(220))


def specification(chart: Drawn) -> dict[str, Any]:
    """The chart as JSON for the HTML page, which brings its own colours."""
    spec: dict[str, Any] = json.loads(chart.to_json(validate=False))
    spec.pop("config", None)
    return spec
