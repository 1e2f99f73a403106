"""The generated source is the one that MLX itself writes."""

import re

import mlx.core as mx
import pytest

from veloxquant_kernels import emulator, verify
from veloxquant_kernels.signature import ArraySpec, generate

BODY = """
uint i = thread_position_in_grid.x;
out[i] = T(inp[i]) + inp_shape[0] + inp_strides[0] + inp_ndim + small[0] + scalar + B + N;
other[i] = simdgroup_index_in_threadgroup;"""


def text_of_mlx(
    capfd, tmp_path, name, body, inputs, output_dtypes, template, input_names=None, output_names=None, **options
):
    """What MLX prints for a kernel recorded in an exported graph, which needs no Metal device."""
    kernel = mx.fast.metal_kernel(
        name=name,
        input_names=input_names or ["inp", "small", "scalar"][: len(inputs)],
        output_names=output_names or ["out", "other"][: len(output_dtypes)],
        source=body,
        **options,
    )

    def call(first):
        return kernel(
            inputs=[first, *inputs[1:]],
            template=template,
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(64,)] * len(output_dtypes),
            output_dtypes=output_dtypes,
            verbose=True,
        )

    capfd.readouterr()
    mx.export_function(str(tmp_path / "kernel.mlxfn"), call, inputs[0])
    return re.search(r"```\n(.*)\n```", capfd.readouterr().out, re.DOTALL)[1]


def ours(name, body, inputs, output_dtypes, template, **options):
    return generate(
        name,
        body,
        input_names=["inp", "small", "scalar"][: len(inputs)],
        inputs=[ArraySpec(x.dtype, tuple(x.shape)) for x in inputs],
        output_names=["out", "other"][: len(output_dtypes)],
        output_dtypes=output_dtypes,
        template=template,
        **options,
    )


DTYPES = [mx.float16, mx.bfloat16, mx.float32, mx.uint8, mx.int32, mx.uint32, mx.int64, mx.bool_]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signature_is_the_one_mlx_writes(dtype, capfd, tmp_path):
    """Buffers, shape arguments, address spaces, attributes, template and instance: MLX's text, byte for byte."""
    inputs = [mx.zeros((8, 16), dtype), mx.zeros((7,), dtype), mx.array(1).astype(dtype)]
    template = [("T", dtype), ("N", 3), ("B", True), ("Z", False)]
    arguments = ("probe", BODY, inputs, [mx.float16, mx.uint32], template)
    expected = text_of_mlx(capfd, tmp_path, *arguments, header="// header\n")
    assert ours(*arguments, header="// header\n").text == expected


@pytest.mark.parametrize("template", [[], [("N", -2)]], ids=["plain", "template"])
@pytest.mark.parametrize("atomic", [False, True])
def test_atomic_outputs_and_no_attributes(template, atomic, capfd, tmp_path):
    """The same without a template, without attributes, and with atomic outputs."""
    inputs = [mx.zeros((4, 4, 4))]
    arguments = ("bare", "out[0] = inp[0];", inputs, [mx.float32], template)
    expected = text_of_mlx(capfd, tmp_path, *arguments, atomic_outputs=atomic)
    assert ours(*arguments, atomic_outputs=atomic).text == expected


def test_shipped_kernels_have_mlxs_signature(capfd, tmp_path, monkeypatch):
    """Every launch of the verification's cases: what the emulator compiles is what MLX would hand to Metal."""
    compared = []

    def compare(
        name, source, *, inputs, output_shapes, output_dtypes, header, template, input_names, output_names, **_
    ):
        mx.eval(list(inputs))  # MLX cannot export all that went into them
        names = {"input_names": input_names, "output_names": output_names, "header": header, "template": template}
        specs = [ArraySpec(x.dtype, tuple(x.shape)) for x in inputs]
        ours = generate(name, source, inputs=specs, output_dtypes=output_dtypes, **names)
        names = {key: list(value) if key != "header" else value for key, value in names.items()}
        expected = text_of_mlx(capfd, tmp_path, name, source, list(inputs), list(output_dtypes), **names)
        assert ours.text == expected
        compared.append(name)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(emulator, "launch", compare)
    for case in verify.cases():
        case.run("emulator")
    assert len(set(compared)) == 12


def test_body_line_points_at_the_body():
    """``body_line`` is the line of the text on which the body begins."""
    generated = ours("probe", "FIRST\nSECOND", [mx.zeros((8,))], [mx.float32], [("N", 1)], header="// one\n// two\n")
    assert generated.text.splitlines()[generated.body_line - 1] == "FIRST"


def test_a_dtype_without_metal_type_is_refused():
    """complex64 is not among the element types that the kernels know."""
    with pytest.raises(TypeError, match="complex64"):
        ours("probe", "", [mx.zeros((8,), mx.complex64)], [mx.float32], [])
