"""The lint pass refuses what Metal refuses."""

import pytest

from veloxquant_kernels.lint import LintError, check, findings

REFUSED = {
    "double x = 1.0f;": "double",
    "float x = 0.5;": "literal without f",
    "float x = 1. + y;": "literal without f",
    "try { f(); } catch (int e) {}": "exceptions",
    "float* p = x;": "pointer needs an address space",
    "auto* p = x;": "pointer needs an address space",
    "template <typename T> T f(const T* p) { return p[0]; }": "pointer needs an address space",
    "inline void f(float& x) { x = 0.0f; }": "reference needs an address space",
    "int f(int n) { return n ? f(n - 1) : 0; }": "recursion",
    "int g(int n) { return f(n); }\nint f(int n) { return g(n); }": "recursion",
    "int* p = new int[3];": "allocate",
    "goto end;": "goto",
    "threadgroup float x[4][4];": "threadgroup memory",
    "threadgroup float x;": "threadgroup memory",
    "threadgroup float x[2] = {0.0f, 1.0f};": "threadgroup memory",
    "auto f = [&](int x) { return x; };": "lambda",
    "std::min(1, 2);": "standard library",
    "#include <vector>": "metal_",
    "if constexpr (N > 1) {}": "C++17",
    "static int counter = 0;": "constant address space",
    "x = __builtin_clz(y);": "compiler's own",
    "inline float* f(device float* p) { return p; }": "pointer needs an address space",
    "y = *(float*)x;": "pointer needs an address space",
    "template <class T> inline void f(T& x) { x = 0; }": "reference needs an address space",
    "struct S { float a; }; inline float f(S* s) { return s->a; }": "pointer needs an address space",
    "inline float f(float (*g)(float)) { return g(1.0f); }": "function pointers",
    "inline void f() { threadgroup float s[4]; }": "only the kernel itself",
}

ALLOWED = [
    "// double in a comment, new float*\nfloat x = 1.0f, y = 1e-5f, z = 2.5h, w = 3.f;",
    "device float* p = out + 3; const device T* q = x; threadgroup float* r = s; thread float& t = u;",
    "threadgroup float s[1 << K];",
    "uint a = b * c; float d = e * f; g(a * b, c & d);",
    "#include <metal_stdlib>\nconstant float table[2] = {0.5f, 1.5f};",
    "template <typename P> inline float f(P p, uint n) { return p[n]; }",
    "int even(int n) { return n % 2; }\nint odd(int n) { return 1 - even(n); }",
    "static constexpr constant uint N = 3;",
    "inline device float* f(device float* p) { return p; } thread S& g(thread S& s) { return s; } struct S { int a; };",
    "float a = (*p) * (b + c); uint d = uint(e) * f(g);",
]


@pytest.mark.parametrize(("text", "rule"), REFUSED.items())
def test_refused(text, rule):
    """Each construct that Metal lacks is found on its line."""
    found = findings("float before = 0.0f;\n" + text)
    assert found, text
    assert any(rule in finding.rule for finding in found)
    assert min(finding.line for finding in found) == 2


@pytest.mark.parametrize("text", ALLOWED)
def test_allowed(text):
    """Plain Metal passes."""
    assert findings(text) == ()


@pytest.mark.parametrize(
    "text", ["const float t[2] = {0.5f, 1.5f};", "constexpr uint N = 3;", "float f() { return g(1); } int n;", "S s;"]
)
def test_a_header_keeps_its_variables_in_constant_memory(text):
    """At file scope a variable needs the constant address space; inside the kernel it does not."""
    rule = "a variable at file scope needs the constant address space"
    assert [(finding.line, finding.rule) for finding in findings("#define X\n" + text, header=True)] == [(2, rule)]
    assert findings(text) == ()


@pytest.mark.parametrize(
    "text",
    [
        "constant float t[2] = {0.5f, 1.5f};\nstatic constexpr constant uint N = 3;",
        "template <int N = 3, typename T>\ninline T f(T x, int n = 2) {\n  const T y = x;\n  return y * n;\n}",
        "using half_pair = half2;\nstruct S { float a; int b; };\nenum E { A, B };",
    ],
)
def test_other_file_scope_text_passes(text):
    """Constants, functions with their parameters and locals, types."""
    assert findings(text, header=True) == ()


def test_error_lists_every_finding():
    """All findings are in one exception, by file and line."""
    with pytest.raises(LintError, match=r"k\.metal:1: .*k\.metal:2: "):
        check("k", "double x;\ngoto y;")
