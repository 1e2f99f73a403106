"""Run a kernel on the CPU and report what it did to memory."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels import lint
from veloxquant_kernels.emulator.build import Mode, Module, build, source_line
from veloxquant_kernels.signature import ArraySpec, GeneratedSource, Parameter, Template, generate

Triple = tuple[int, int, int]
FaultKind = Literal[
    "out of bounds", "uninitialised read", "data race", "divergent barrier", "divergent SIMD operation", "undefined"
]
_FAULTS: dict[int, FaultKind] = {
    1: "out of bounds",
    2: "uninitialised read",
    3: "data race",
    4: "divergent barrier",
    5: "divergent SIMD operation",
    6: "undefined",
}
THREADGROUP_MEMORY = 32 * 1024
"""Bytes of threadgroup memory of every Apple GPU since the A11 (Metal feature set tables)."""
MAX_THREADS = 1024


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("checked", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("nbytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("unique_bytes_read", ctypes.c_uint64),
        ("bytes_initialised", ctypes.c_uint64),
    )


class _Report(ctypes.Structure):
    _fields_ = (
        ("fault", ctypes.c_int32),
        ("line", ctypes.c_int32),
        ("pc_offset", ctypes.c_uint64),
        ("group", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("threadgroup_limit", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("threadgroup_bytes_read", ctypes.c_uint64),
        ("threadgroup_bytes_written", ctypes.c_uint64),
        ("message", ctypes.c_char * 256),
    )


class KernelFault(RuntimeError):
    """A kernel did something that Metal leaves undefined.

    Attributes:
        kind: which rule it broke.
        body_line: line of the body (from 1); 0 where it is not known, -n for line n of the header.
    """

    def __init__(self, kernel: str, kind: FaultKind, body_line: int, detail: str):
        self.kind = kind
        self.body_line = body_line
        where = f"{kernel}.metal:{body_line}" if body_line > 0 else kernel
        if body_line < 0:
            where += f" (line {-body_line} of its headers)"
        super().__init__(f"{where}: {kind}: {detail}")


@dataclass(frozen=True)
class BufferTraffic:
    """Bytes that a launch moved to and from one buffer, summed over the loads and stores of all threads."""

    name: str
    nbytes: int
    bytes_read: int
    bytes_written: int
    unique_bytes_read: int
    bytes_initialised: int


@dataclass(frozen=True)
class LaunchReport:
    """What one checked launch did; a fast launch reports no traffic."""

    kernel: str
    grid: Triple
    threadgroup: Triple
    threadgroup_memory: int
    threadgroup_bytes_read: int
    threadgroup_bytes_written: int
    buffers: tuple[BufferTraffic, ...]
    source_path: str

    def traffic(self, name: str) -> BufferTraffic:
        """The traffic of the buffer called ``name``."""
        return next(buffer for buffer in self.buffers if buffer.name == name)


@dataclass
class Session:
    """How kernels run inside :func:`session`, and the reports of those that did."""

    mode: Mode
    seed: int
    launches: list[LaunchReport] = field(default_factory=list)


_session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("emulator_session", default=None)


@contextlib.contextmanager
def session(mode: Mode = "checked", seed: int = 0) -> Iterator[Session]:
    """Run the emulated kernels of a block in ``mode``, with the scheduling order of ``seed``.

    Outside of a session kernels run in ``fast`` mode: no checks, no counts.

    Args:
        mode: ``checked`` detects faults and counts bytes, ``fast`` only computes, ``coverage`` feeds gcov.
        seed: permutes threadgroups, simdgroups and lanes; 0 is the natural order.
    """
    current = Session(mode, seed)
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)


def to_numpy(array: mx.array) -> NDArray[np.generic]:
    """A contiguous NumPy copy; bfloat16, which NumPy lacks, as its bits in uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array))


def _to_mlx(array: NDArray[np.generic], dtype: mx.Dtype) -> mx.array:
    result = mx.array(array)
    return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result


@functools.cache
def _numpy_dtype(dtype: mx.Dtype) -> np.dtype[np.generic]:
    return to_numpy(mx.zeros((0,), dtype)).dtype


