"""What ``veloxbench recommend`` answers, on records whose answers are known, and on those that ship."""

import itertools
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gate_records import SOMEWHERE

from veloxbench.cli.app import _run
from veloxbench.cli.recommend import lines_of_use
from veloxbench.errors import UsageError
from veloxbench.inputs.models import resolve_model
from veloxbench.methods.veloxquant import configuration
from veloxbench.records.arm import Arm
from veloxbench.records.quality_words import WORDS, quality_word, word_named
from veloxbench.records.record import Estimate, LayerEngagement, MethodRef, ModelRef, Record, Subject, TextRef
from veloxbench.records.store import read_records
from veloxbench.report.recommend import Footprint, Wish, recommend
from veloxbench.report.recommend_page import answer_as_json, render_answer
from veloxquant_mlx.cache.base import KVCacheConfig

MODEL = ModelRef(name="m", weights_sha256="a", tokenizer_sha256="b", config_sha256="c")
MB = 1e6


def record(arm, suite, settings, metrics, engagement=(), samples=None, protocol="p"):
    parsed = Arm.parse(arm)
    return Record.create(
        subject=Subject(
            suite=suite,
            protocol=protocol,
            model=MODEL,
            method=MethodRef(**parsed.model_dump(), implementation="1"),
            text=TextRef(name="prose", tokens_sha256="t"),
            settings=settings,
            harness="h",
            machine_class="k",
        ),
        status="measured",
        metrics=metrics,
        samples=samples or {},
        engagement=list(engagement),
        provenance=SOMEWHERE,
    )


def estimate(value, low=None, high=None):
    return Estimate(value=value, low=low, high=high, unit="")


def layer(index, tokens, used_bytes, n_values=None):
    return LayerEngagement(
        layer=index,
        cache_class="C",
        claimed=True,
        engaged=True,
        stored_dtypes=["uint32"],
        tokens=tokens,
        n_values=tokens * 1000 if n_values is None else n_values,
        used_bytes=used_bytes,
        allocated_bytes=int(used_bytes),
    )


def memory(arm, bits, *, static=0.0, working=10 * MB, layers=None):
    """100 tokens of 1,000 values: 16 bits are 200 kB; 1,000,000 bytes of weights."""
    layers = layers or [layer(0, 100, 100 * 1000 * bits / 8)]
    held = sum(one.used_bytes for one in layers)
    figures = {
        "weight_bytes": MB,
        "static_bytes": static,
        "cache_bytes": held,
        "prefill_peak_bytes": held + static + working,
        "decode_peak_bytes": held + static,
    }
    return record(arm, "memory", {"tokens": 100}, {k: estimate(v) for k, v in figures.items()}, layers)


def quality(arm, kld, p99=None, top1=0.99, spread=0.0):
    metrics = {
        "kld_mean": estimate(kld, kld - spread, kld + spread),
        "kld_p99": estimate(8 * kld if p99 is None else p99),
        "top1_agreement": estimate(top1, top1 - 0.01, top1 + 0.01),
    }
    settings = {"name": "decode", "prefix": 40, "steps": 10}
    return record(arm, "perplexity", settings, metrics, samples={"kld_mean": [kld] * 16}, protocol="decode")


def throughput(arm, ratio, low):
    return record(arm, "throughput", {"depth": 100}, {"decode_speed_ratio": estimate(ratio, low, 2 * ratio - low)})


RECORDS = [
    memory("fp16", 16),
    *(memory("affine@8", 8.5), quality("affine@8", 0.0004), throughput("affine@8", 0.9, 0.85)),
    *(memory("fine@4", 4.25), quality("fine@4", 0.009, top1=0.95, spread=0.002), throughput("fine@4", 0.7, 0.6)),
    *(memory("coarse@2", 2.25), quality("coarse@2", 1.0, top1=0.47), throughput("coarse@2", 0.7, 0.6)),
    *(memory("tables@2", 2.0, static=50_000), quality("tables@2", 0.005, top1=0.96)),
    memory("unread@3", 3.0),
]


