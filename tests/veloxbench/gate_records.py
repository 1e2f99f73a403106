"""Records of real shape for the gate's tests, without a model."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from veloxbench.measure.suite import get_suite
from veloxbench.methods.registry import get_method
from veloxbench.records.provenance import harness_hash
from veloxbench.records.record import Estimate, MethodRef, ModelRef, Provenance, Record, Subject, TextRef
from veloxbench.run.grid import load_grid

OURS, THEIRS = get_method("turboquant_mse").implementation(), get_method("mlx-affine").implementation()
"""Hash and version of the code that is installed: a gate judges no other's records."""
NOW = datetime.now(UTC) - timedelta(days=1)
HARDWARE = {"chip": "AMD EPYC", "machine": "x86_64", "physical_cores": 2, "device": "cpu", "rounding": "r"}
VERSIONS = {"mlx": "0.32.2", "mlx-lm": "0.32.2", "numpy": "2.3.0"}
MODEL = ModelRef(name="smollm2-135m", weights_sha256="w" * 64, tokenizer_sha256="t" * 64, config_sha256="c" * 64)
SOMEWHERE = Provenance(
    started=NOW,
    seconds=1.0,
    commit=None,
    dirty=None,
    versions={},
    hardware={"chip": "c", "physical_cores": 2},
    state={},
)
"""Where a record comes from, for tests in which it does not matter."""
ARMS = (("mlx-affine", 4.0), ("turboquant_mse", 4.0), ("turboquant_mse", 2.0))
N = 16


def damage(mean: float, seed: int = 0, n: int = N) -> np.ndarray:
    """KLD per sequence as it is: positive, varying by a fifth between sequences."""
    return mean * (1 + 0.2 * np.random.default_rng(seed).standard_normal(n))


def quality_record(
    method: str = "turboquant_mse",
    target: float | None = 4.0,
    *,
    kld: Any = None,
    delta_nll: Any = None,
    bits: float = 4.25,
    model: ModelRef = MODEL,
    implementation: str = OURS,
    hardware: dict[str, Any] | None = None,
    started: datetime = NOW,
    drop: tuple[str, ...] = (),
    harness: str | None = None,
    refused: str | None = None,
    machine_class: str = "k",
    **provenance: Any,
) -> Record:
    """A chunked perplexity record of the gate profile."""
    (protocol,) = load_grid("gate").tasks(get_suite("perplexity"))
    kld = damage(0.058) if kld is None else np.asarray(kld)
    delta_nll = damage(0.064, 1) if delta_nll is None else np.asarray(delta_nll)
    samples = {"nll": (3 + delta_nll).tolist()}
    if target is not None:
        samples |= {"kld_mean": kld.tolist(), "delta_nll": delta_nll.tolist()}
    metrics = {name: Estimate(value=float(np.mean(values)), unit="nats/token") for name, values in samples.items()}
    metrics |= {
        "bits_per_value": Estimate(value=bits, unit="bits"),
        "allocated_bits_per_value": Estimate(value=bits + 1, unit="bits"),
        "engaged_layers": Estimate(value=30, unit="layers"),
    }
    means = None if target is None else "code_bits"
    return Record.create(
        subject=Subject(
            suite="perplexity",
            protocol="chunked",
            model=model,
            method=MethodRef(name=method, target=target, target_means=means, implementation=implementation),
            text=TextRef(name="wikitext-2", tokens_sha256="x" * 64),
            settings={**vars(protocol), "seed": 0},
            harness=harness or harness_hash(),
            machine_class=machine_class,
        ),
        status="measured" if refused is None else "unsupported",
        reason=refused,
        metrics={} if refused else {name: value for name, value in metrics.items() if name not in drop},
        samples={} if refused else {name: value for name, value in samples.items() if name not in drop},
        engagement=[],
        provenance=Provenance(
            started=started,
            seconds=1.0,
            commit=provenance.get("commit"),
            dirty=provenance.get("dirty", False),
            project_dirty=provenance.get("project_dirty"),
            versions=provenance.get("versions", VERSIONS),
            hardware=hardware or HARDWARE,
            state={},
        ),
    )


def run_records(*, started: datetime = NOW, implementation: str = OURS, **changes: Any) -> list[Record]:
    """What a run of a small profile makes: fp16 and three arms, one second apart."""
    reference = quality_record("fp16", None, bits=16.0, implementation=THEIRS, started=started, **changes)
    arms = [
        quality_record(
            method,
            target,
            implementation=THEIRS if method == "mlx-affine" else implementation,
            started=started + timedelta(seconds=1 + i),
            **changes,
        )
        for i, (method, target) in enumerate(ARMS)
    ]
    return [reference, *arms]