def _argument(parameter: Parameter, inputs: Sequence[NDArray[np.generic]], shapes: Sequence[tuple[int, ...]],
              outputs: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:  # fmt: skip
    shape = shapes[parameter.index] if parameter.origin in ("shape", "strides", "ndim") else ()
    match parameter.origin:
        case "input":
            return inputs[parameter.index]
        case "output":
            return outputs[parameter.index]
        case "shape":
            return np.array(shape, np.int32)
        case "strides":
            strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
            return np.array(strides, np.int64)
        case _:
            return np.array(len(shape), np.int32)


def _body_line(module: Module, generated: GeneratedSource, report: _Report) -> int:
    line = report.line or source_line(module, report.pc_offset)
    line -= 1  # the prelude's include
    if line < 1:
        return 0
    return line - generated.body_line + 1 if line >= generated.body_line else -line


@functools.lru_cache(maxsize=1024)
def _lint(name: str, header: str, source: str) -> None:
    lint.check(f"{name} (header)", header, header=True)
    lint.check(name, source)


def launch(
    name: str,
    source: str,
    *,
    input_names: Sequence[str],
    inputs: Sequence[mx.array],
    output_names: Sequence[str],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    grid: Triple,
    threadgroup: Triple,
    template: Template = (),
    header: str = "",
    init_value: float | None = None,
    atomic_outputs: bool = False,
) -> list[mx.array]:
    """Run a Metal kernel's body on the CPU with the arguments of ``mx.fast.metal_kernel``.

    Inputs are made row-contiguous first, as MLX does by default.

    Returns:
        The outputs. Unwritten bytes of an output hold ``0xff`` unless ``init_value`` is given.
    Raises:
        LintError: the text holds something that Metal refuses.
        KernelFault: in checked mode, the first access or barrier that Metal leaves undefined; a divergent barrier and
            too much threadgroup memory in every mode.
        ValueError: a grid or threadgroup outside of Metal's limits.
    """
    if min(grid) < 1 or min(threadgroup) < 1:
        raise ValueError(f"grid {grid} and threadgroup {threadgroup} must be positive in every dimension")
    group = cast(Triple, tuple(min(a, b) for a, b in zip(threadgroup, grid, strict=True)))
    if group[0] * group[1] * group[2] > MAX_THREADS:
        raise ValueError(f"threadgroup {threadgroup} has more than {MAX_THREADS} threads")
    _lint(name, header, source)
    current = _session.get() or Session("fast", 0)
    generated = generate(
        name,
        source,
        input_names=input_names,
        inputs=[ArraySpec(x.dtype, tuple(x.shape)) for x in inputs],
        output_names=output_names,
        output_dtypes=output_dtypes,
        template=template,
        header=header,
        atomic_outputs=atomic_outputs,
    )
    module = build(generated, current.mode, atomic_outputs=atomic_outputs)
    arrays = [to_numpy(x) for x in inputs]
    outputs: list[NDArray[np.generic]] = []
    for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
        if init_value is None:
            bits = np.full(int(np.prod(shape)) * _numpy_dtype(dtype).itemsize, 0xFF, np.uint8)
            outputs.append(bits.view(_numpy_dtype(dtype)).reshape(shape))
        else:
            outputs.append(to_numpy(mx.full(shape, init_value, dtype)))
    parameters = [p for p in generated.parameters if p.origin != "attribute"]
    held = [_argument(p, arrays, [tuple(x.shape) for x in inputs], outputs) for p in parameters]
    buffers = (_Buffer * len(held))(
        *(
            _Buffer(
                array.ctypes.data,
                p.name.encode(),
                array.nbytes,
                p.origin == "output",
                p.origin != "output" or init_value is not None,
            )
            for p, array in zip(parameters, held, strict=True)
        )
    )
    report = _Report(threadgroup_limit=THREADGROUP_MEMORY)
    request = _Launch(grid, group, current.mode == "checked", current.seed)
    entry = ctypes.cast(module.entry, ctypes.c_void_p)
    status = module.runtime.vq_launch(ctypes.byref(request), entry, buffers, len(held), ctypes.byref(report))
    if status:
        raise MemoryError(f"{name}: the emulator could not allocate its buffers")
    if report.fault:
        where = f"threadgroup {tuple(report.group)}, thread {tuple(report.thread)}"
        detail = f"{report.message.decode()} ({where})"
        raise KernelFault(name, _FAULTS[report.fault], _body_line(module, generated, report), detail)
    current.launches.append(
        LaunchReport(
            kernel=name,
            grid=grid,
            threadgroup=group,
            threadgroup_memory=report.threadgroup_bytes,
            threadgroup_bytes_read=report.threadgroup_bytes_read,
            threadgroup_bytes_written=report.threadgroup_bytes_written,
            buffers=tuple(
                BufferTraffic(p.name, b.nbytes, b.bytes_read, b.bytes_written, b.unique_bytes_read, b.bytes_initialised)
                for p, b in zip(parameters, buffers, strict=True)
            ),
            source_path=str(module.source_path),
        )
    )
    return [_to_mlx(array, dtype) for array, dtype in zip(outputs, output_dtypes, strict=True)]