def on_another_machine(record, chip="Apple M4"):
    """The same record from elsewhere."""
    kept = {name: getattr(record, name) for name in ("status", "metrics", "samples", "engagement", "subject")}
    return Record.create(**kept, provenance=SOMEWHERE.model_copy(update={"hardware": {"chip": chip}}))


def test_figures_of_two_machines_are_not_mixed():
    """This chip's records are taken where it has any, the others' named; otherwise those of the machine with most."""
    apple = [on_another_machine(each) for each in (memory("fine@4", 5.0), quality("fine@4", 0.004, top1=0.95))]
    wish = Wish(context=100)
    here, there = (recommend("m", [*RECORDS, *apple], wish, 100, chip) for chip in ("c", "Apple M4"))
    assert (len(here.candidates), here.elsewhere) == (5, ("Apple M4",))
    assert ([str(one.arm) for one in there.candidates], there.elsewhere) == (["fine@4"], ("c",))
    assert recommend("m", [*RECORDS, *apple], wish, 100, "another").candidates == here.candidates
    assert "records of Apple M4 are there too and were left out" in render_answer(here, [])
    assert "left out" not in render_answer(recommend("m", RECORDS, wish, 100), [])


def chosen(limit=10_000, **wish):
    answer = recommend("m", RECORDS, Wish(**{"context": 100, **wish}), limit)
    return None if answer.choice is None else str(answer.choice.arm)


def test_a_word_needs_the_worst_ends_of_all_three_intervals():
    """A mean of .009 that may be .011 is not good, nor is one whose tail or changed tokens are too many."""
    good = {"kld_mean": estimate(0.009), "kld_p99": estimate(0.09), "top1_agreement": estimate(0.95)}
    assert quality_word(good).word == "good"
    for worse in (
        {"kld_mean": estimate(0.009, 0.007, 0.011)},
        {"kld_p99": estimate(0.09, 0.05, 0.2)},
        {"top1_agreement": estimate(0.95, 0.9, 0.99)},
    ):
        assert quality_word(good | worse).word == "noticeable"
    assert quality_word(good | {"kld_mean": estimate(0.2)}).word == "bad"
    del good["kld_p99"]
    assert quality_word(good) is None


def test_words_get_stricter_upwards():
    """Each limit of a better word is inside that of the next."""
    for better, worse in itertools.pairwise(WORDS):
        assert better.kld_mean < worse.kld_mean
        assert better.kld_p99 < worse.kld_p99
        assert better.top1 > worse.top1


def test_a_bound_on_quality_gives_the_smallest_cache_within_it():
    """8.5 bits lose .0004; of the smaller ones only what may lose more than the bound is left out."""
    assert chosen(max_kld=0.001) == "affine@8"
    assert chosen(max_kld=2.0) == "coarse@2"
    assert chosen(verdict=word_named("lossless")) == "affine@8"
    assert chosen(max_kld=1e-6) == "fp16"


def test_the_bound_holds_for_the_upper_end_of_the_interval():
    """.009 that may be .011 does not keep .010, though it is the smaller cache, and keeps .0111."""
    assert chosen(max_kld=0.010) == "tables@2"
    assert chosen(max_kld=0.0111) == "fine@4"


def test_tables_count_in_full_at_every_context():
    """50 kB of tables make 2 bits the larger cache at 100 tokens (75 kB against 53) and the smaller one at 10,000."""
    few, many = (recommend("m", RECORDS, Wish(tokens, max_kld=0.02), 10_000) for tokens in (100, 10_000))
    assert str(few.choice.arm) == "fine@4"
    assert few.choice.footprint.all_in(100) == 100 * 1000 * 4.25 / 8
    assert str(many.choice.arm) == "tables@2"
    assert many.choice.footprint.all_in(10_000) == 10_000 * 1000 * 2 / 8 + 50_000


def test_memory_alone_gives_the_best_quality_that_fits_at_the_peak():
    """Weights 1 MB and working memory 10 MB leave .2 MB for fp16 at 100 tokens, not less."""
    assert chosen(memory=int(11.2 * MB)) == "fp16"
    assert chosen(memory=int(11.19 * MB)) == "affine@8"
    assert chosen(memory=int(10.9 * MB)) is None


