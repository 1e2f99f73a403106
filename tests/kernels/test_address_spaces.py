"""Clang, which has address spaces, accepts every shipped body with Metal's meaning of device, constant and threadgroup.

The emulator compiles the qualifiers away. Here they are clang's address spaces, so that a pointer to one kind of memory
passed for another is an error, as it is in Metal.
"""

import os
import re

import mlx.core as mx
import pytest

from veloxquant_kernels import emulator, verify
from veloxquant_kernels.emulator.build import rewrite
from veloxquant_kernels.signature import ArraySpec, generate

if os.environ.get("VELOXBENCH_REQUIRE_COMPILER") == "1":
    from clang import cindex
else:
    cindex = pytest.importorskip("clang.cindex", reason="needs libclang")

DECLARATIONS = """
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define INFINITY __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define VQ_THREADGROUP(T, name, count) static threadgroup T name[count];
typedef unsigned char uint8_t, uchar;
typedef unsigned short ushort;
typedef unsigned int uint32_t, uint;
typedef long int64_t;
typedef _Float16 float16_t, half;
typedef __bf16 bfloat16_t, bfloat;
typedef uint uint3 __attribute__((ext_vector_type(3)));
enum class mem_flags : uint { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
float exp(float);
float sqrt(float);
float rint(float);
template <typename T> T min(T, T);
template <typename T> T max(T, T);
template <typename T> T clamp(T, T, T);
template <typename T> T simd_sum(T);
template <typename T> T simd_max(T);
template <typename T> T simd_shuffle_xor(T, ushort);
template <typename T> T simd_broadcast(T, ushort);
template <typename T, typename U> T as_type(U);
#define thread
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
template <typename T> T simd_prefix_exclusive_sum(T);
bool simd_any(bool);
int abs(int);
"""
"""What the bodies use of metal_stdlib, with built-in types: clang gives classes no address spaces. A threadgroup array
is a static variable, for its type alone; Metal's thread address space is C++'s own."""


def errors_in(text):
    """Clang's errors in a Metal source whose qualifiers are address spaces."""
    unit = cindex.Index.create().parse(
        "kernel.cpp",
        args=["-std=c++14", "-Wno-everything", "--target=x86_64-linux-gnu"],
        unsaved_files=[("kernel.cpp", DECLARATIONS + rewrite(text))],
    )
    return [str(d) for d in unit.diagnostics if d.severity >= cindex.Diagnostic.Error]


def generated_texts(monkeypatch):
    """The source of every launch of the verification's cases, nothing compiled or run."""
    texts = {}

    def record(name, source, *, inputs, output_shapes, output_dtypes, header, template, input_names, output_names, **_):
        specs = [ArraySpec(x.dtype, tuple(x.shape)) for x in inputs]
        generated = generate(
            name, source, input_names=input_names, inputs=specs, output_names=output_names,
            output_dtypes=output_dtypes, header=header, template=template,
        )  # fmt: skip
        texts[generated.text] = name
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(emulator, "launch", record)
    for case in verify.cases():
        case.run("emulator")
    return texts


def test_every_body_respects_address_spaces(monkeypatch):
    """No body mixes device, constant, threadgroup and thread memory, with small inputs in constant memory too."""
    texts = generated_texts(monkeypatch)
    assert len(set(texts.values())) == 12
    assert [(name, error) for text, name in texts.items() for error in errors_in(text)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "inline float first(const device float* p) { return p[0]; }\n"
        "[[kernel]] void k(const constant float* x) {\nfirst(x);\n}",
        "[[kernel]] void k(device float* x) {\nthreadgroup float s[4];\ndevice float* p = s;\n}",
        "[[kernel]] void k(device float* x) {\nfloat y[4];\ndevice float* p = y;\n}",
    ],
)
def test_a_mixed_address_space_is_found(wrong):
    """A constant pointer passed for a device one; threadgroup and thread memory taken for device memory."""
    found = errors_in(wrong)
    assert len(found) == 1
    assert re.search(
        "no matching function for call to 'first'|cannot initialize a variable of type 'device float", found[0]
    )
