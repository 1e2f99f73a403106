"""The Metal source that ``mx.fast.metal_kernel`` makes of a kernel's body, reproduced without Metal.

MLX writes the kernel's signature itself: one parameter for each input and output, the shape, strides and number of
dimensions of an input whose name appears in the body with ``_shape``, ``_strides`` or ``_ndim``, and every thread
attribute that the body mentions. A test compares this text, character by character, with the one that MLX prints.

Source: MLX 0.32, documentation "Custom Metal Kernels" and ``mlx/backend/common/metal_kernel.cpp``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

TemplateArgument = bool | int | mx.Dtype
Template = Sequence[tuple[str, TemplateArgument]]

METAL_TYPES: dict[mx.Dtype, str] = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}

MIN_DEVICE_SIZE = 8
"""Inputs with fewer elements arrive in the ``constant`` address space, the others in ``device``."""

ATTRIBUTES: dict[str, str] = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
"""Thread attributes and their types, in the order in which MLX appends them."""

Origin = Literal["input", "shape", "strides", "ndim", "output", "attribute"]


@dataclass(frozen=True)
class ArraySpec:
    """What the signature depends on: an array's element type and shape."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated function; ``index`` counts the inputs or outputs it belongs to."""

    name: str
    metal_type: str
    origin: Origin
    index: int
    is_reference: bool = False
    space: Literal["device", "constant", ""] = ""


@dataclass(frozen=True)
class GeneratedSource:
    """A complete Metal source; ``body_line`` is the line (from 1) on which the body's own first line stands."""

    function: str
    text: str
    instance: str
    parameters: tuple[Parameter, ...]
    body_line: int


def _metal_type(dtype: mx.Dtype) -> str:
    try:
        return METAL_TYPES[dtype]
    except KeyError:
        raise TypeError(f"dtype {dtype} has no Metal counterpart; use one of {sorted(METAL_TYPES.values())}") from None


def _template_value(value: TemplateArgument) -> str:
    if isinstance(value, bool | int):
        return str(int(value))
    return _metal_type(value)


def _template_kind(value: TemplateArgument) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def parameters_of(
    source: str,
    input_names: Sequence[str],
    inputs: Sequence[ArraySpec],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
) -> tuple[Parameter, ...]:
    """The generated function's parameters, in order: inputs with their shape arguments, outputs, attributes."""
    parameters: list[Parameter] = []
    for i, (name, spec) in enumerate(zip(input_names, inputs, strict=True)):
        space: Literal["device", "constant"] = "constant" if spec.size < MIN_DEVICE_SIZE else "device"
        parameters.append(Parameter(name, _metal_type(spec.dtype), "input", i, not spec.shape, space))
        if spec.shape:
            if f"{name}_shape" in source:
                parameters.append(Parameter(f"{name}_shape", "int", "shape", i))
            if f"{name}_strides" in source:
                parameters.append(Parameter(f"{name}_strides", "int64_t", "strides", i))
            if f"{name}_ndim" in source:
                parameters.append(Parameter(f"{name}_ndim", "int", "ndim", i, is_reference=True))
    for i, (name, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        parameters.append(Parameter(name, _metal_type(dtype), "output", i))
    for name, kind in ATTRIBUTES.items():
        if name in source:
            parameters.append(Parameter(name, kind, "attribute", 0))
    return tuple(parameters)


def _declaration(parameter: Parameter, buffer: int, atomic_outputs: bool) -> str:
    p = parameter
    mark = "&" if p.is_reference else "*"
    match p.origin:
        case "input":
            return f"  const {p.space} {p.metal_type}{mark} {p.name} [[buffer({buffer})]]"
        case "output":
            kind = f"atomic<{p.metal_type}>" if atomic_outputs else p.metal_type
            return f"  device {kind}* {p.name} [[buffer({buffer})]]"
        case "attribute":
            return f"  {p.metal_type} {p.name} [[{p.name}]]"
        case _:
            return f"  const constant {p.metal_type}{mark} {p.name} [[buffer({buffer})]]"


def generate(
    name: str,
    source: str,
    *,
    input_names: Sequence[str],
    inputs: Sequence[ArraySpec],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    template: Template = (),
    header: str = "",
    atomic_outputs: bool = False,
) -> GeneratedSource:
    """The source that MLX hands to Metal's compiler for this kernel and these arguments.

    Args:
        name: the kernel's name, as given to ``mx.fast.metal_kernel``.
        source: the body.
        input_names: one for each of ``inputs``.
        inputs: element type and shape of each input.
        output_names: one for each of ``output_dtypes``.
        output_dtypes: element type of each output.
        template: template parameters with their values, in order.
        header: text placed before the function.
        atomic_outputs: whether outputs are declared ``atomic<T>``.
    Raises:
        TypeError: an element type that Metal does not have.
    """
    arguments = "<" + ", ".join(_template_value(value) for _, value in template) + ">" if template else ""
    function = f"custom_kernel_{name}"
    if template:
        function += "_" + re.sub("<|>|, |-", "_", arguments)[:-1]
    for spec in inputs:
        function += f"_{_metal_type(spec.dtype)}"
        function += "s" if not spec.shape else "c" if spec.size < MIN_DEVICE_SIZE else ""
    for dtype in output_dtypes:
        function += f"_{_metal_type(dtype)}"
    parameters = parameters_of(source, input_names, inputs, output_names, output_dtypes)
    head = header
    if template:
        head += "template <" + ", ".join(f"{_template_kind(value)} {key}" for key, value in template) + ">\n"
    head += f"[[kernel]] void {function}(\n"
    head += ",\n".join(_declaration(p, i, atomic_outputs) for i, p in enumerate(parameters)) + ") {\n"
    text = head + source + "\n}\n"
    instance = function + arguments
    if template:
        text += f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({instance}) {instance};\n'
    return GeneratedSource(function, text, instance, parameters, head.count("\n") + 1)