def test_the_longest_context_counts_the_peak():
    """Of 21 MB, 1 are weights; 100 tokens need 10 of working memory and .2 of cache: 196 tokens fit, not 10,000."""
    footprint = Footprint(memory("fp16", 16))
    longest = footprint.longest(21 * MB, 10_000)
    assert longest == int(20 * MB / (0.1 * MB + 2000))
    assert footprint.resident(10_000) < 21 * MB


def test_a_sliding_layer_grows_to_its_window_only():
    """Two layers at 100 tokens, one of which held 40: at 1,000 it still holds 40."""
    footprint = Footprint(memory("x@4", 4, layers=[layer(0, 100, 1000.0), layer(1, 40, 400.0)]))
    assert footprint.resident(1000) == 10_000 + 400
    assert footprint.values(1000) == 1000 * 1000 + 40 * 1000


def test_speed_is_held_by_the_lower_end_and_by_nothing_unmeasured():
    """.7 that may be .6 does not keep .65; an arm that was not timed keeps no bound."""
    assert chosen(max_kld=0.02, speed=0.6) == "fine@4"
    assert chosen(max_kld=0.02, speed=0.65) == "affine@8"
    assert chosen(context=10_000, max_kld=0.02, speed=0.6) == "fine@4"
    assert chosen(context=10_000, max_kld=0.02) == "tables@2"


def test_without_a_bound_the_smallest_good_cache_is_chosen():
    """What may lose .011 nats is not good; 8.5 bits are."""
    answer = recommend("m", RECORDS, Wish(100), 10_000)
    assert answer.wish.verdict.word == "good"
    assert str(answer.choice.arm) == "tables@2"


def test_nothing_beats_the_pareto_set():
    """At 100 tokens tables@2 takes 75 kB, more than fine@4, and loses less: both stay; all stay here."""
    answer = recommend("m", RECORDS, Wish(100), 10_000)
    assert [str(one.arm) for one in answer.pareto] == ["coarse@2", "fine@4", "tables@2", "affine@8", "fp16"]
    worse = [*RECORDS, memory("worse@3", 9.0), quality("worse@3", 0.3, top1=0.7)]
    assert "worse@3" not in [str(one.arm) for one in recommend("m", worse, Wish(100), 10_000).pareto]


def test_an_arm_without_figures_is_named_and_never_chosen():
    """Bytes without quality, or the reverse, are no candidate."""
    answer = recommend("m", RECORDS, Wish(100), 10_000)
    assert [(str(arm), missing) for arm, missing in answer.without] == [("unread@3", "no record of quality")]
    assert "- unread@3: no record of quality" in render_answer(answer, [])


@pytest.mark.parametrize("context", [0, 10_001])
def test_a_context_beyond_the_models_is_refused(context):
    """The message has both numbers."""
    with pytest.raises(UsageError, match=rf"context {context:,} is not between 1 and the 10,000 tokens"):
        recommend("m", RECORDS, Wish(context), 10_000)


def test_a_model_without_records_is_told_how_to_get_them():
    """No answer is made up."""
    with pytest.raises(UsageError, match="--measure"):
        recommend("m", [], Wish(100), 10_000)


def test_what_goes_beyond_the_measurement_is_said():
    """Another length, another text, another machine, and sequences shorter than the context."""
    page = render_answer(recommend("m", RECORDS, Wish(5000, max_kld=0.001), 10_000), ["$ use it"], "another chip")
    assert "measured at 100 tokens (512 at a time) and are scaled to 5,000" in page
    assert "sequences of up to 50 tokens, not of 5,000" in page
    assert "speed was measured on c, not on this another chip" in page
    assert "$ use it" in page


