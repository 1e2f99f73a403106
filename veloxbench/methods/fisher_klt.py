"""``fisher_klt`` of the reference implementation: calibrated once per model, fitted once per target, kept on disk."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import veloxquant_kernels
import veloxquant_mlx
from veloxbench.inputs.corpora import load_text
from veloxbench.methods.registry import BuildContext, register
from veloxbench.methods.veloxquant import counted_formula, implementation, kept
from veloxbench.records.provenance import source_hash
from veloxbench.records.record import content_hash
from veloxquant_mlx.allocators import sensitivity
from veloxquant_mlx.cache.base import PackedKVCache
from veloxquant_mlx.calibration import gradients, measure, vectors
from veloxquant_mlx.calibration.fisher_klt import FisherCode
from veloxquant_mlx.calibration.fitting import AGES, fit_code
from veloxquant_mlx.calibration.measure import Measurements, Progress, measure_model
from veloxquant_mlx.transforms import rope
from veloxquant_mlx.transforms.coded_matrix import check_table_bits
from veloxquant_mlx.transforms.klt import Scope

TARGETS = (4.0, 3.0, 2.5, 2.0, 1.5, 1.25, 1.0, 0.75)


@register(
    "fisher_klt",
    summary="Fisher-weighted KLT of a layer's keys and values, one step, entropy-coded, recent tokens finer",
    cache_classes=(PackedKVCache,),
    targets=TARGETS,
    target_means="bits_per_value",
    formula=counted_formula,
    implementation=implementation,
)
def fisher_klt(
    context: BuildContext,
    target: float,
    *,
    scope: Scope = "below",
    sinks: int = 4,
    ages: bool = True,
    at_tokens: int = 2048,
    tables: int = 16,
    text: str = "wikitext-2",
) -> list[Any]:
    """Measure the model once, fit the target once, build.

    Args:
        scope: what shares a transform: ``head``, ``layer``, or ``below`` (a layer, predicted from the one below).
        sinks: first tokens kept in fp16, paid for.
        ages: whether tokens younger than 64 and 16 are coded more finely.
        at_tokens: sequence length at which the target holds on calibration text.
        tables: bits an entry of the static tables, 16 (fp16) or 2 to 8.
        text: whose calibration part the model is measured on; several joined by ``+``.
    """
    check_table_bits(tables, name="tables")
    code = source_hash(veloxquant_mlx, veloxquant_kernels)
    name = f"{scope}-{target:g}-{sinks}-{'ages' if ages else 'one-age'}-{at_tokens}-{tables}.safetensors"
    fitted = kept(
        _place(context, [text, code]) / name,
        lambda path: FisherCode.load(path, scope=scope),
        lambda: fit_code(
            _measured(context, text),
            target=target,
            scope=scope,
            sinks=sinks,
            ages=AGES if ages else (),
            at_tokens=at_tokens,
            **({} if tables == 16 else {"bits": tables}),  # an earlier revision, in a comparison, takes no number
            say=lambda line: print(f"fisher_klt@{target:g} {scope}: {line}", file=sys.stderr, flush=True),
        ),
    )
    return fitted.caches(context.model, weights_sha256=context.model_id)


def _measured(context: BuildContext, text: str) -> Measurements:
    """What the calibration needs of the model, on disk since it was first asked for; hundreds of megabytes."""
    return kept(
        _place(context, [text, _source(gradients, measure, vectors, rope, sensitivity)]) / "measurements.npz",
        lambda path: Measurements.load(path, context.model),
        lambda: measure_model(
            context.model,
            context.tokenizer,
            [load_text(name, "calibration").joined for name in text.split("+")],
            on_progress=_say_progress,
            weights_sha256=context.model_id,
        ),
    )


def _say_progress(progress: Progress) -> None:
    left = progress.seconds_left or 0.0
    print(
        f"fisher_klt: {progress.stage}, {progress.done:.0%}, about {left / 60:.1f} min left",
        file=sys.stderr,
        flush=True,
    )


def _source(*modules: Any) -> str:
    return content_hash([inspect.getsource(module) for module in modules])


def _place(context: BuildContext, key: list[str]) -> Path:
    place = context.cache_folder / f"fisher-klt-{content_hash([context.model_id, context.n_layers, *key])[:24]}"
    place.mkdir(parents=True, exist_ok=True)
    return place
