"""A Metal kernel as a value: a ``.metal`` body with its headers, and where it runs: Metal, the CPU emulator, or not."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

import mlx.core as mx

from veloxquant_kernels import emulator
from veloxquant_kernels.signature import Template

Backend = Literal["metal", "emulator", "reference"]
Triple = tuple[int, int, int]

FOLDER: Final = Path(__file__).parent
SIMDGROUPS: Final = 4
"""Rows of a threadgroup, one for each of its simdgroups."""
FLOAT_DTYPES: Final = (mx.float16, mx.bfloat16, mx.float32)
MAX_ELEMENTS: Final = 1 << 31
"""Bodies index with 32-bit integers."""


def why_no_metal() -> str | None:
    """Why Metal kernels cannot run here, or None if they can: MLX launches them on its default device only."""
    if not mx.metal.is_available():
        return "no Metal device"
    return None if mx.default_device() == mx.gpu else "MLX's default device is the CPU"


_ambient: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run everything in a block on ``backend``, quantizers and caches too, where a call does not name its own.

    Raises:
        ValueError: an unknown name.
        RuntimeError: ``"metal"`` where Metal cannot run.
    """
    token = _ambient.set(resolve_backend(backend))
    try:
        yield
    finally:
        _ambient.reset(token)


def resolve_backend(backend: Backend | None) -> Backend:
    """The backend that runs: the named one, that of :func:`use_backend`, else Metal where it can, else plain MLX.

    Raises:
        ValueError: an unknown name.
        RuntimeError: ``"metal"`` without a Metal device, or with the CPU as MLX's default device.
    """
    backend = backend or _ambient.get()
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


def launches_on(backend: Backend | None, *problems: str | None) -> Backend | None:
    """Where a kernel is launched, or None where plain MLX computes the same.

    Args:
        backend: the caller's. ``"metal"`` and ``"emulator"`` launch the kernel, ``"reference"`` is plain MLX. None
            takes what :func:`resolve_backend` says, and plain MLX where the kernel does not serve the arguments.
        problems: why the kernel does not serve the arguments, None for each rule that is kept.

    Raises:
        ValueError: the caller named a backend for arguments that its kernel does not serve, or an unknown one.
        RuntimeError: ``"metal"`` where Metal cannot run.
    """
    where = resolve_backend(backend)
    if where == "reference":
        return None
    for problem in problems:
        if problem is not None:
            if backend is None:
                return None
            raise ValueError(problem)
    return where


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

    def per_value(
        self, inputs: Sequence[mx.array], width: int, dtype: mx.Dtype, *, backend: Backend, template: Template = ()
    ) -> mx.array:
        """Launch one thread per value of an output ``[..., width]``, a row for each row of the first of ``inputs``."""
        rows = [as_rows(array) for array in inputs]
        shape = (rows[0].shape[0], width)
        (out,) = self(
            rows,
            backend=backend,
            template=template,
            grid=(width, shape[0], 1),
            threadgroup=(min(width, 32), 8, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )
        return out.reshape(*inputs[0].shape[:-1], width)

    def per_row(
        self,
        x: mx.array,
        tables: Sequence[mx.array],
        outputs: Sequence[tuple[int, mx.Dtype]],
        *,
        backend: Backend,
        template: Template,
    ) -> list[mx.array]:
        """Launch one simdgroup per row of ``x`` (``[..., D]``); an output ``(width, dtype)`` is ``[..., width]``."""
        rows = as_rows(x)
        n_groups = -(-rows.shape[0] // SIMDGROUPS)
        made = self(
            [rows, *tables],
            backend=backend,
            template=[*template, ("SIMDGROUPS", SIMDGROUPS)],
            grid=(n_groups * SIMDGROUPS * 32, 1, 1),
            threadgroup=(SIMDGROUPS * 32, 1, 1),
            output_shapes=[(rows.shape[0], width) for width, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
        return [array.reshape(*x.shape[:-1], array.shape[-1]) for array in made]


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
    """Every kernel of the package, by stem: those that its modules hold."""
    kernels = {
        kernel.stem: kernel
        for path in FOLDER.glob("[!_]*.py")
        for kernel in vars(importlib.import_module(f"veloxquant_kernels.{path.stem}")).values()
        if isinstance(kernel, Kernel)
    }
    return [kernels[stem] for stem in sorted(kernels)]


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


def no_rows(name: str, x: mx.array) -> str | None:
    """Why no kernel can run over the rows of ``x``: it has none; else None."""
    return f"{name} must have at least one element, got shape {x.shape}" if x.size == 0 else None