def test_json_has_the_figures_of_the_page():
    """Labels, bytes, intervals and objections, and the ids of the records behind them."""
    answer = recommend("m", RECORDS, Wish(100, max_kld=0.001), 10_000)
    told = json.loads(json.dumps(answer_as_json(answer, ["line"])))
    assert told["choice"] == "affine@8"
    by_name = {one["cache"]: one for one in told["candidates"]}
    assert by_name["affine@8"]["all_in_bytes"] == 106_250
    assert by_name["coarse@2"]["objections"] == ["its KLD may be 1, above 0.001"]
    assert set(by_name["affine@8"]["records"]) == {r.id for r in RECORDS if r.subject.method.name == "affine"}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("turboquant_mse@4:sinks=4", KVCacheConfig("turboquant_mse", code_bits=4, sinks=4)),
        ("ternary@1.6", KVCacheConfig("ternary")),
        ("turboquant_prod_adaptive@4", KVCacheConfig("turboquant_prod_adaptive", max_bits=4)),
    ],
)
def test_the_python_line_builds_the_arm(label, expected):
    """Evaluated as it is printed, it is the configuration of that method, target and parameters."""
    arguments = configuration(Arm.parse(label))
    assert eval(f"KVCacheConfig({', '.join(arguments)})") == expected
    lines = lines_of_use("m", Arm.parse(label), bounded=False)
    assert lines[-1] == f"$ veloxbench generate --model m --cache {label} --prompt Hello"
    assert [line.split("(")[0] for line in lines[:4]][-1] == "attach"


def test_a_cache_that_calibrates_is_loaded_with_its_model():
    """RateQuant's widths are no literal: the model is loaded with the arm, which calibrates it."""
    lines = lines_of_use("m", Arm.parse("ratequant@4"), bounded=False)
    assert lines[2] == 'model, tokenizer = load("m", "ratequant@4")'
    assert lines[-1] == "$ veloxbench generate --model m --cache ratequant@4 --prompt Hello"


def test_the_lines_and_the_command_run(capsys):
    """As they are printed: the Python makes mlx-lm build packed caches, the command answers and says what they hold."""
    wish = ["--max-kld", "0.06", "--speed", "0.5", "--context", "2k"]
    assert _run(["recommend", "--model", "smollm2-135m", "--json", *wish]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["choice"] == "turboquant_mse@4"
    resolve_model("smollm2-135m")
    *python, _, command = told["use"]
    shown = "from mlx_lm.models.cache import make_prompt_cache; print(type(make_prompt_cache(model)[0]).__name__)"
    words = [sys.executable, "-m", "veloxbench.cli", *shlex.split(command)[2:], "--max-tokens", "4"]
    done = [
        subprocess.run(each, capture_output=True, text=True, check=False)
        for each in ([sys.executable, "-c", "\n".join([*python, shown])], words)
    ]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert done[0].stdout.strip() == "PackedKVCache"
    assert "turboquant_mse@4: " in done[1].stderr


def test_mlx_lms_own_caches_are_used_through_mlx_lm():
    """Its quantized cache from the first token on, as it was measured, and prompts read in the measured steps."""
    lines = lines_of_use("m", Arm.parse("mlx-affine@4:group_size=32"), bounded=True)
    assert "kv_bits=4, kv_group_size=32, quantized_kv_start=0" in lines[2]
    assert lines[-1].endswith("--prefill-step-size 512")
    assert "kv_bits" not in "".join(lines_of_use("m", Arm.parse("fp16"), bounded=False))


@pytest.mark.parametrize(
    ("model", "wish"),
    [
        ("smollm2-135m", ["--min-verdict", "noticeable"]),
        ("gemma3-270m", ["--memory", "8GB", "--context", "32k"]),
        ("qwen2.5-coder-0.5b", ["--speed", "0.5"]),
    ],
)
def test_the_records_that_ship_give_an_answer(model, wish, capsys):
    """For each model that has records: a choice that keeps the wish, with a command; no weights are needed."""
    assert _run(["recommend", "--model", model, "--json", *wish]) == 0
    told = json.loads(capsys.readouterr().out)
    (choice,) = (one for one in told["candidates"] if one["cache"] == told["choice"])
    assert not choice["objections"]
    assert told["use"][-1].startswith(f"$ veloxbench generate --model {model} --cache ")


def test_a_wish_that_nothing_keeps_is_exit_1_with_the_nearest(capsys):
    """One megabyte holds no model: no arm is chosen, and the reasons are given."""
    assert _run(["recommend", "--model", "smollm2-135m", "--memory", "1MB", "--context", "1k"]) == 1
    printed = capsys.readouterr()
    assert "Nothing that was measured keeps that. The nearest is" in printed.out
    assert "nothing that was measured keeps the wish" in printed.err


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--memory", "8 apples"], "--memory '8 apples' is no size"),
        (["--memory", "nan"], "--memory 'nan' is no size"),
        (["--context", "-4"], "--context '-4' is no size"),
        (["--max-kld", "nan"], "--max-kld nan must be a finite number above zero"),
        (["--speed", "-1"], "--speed -1.0 must be a finite number above zero"),
        (["--min-verdict", "fine"], "unknown verdict 'fine'; did you mean"),
        (["--context", "1m"], "is not between 1 and the 8,192 tokens"),
    ],
)
def test_a_wrong_wish_is_one_sentence(wrong, sentence, capsys):
    """Exit code 4 and the rule."""
    assert _run(["recommend", "--model", "smollm2-135m", *wrong]) == 4
    assert sentence in capsys.readouterr().err


