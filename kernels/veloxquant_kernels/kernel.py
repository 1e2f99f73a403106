"""A Metal kernel as a value: a ``.metal`` body with its headers, launched on Metal or on the CPU emulator."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

import mlx.core as mx

from veloxquant_kernels import emulator
from veloxquant_kernels.signature import Template

Backend = Literal["metal", "emulator", "reference"]
Triple = tuple[int, int, int]

FOLDER: Final = Path(__file__).parent
FLOAT_DTYPES: Final = (mx.float16, mx.bfloat16, mx.float32)
MAX_ELEMENTS: Final = 1 << 31
"""Bodies index with 32-bit integers."""


def why_no_metal() -> str | None:
    """Why Metal kernels cannot run here, or None if they can: MLX launches them on its default device only."""
    if not mx.metal.is_available():
        return "no Metal device"
    return None if mx.default_device() == mx.gpu else "MLX's default device is the CPU"


def resolve_backend(backend: Backend | None) -> Backend:
    """The backend that runs: Metal where it can and none is named, else the plain-MLX reference.

    Raises:
        ValueError: an unknown name.
        RuntimeError: ``"metal"`` without a Metal device, or with the CPU as MLX's default device.
    """
    problem = why_no_metal()
    if backend is None:
        return "metal" if problem is None else "reference"
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)} or None, got {backend!r}")
    if backend == "metal" and problem is not None:
        raise RuntimeError(
            f"backend 'metal' needs a Metal device that is MLX's default device ({problem}); use 'emulator' or "
            "'reference' here"
        )
    return backend


@functools.cache
def metal_text(stem: str) -> str:
    """The shipped text of ``<stem>.metal``."""
    return (FOLDER / f"{stem}.metal").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kernel:
    """One ``.metal`` body.

    Args:
        stem: names the file of the body.
        inputs: parameter names of the inputs.
        outputs: parameter names of the outputs.
        headers: stems of the ``.metal`` files with the functions that the body calls, in order.
    """

    stem: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The body's text."""
        return metal_text(self.stem)

    @property
    def header(self) -> str:
        """The headers' text."""
        return "".join(metal_text(stem) for stem in self.headers)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        backend: Backend,
        grid: Triple,
        threadgroup: Triple,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        template: Template = (),
    ) -> list[mx.array]:
        """Launch over ``grid`` threads in groups of ``threadgroup``.

        Raises:
            ValueError: an input or output with 2**31 elements or more, or a backend that has no kernels.
        """
        shapes = [*(tuple(array.shape) for array in inputs), *output_shapes]
        for name, shape in zip((*self.inputs, *self.outputs), shapes, strict=True):
            if (size := math.prod(shape)) >= MAX_ELEMENTS:
                raise ValueError(f"{self.stem}: {name} has {size} elements; the limit is {MAX_ELEMENTS - 1}")
        if backend == "emulator":
            return emulator.launch(
                self.stem,
                self.source,
                header=self.header,
                input_names=self.inputs,
                inputs=inputs,
                output_names=self.outputs,
                output_shapes=output_shapes,
                output_dtypes=output_dtypes,
                grid=grid,
                threadgroup=threadgroup,
                template=template,
            )
        if backend != "metal":
            raise ValueError(f"{self.stem}: backend {backend!r} runs no kernel")
        return _metal(self)(
            inputs=list(inputs),
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
        )


@functools.cache
def _metal(kernel: Kernel) -> Callable[..., list[mx.array]]:
    launcher = mx.fast.metal_kernel(
        name=kernel.stem,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=kernel.header,
    )
    return cast(Callable[..., list[mx.array]], launcher)


def shipped_kernels() -> list[Kernel]:
    """Every kernel of the package, by stem: those that the module beside a ``.metal`` body of its name holds."""
    modules = [path for path in sorted(FOLDER.glob("*.metal")) if path.with_suffix(".py").exists()]
    found = {
        kernel.stem: kernel
        for path in modules
        for kernel in vars(importlib.import_module(f"veloxquant_kernels.{path.stem}")).values()
        if isinstance(kernel, Kernel)
    }
    return [found[stem] for stem in sorted(found)]


@dataclass(frozen=True)
class FormatContract:
    """What the comment that opens a ``.metal`` body promises.

    Args:
        summary: what the kernel does.
        arrays: its inputs and, after ``->``, its outputs with shapes, dtypes and layouts, line by line.
    """

    summary: str
    arrays: tuple[str, ...]


def format_contract(stem: str) -> FormatContract:
    """The contract of ``<stem>.metal``, read from the comment that opens it: a summary, then the indented arrays."""
    comment = list(itertools.takewhile(lambda line: line.startswith("//"), metal_text(stem).splitlines()))
    lines = [line.removeprefix("//") for line in comment]
    summary = itertools.takewhile(str.strip, lines)
    arrays = tuple(line.removeprefix("   ") for line in lines if line.startswith("   "))
    return FormatContract(" ".join(line.strip() for line in summary), arrays)


def as_rows(x: mx.array) -> mx.array:
    """``[..., D]`` as ``[rows, D]``."""
    return x.reshape(-1, x.shape[-1])


def check_float(name: str, x: mx.array) -> None:
    """Raise TypeError unless ``x`` is fp16, bf16 or fp32."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")


def check_not_empty(name: str, x: mx.array, min_ndim: int = 1) -> None:
    """Raise ValueError unless ``x`` has at least ``min_ndim`` axes and one element."""
    if x.ndim < min_ndim or x.size == 0:
        raise ValueError(f"{name} must have {min_ndim} axes or more and at least one element, got shape {x.shape}")
