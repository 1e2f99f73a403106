"""A method is one file: put into ``quantizers/``, configurations and the harness know it without another edit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from impl_inputs import tiny_llama

from veloxquant_mlx.methods import METHODS

SIGNS = """
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxquant_mlx.methods import METHODS, MethodOptions
from veloxquant_kernels.packing import pack_codes, packed_words, unpack_codes
from veloxquant_mlx.quantizers.base import QUANTIZERS, ArraySpec, Quantizer


@QUANTIZERS.register("signs")
@dataclass(frozen=True)
class Signs(Quantizer):
    name: ClassVar[str] = "signs"
    factor: float = 1.0

    def layout(self, head_dim):
        return ArraySpec("codes", packed_words(head_dim, 1), mx.uint32), ArraySpec("sizes", 1, mx.float16)

    def _encode(self, x, static):
        sizes = mx.mean(mx.abs(x.astype(mx.float32)), axis=-1, keepdims=True) * self.factor
        return pack_codes(x > 0, 1), sizes.astype(mx.float16)

    def _decode(self, codes):
        signs = unpack_codes(codes.arrays[0], 1, codes.head_dim).astype(mx.float32) * 2 - 1
        return signs * codes.arrays[1].astype(mx.float32)


@METHODS.register("signs")
@dataclass(frozen=True)
class SignsOptions(MethodOptions):
    summary: ClassVar[str] = "one sign per value, one size per vector"
    targets: ClassVar[tuple[float, ...]] = (1.0,)
    target_field: ClassVar[str | None] = None
    allocatable: ClassVar[bool] = False
    factor: float = 1.0

    def quantizer(self, role, code_bits, seed):
        return Signs(self.factor)
"""

ASKED = """
import json, sys
import veloxquant_mlx.quantizers
veloxquant_mlx.quantizers.__path__.append(sys.argv[1])  # as if the file lay in the folder
sys.path.append(sys.argv[2])
from impl_inputs import tiny_llama
from veloxbench.methods import BuildContext, all_methods
from veloxbench.methods.registry import build, checked
from veloxbench.records.arm import Arm
method = all_methods()["signs"]
arm = checked(Arm.parse("signs@1:factor=0.5:sinks=1"))
caches, claimed = build(BuildContext(tiny_llama(), None, "", None, None), arm)
spec = caches[0].inner.spec
print(json.dumps({
    "summary": method.summary, "targets": method.targets, "means": method.target_means,
    "defaults": method.parameter_defaults(), "label": arm.label, "claimed": claimed,
    "keys": spec.keys.spec(), "sinks": spec.sinks, "default": checked(Arm.parse("signs@1:factor=1.0")).label,
}))
"""


def test_the_harness_measures_a_method_that_is_one_new_file(tmp_path: Path) -> None:
    """Name, summary, target, parameters and their defaults come from the file; only other values make a label."""
    (tmp_path / "signs.py").write_text(SIGNS)
    command = [sys.executable, "-c", ASKED, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "summary": "one sign per value, one size per vector",
        "targets": [1.0],
        "means": "code_bits",
        "defaults": {"sinks": 0, "value_bits": None, "window": 0, "factor": 1.0},
        "label": "signs@1:factor=0.5:sinks=1",
        "claimed": [True] * 3,
        "keys": {"quantizer": "signs", "factor": 0.5},
        "sinks": 1,
        "default": "signs@1",
    }


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_what_it_is_and_what_a_target_sets(name: str) -> None:
    """A summary of one line; targets fall; each sets a field of the options (or there is one), and builds caches."""
    options: Any = METHODS[name]
    assert options.summary
    assert "\n" not in options.summary
    assert sorted(options.targets, reverse=True) == list(options.targets)
    assert len(options.targets) == 1 or options.needs_allocation or options.target_field in options.__dataclass_fields__
    from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig

    for target in options.targets:
        aimed = {} if options.target_field is None else {options.target_field: int(target)}
        assert len(KVCacheBuilder.build(tiny_llama(1), KVCacheConfig(name, **aimed))) == 1