def test_the_reference_fits_or_does_not_like_any_other():
    """fp16 has no loss, and its peak counts as the others' do."""
    answer = recommend("m", RECORDS, Wish(100, memory=int(11.2 * MB)), 10_000)
    assert answer.choice.is_reference
    assert replace(answer.wish, memory=1).memory == 1
    assert answer.choice.objections(replace(answer.wish, memory=1))


HELD_OUT = """
summary = "the choice on text that no figure comes from"
models = ["smollm2-135m"]
part = "calibration"
suites = ["perplexity"]
arms = ["{arm}"]

[[protocols]]
name = "decode"
sequences = 16
prefix = {prefix}
steps = {steps}
"""


@pytest.mark.slow
def test_held_out_text_confirms_what_the_answer_says(tmp_path, capsys, record_property):
    """The loss and the changed tokens of the choice, measured on articles that neither it nor its figures have seen.

    WikiText-2's validation part for figures of its test part: a difference of two means is within the root of the sum
    of their half intervals squared in 95 of 100 cases.
    """
    shipped = Path(__file__).parents[3] / "records" / "smollm2-135m.jsonl"
    wish = ["--min-verdict", "noticeable", "--speed", "0.5", "--context", "2k", "--records", str(shipped)]
    assert _run(["recommend", "--model", "smollm2-135m", "--json", *wish]) == 0
    told = json.loads(capsys.readouterr().out)
    (said,) = (one for one in told["candidates"] if one["cache"] == told["choice"])
    behind = {record.id: record for record in read_records(shipped)}
    (quoted,) = (behind[id] for id in said["records"] if behind[id].subject.suite == "perplexity")
    assert quoted.subject.protocol == "decode"
    grid = tmp_path / "held-out.toml"
    settings = {name: quoted.subject.settings[name] for name in ("prefix", "steps")}
    grid.write_text(HELD_OUT.format(arm=told["choice"], **settings))
    assert _run(["run", "--profile", str(grid), "--out", str(tmp_path / "held-out")]) == 0
    (measured,) = (r for r in read_records(tmp_path / "held-out") if str(r.subject.method.alone) == told["choice"])
    assert measured.subject.text.tokens_sha256 != quoted.subject.text.tokens_sha256
    for name in ("kld_mean", "top1_agreement"):
        one, other = quoted.metrics[name], measured.metrics[name]
        apart = abs(one.value - other.value)
        allowed = math.hypot(*((estimate.high - estimate.low) / 2 for estimate in (one, other)))
        record_property(
            name, f"{one.value:.4f} said, {other.value:.4f} measured, {apart / allowed:.2f} of the interval"
        )
        assert apart <= allowed
