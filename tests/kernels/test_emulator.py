"""The emulator executes Metal's model, and flags what Metal leaves undefined."""

import math
from hashlib import sha256

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_kernels import emulator
from veloxquant_kernels.emulator.build import restore, translation_unit
from veloxquant_kernels.lint import LintError
from veloxquant_kernels.signature import ArraySpec, generate

pytestmark = pytest.mark.usefixtures("compiler")


def run(body, *inputs, n=64, grid=None, group=None, dtype=mx.float32, shape=None, mode="checked", seed=0, **options):
    """Run ``body`` with inputs a, b, ... and one output ``out``; returns the output and the launch's report."""
    with emulator.session(mode, seed) as record:
        (out,) = emulator.launch(
            "probe",
            body,
            input_names=list("abcd")[: len(inputs)],
            inputs=[mx.array(x) for x in inputs],
            output_names=["out"],
            output_shapes=[shape or (n,)],
            output_dtypes=[dtype],
            grid=grid or (n, 1, 1),
            threadgroup=group or (n, 1, 1),
            **options,
        )
    return np.array(out), record.launches[-1]


def fault_of(body, *inputs, **options):
    with pytest.raises(emulator.KernelFault) as caught:
        run(body, *inputs, **options)
    return caught.value


IOTA = np.arange(64, dtype=np.float32)
TID = "uint i = thread_position_in_grid.x; uint t = thread_index_in_threadgroup;\n"


# ---- faults, each seeded in a body that is right without it --------------------------------------

REVERSE = (
    TID
    + """threadgroup float shared[64];
shared[t] = a[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
out[i] = shared[63 - t];"""
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_correct_kernel_passes(seed):
    """Reversal through threadgroup memory with its barrier is right under every schedule."""
    out, _ = run(REVERSE, IOTA, seed=seed)
    np.testing.assert_array_equal(out, IOTA[::-1])


@pytest.mark.parametrize("seed", [0, 5])
def test_a_missing_barrier_is_flagged(seed):
    """Without the barrier a thread reads memory that another may not have written yet, or races with its writer."""
    body = REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    fault = fault_of(body, IOTA, seed=seed)
    assert fault.kind in ("data race", "uninitialised read")
    assert fault.body_line == 5


def test_a_data_race_is_flagged():
    """Two threads write one threadgroup word between barriers."""
    fault = fault_of(TID + "threadgroup float one[1];\none[0] = a[i];\nout[i] = 0.0f;", IOTA)
    assert (fault.kind, fault.body_line) == ("data race", 3)


def test_a_read_then_write_race_is_flagged():
    """A neighbour overwrites what a thread of the other simdgroup has just read."""
    body = TID + (
        "threadgroup float s[64];\ns[t] = a[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "float x = s[(t + 32) % 64];\ns[t] = x;\nout[i] = x;"
    )
    assert fault_of(body, IOTA).kind == "data race"


def test_a_barrier_without_the_memory_flag_orders_nothing():
    """mem_none waits, but makes no write visible."""
    fault = fault_of(REVERSE.replace("mem_flags::mem_threadgroup", "mem_flags::mem_none"), IOTA)
    assert fault.kind == "data race"


def test_a_simdgroup_barrier_orders_one_simdgroup_only():
    """Exchange within a simdgroup is ordered by simdgroup_barrier; across simdgroups it races."""
    within = REVERSE.replace("threadgroup_barrier", "simdgroup_barrier").replace("63 - t", "t ^ 31")
    out, _ = run(within, IOTA)
    np.testing.assert_array_equal(out, IOTA.reshape(2, 32)[:, ::-1].ravel())
    across = REVERSE.replace("threadgroup_barrier", "simdgroup_barrier")
    assert fault_of(across, IOTA).kind in ("data race", "uninitialised read")


def test_two_threadgroups_writing_one_device_word_race():
    """Threadgroups of a launch are never ordered with each other."""
    body = "if (thread_index_in_threadgroup == 0) { out[0] = 1.0f; }"
    fault = fault_of(body, grid=(64, 1, 1), group=(32, 1, 1))
    assert fault.kind == "data race"
    assert "another threadgroup" in str(fault)


@pytest.mark.parametrize("index", ["i + 1", "i - 1", "i + 100000000"])
def test_an_out_of_bounds_read_is_flagged(index):
    """One past the end, one before the start, and far away, in device memory."""
    fault = fault_of(TID + f"\nout[i] = a[{index}];", IOTA)
    assert (fault.kind, fault.body_line) == ("out of bounds", 3)


def test_an_out_of_bounds_write_is_flagged():
    """A write one past the end of an output does not reach memory."""
    assert fault_of(TID + "out[i + 1] = 0.0f;").kind == "out of bounds"


@pytest.mark.parametrize("index", [64, 68, -1])
def test_threadgroup_memory_has_bounds(index):
    """An access beside a threadgroup array is flagged even where another array lies next to it."""
    body = (
        TID + f"threadgroup float s[64];\nthreadgroup float r[64];\ns[t] = r[t] = 0.0f;\nif (t == 0) s[{index}] = 1.0f;"
    )
    fault = fault_of(body + "\nout[i] = 0.0f;")
    assert (fault.kind, fault.body_line) == ("out of bounds", 5)


def test_an_index_outside_of_a_local_array_is_flagged():
    """A thread's own array has bounds too."""
    body = TID + "float x[4] = {0.0f, 1.0f, 2.0f, 3.0f};\nout[i] = x[uint(a[i])];"
    assert fault_of(body, IOTA).kind == "undefined"


def test_an_uninitialised_threadgroup_read_is_flagged():
    """Threadgroup memory that no thread of this group has written holds nothing."""
    fault = fault_of(TID + "threadgroup float s[64];\nout[i] = s[t];")
    assert (fault.kind, fault.body_line) == ("uninitialised read", 3)


def test_threadgroup_memory_does_not_outlive_its_group():
    """What the first group wrote is uninitialised for the second."""
    body = TID + "threadgroup float s[32];\nif (threadgroup_position_in_grid.x == 0) { s[t] = 0.0f; }\nout[i] = s[t];"
    assert fault_of(body, group=(32, 1, 1)).kind == "uninitialised read"


def test_an_uninitialised_output_read_is_flagged():
    """Outputs start undefined, unless init_value fills them."""
    body = TID + "out[i] = out[i] + 1.0f;"
    assert fault_of(body).kind == "uninitialised read"
    out, _ = run(body, init_value=2.0)
    np.testing.assert_array_equal(out, np.full(64, 3.0))


@pytest.mark.parametrize(
    "body",
    [
        "if (t < 32) { threadgroup_barrier(mem_flags::mem_none); }",
        "if (t < 32) {\n BARRIER } else {\n BARRIER }".replace("BARRIER", "threadgroup_barrier(mem_flags::mem_none);"),
        "for (uint k = 0; k < 1 + t / 32; ++k) { threadgroup_barrier(mem_flags::mem_none); }",
        "if (t == 5) { simdgroup_barrier(mem_flags::mem_none); }",
    ],
    ids=["some threads", "two barriers", "unequal trips", "simdgroup"],
)
def test_a_divergent_barrier_is_flagged(body):
    """Every thread of the group must meet the same barrier."""
    fault = fault_of(TID + body + "\nout[i] = 0.0f;")
    assert fault.kind in ("divergent barrier", "divergent SIMD operation")
    assert fault.body_line >= 2


def test_a_divergent_simd_operation_is_flagged():
    """Lanes of one simdgroup in two different reductions."""
    body = TID + "float x = 0.0f;\nif (t % 2) {\n x = simd_sum(1.0f);\n} else {\n x = simd_sum(2.0f);\n}\nout[i] = x;"
    assert fault_of(body).kind == "divergent SIMD operation"


def test_a_shuffle_from_a_lane_that_returned_is_flagged():
    """A value is read from a lane that does not take part."""
    body = TID + "if (t % 32 > 15) { out[i] = 0.0f; return; }\nout[i] = simd_shuffle_xor(1.0f, 16);"
    assert fault_of(body).kind == "undefined"


@pytest.mark.parametrize("expression", ["1u << uint(a[i])", "uint(1 / int(a[i]))", "uint(2147483647 + int(a[i]))"])
def test_undefined_integer_operations_are_flagged(expression):
    """A shift by 32 or more, a division by zero, a signed overflow."""
    assert fault_of(TID + f"out[i] = float({expression});", IOTA).kind == "undefined"


def test_threadgroup_memory_is_limited():
    """32 KiB is what an Apple GPU has."""
    body = TID + "threadgroup float s[8193];\ns[t] = 0.0f;\nout[i] = s[t];"
    fault = fault_of(body, mode="fast")
    assert "limit is 32768" in str(fault)
    run(body.replace("8193", "8192"))


# ---- meaning -------------------------------------------------------------------------------------


def test_thread_positions_of_an_uneven_grid():
    """dispatchThreads cuts the edge groups: positions, sizes and counts follow."""
    body = """uint3 p = thread_position_in_grid;
uint3 g = threadgroup_position_in_grid;
uint3 l = thread_position_in_threadgroup;
uint at = (p.z * 5 + p.y) * 7 + p.x;
out[at] = g.x * 4 + l.x + 100 * (g.y * 2 + l.y) + 10000 * p.z + 100000 * threads_per_threadgroup.x
    + 1000000 * threads_per_threadgroup.y + 10000000 * threadgroups_per_grid.x * threadgroups_per_grid.y;"""
    out, _ = run(body, dtype=mx.uint32, shape=(3, 5, 7), grid=(7, 5, 3), group=(4, 2, 1), seed=4)
    z, y, x = np.meshgrid(np.arange(3), np.arange(5), np.arange(7), indexing="ij")
    wide, high = np.where(x < 4, 4, 3), np.where(y < 4, 2, 1)
    expected = x + 100 * y + 10000 * z + 100000 * wide + 1000000 * high + 10000000 * 2 * 3
    np.testing.assert_array_equal(out, expected)


def test_simd_functions():
    """Reductions, shuffles and prefix sums over a simdgroup, against NumPy."""
    x = np.random.default_rng(0).integers(0, 1000, 64).astype(np.int32)
    lanes = x.reshape(2, 32)
    index = np.arange(32)
    cases = {
        "simd_sum(a[i])": lanes.sum(1, keepdims=True) + 0 * lanes,
        "simd_max(a[i])": lanes.max(1, keepdims=True) + 0 * lanes,
        "simd_min(a[i])": lanes.min(1, keepdims=True) + 0 * lanes,
        "simd_xor(a[i])": np.bitwise_xor.reduce(lanes, axis=1, keepdims=True) + 0 * lanes,
        "simd_shuffle(a[i], (t + 3) % 32)": lanes[:, (index + 3) % 32],
        "simd_shuffle_xor(a[i], 5)": lanes[:, index ^ 5],
        "simd_broadcast(a[i], 7)": lanes[:, [7]] + 0 * lanes,
        "simd_prefix_inclusive_sum(a[i])": lanes.cumsum(1),
        "simd_prefix_exclusive_sum(a[i])": lanes.cumsum(1) - lanes,
        "int(popcount(uint(simd_ballot(a[i] > 500))))": (lanes > 500).sum(1, keepdims=True) + 0 * lanes,
    }
    for expression, expected in cases.items():
        out, _ = run(TID + f"out[i] = {expression};", x, dtype=mx.int32, mode="fast", seed=3)
        np.testing.assert_array_equal(out.reshape(2, 32), expected, err_msg=expression)


def test_simd_sum_counts_active_lanes_only():
    """Lanes that have returned take no part in a reduction."""
    out, _ = run(TID + "if (t % 32 >= 10) { out[i] = 0.0f; return; }\nout[i] = simd_sum(1.0f);")
    np.testing.assert_array_equal(out.reshape(2, 32), np.tile(np.where(np.arange(32) < 10, 10.0, 0.0), (2, 1)))


@pytest.mark.parametrize(("dtype", "name"), [(mx.float16, "half"), (mx.bfloat16, "bfloat")])
def test_conversions_round_as_mlx_does(dtype, name):
    """float to half and bfloat, nearest even with subnormals, infinities and NaN, agree with MLX bit for bit."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    edge = np.array([0, 1e-8, 5.96e-8, 2.9802322e-8, 6.1e-5, 65504, 65519.99, 65520, 1e30, np.inf, np.nan], np.float32)
    x = np.concatenate([bits.view(np.float32), edge, -edge, (rng.standard_normal(4096) * 1e-5).astype(np.float32)])
    x = np.where(np.isnan(x), np.float32(np.nan), x)
    (out,) = emulator.launch(
        "convert",
        f"uint i = thread_position_in_grid.x; out[i] = {name}(a[i]);",
        input_names=["a"],
        inputs=[mx.array(x)],
        output_names=["out"],
        output_shapes=[(x.size,)],
        output_dtypes=[dtype],
        grid=(x.size, 1, 1),
        threadgroup=(64, 1, 1),
    )
    expected = mx.array(x).astype(dtype)
    finite = ~np.isnan(x)
    np.testing.assert_array_equal(np.array(out.view(mx.uint16))[finite], np.array(expected.view(mx.uint16))[finite])
    assert np.isnan(np.array(out.astype(mx.float32))[~finite]).all()


def test_half_arithmetic_rounds_after_every_operation():
    """half * half + half is rounded twice, as NumPy's float16 does."""
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(64).astype(np.float16) for _ in range(2))
    out, _ = run(TID + "out[i] = a[i] * b[i] + a[i];", a, b, dtype=mx.float16)
    np.testing.assert_array_equal(out, a * b + a)


def test_atomics():
    """64 threads count and take the maximum of one word each, without a race."""
    body = TID + "atomic_fetch_add_explicit(&out[0], 1u, memory_order_relaxed);\n"
    body += "atomic_fetch_max_explicit(&out[1], i, memory_order_relaxed);"
    out, _ = run(body, dtype=mx.uint32, shape=(2,), init_value=0, atomic_outputs=True, group=(32, 1, 1), seed=1)
    np.testing.assert_array_equal(out, [64, 63])


def test_seeds_change_the_order():
    """A kernel whose result depends on the schedule gives different results for different seeds."""
    body = TID + "out[i] = float(atomic_fetch_add_explicit((threadgroup atomic_uint*)&s[0], 1u, memory_order_relaxed));"
    body = body.replace("out[i]", "threadgroup uint s[1];\nif (t == 0) { s[0] = 0; }\n"
                        "threadgroup_barrier(mem_flags::mem_threadgroup);\nout[i]")  # fmt: skip
    orders = {tuple(run(body, seed=seed)[0]) for seed in range(4)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_shapes_and_strides_arrive():
    """``_shape``, ``_strides`` and ``_ndim`` hold the input's."""
    body = "if (thread_position_in_grid.x == 0) { out[0] = a_shape[1]; out[1] = int(a_strides[0]); out[2] = a_ndim; }"
    out, _ = run(body, np.zeros((2, 3, 4), np.float32), dtype=mx.int32, shape=(3,))
    np.testing.assert_array_equal(out, [3, 12, 3])


def test_non_contiguous_inputs_are_read_in_row_order():
    """A transposed input is made contiguous first, as MLX does by default."""
    x = mx.array(np.arange(64, dtype=np.float32).reshape(8, 8)).T
    out, _ = run(TID + "out[i] = a[i];", x)
    np.testing.assert_array_equal(out.reshape(8, 8), np.arange(64).reshape(8, 8).T)


# ---- traffic, cache, text ------------------------------------------------------------------------


def test_traffic_is_counted():
    """Each thread reads two halves and writes one float; one row is read by every thread."""
    a = np.zeros(128, np.float16)
    _, report = run(TID + "out[i] = float(a[i]) + float(a[i + 64]) + float(b[3]);", a, np.zeros(16, np.float32))
    assert (report.traffic("a").bytes_read, report.traffic("a").unique_bytes_read) == (256, 256)
    assert (report.traffic("b").bytes_read, report.traffic("b").unique_bytes_read) == (64 * 4, 4)
    assert (report.traffic("out").bytes_written, report.traffic("out").bytes_initialised) == (256, 256)


def test_executed_text_is_the_given_text():
    """Undoing the rewritings of the compiled C++ gives MLX's source, hash for hash."""
    generated = generate("probe", REVERSE, input_names=["a"], inputs=[ArraySpec(mx.float32, (64,))],
                         output_names=["out"], output_dtypes=[mx.float32], template=[("T", mx.float16)])  # fmt: skip
    unit = translation_unit(generated)
    assert "VQ_THREADGROUP(float, shared, 64);" in unit
    assert "host_name" not in unit
    restored = restore(unit)[unit.index("template <") :][: len(generated.text)]
    assert sha256(restored.encode()).hexdigest() == sha256(generated.text.encode()).hexdigest()


def test_modules_are_cached_by_content(tmp_path, monkeypatch):
    """A second build of the same text compiles nothing; another text makes another library."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path))
    for value in (1.0, 1.0, 2.0):
        run(TID + f"out[i] = {value}f;", mode="fast")
    assert len(list((tmp_path / "emulator").glob("[!l]*.so"))) == 2


def test_a_text_that_does_not_compile_says_why():
    """The compiler's message reaches the user."""
    with pytest.raises(emulator.CompilationFailed, match="undeclared_name"):
        run("out[0] = undeclared_name;")


def test_no_compiler_is_one_clear_sentence(monkeypatch):
    """Without a compiler the error says what to install."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    emulator.find_compiler.cache_clear()
    try:
        with pytest.raises(emulator.CompilerNotFound, match="install g\\+\\+ or clang"):
            emulator.find_compiler()
    finally:
        emulator.find_compiler.cache_clear()


@pytest.mark.parametrize(("grid", "group"), [((0, 1, 1), (1, 1, 1)), ((4096, 1, 1), (2048, 1, 1))])
def test_metal_limits_on_grids(grid, group):
    """An empty grid and more than 1024 threads in a group are refused."""
    with pytest.raises(ValueError, match="threadgroup"):
        run(TID + "out[i] = 0.0f;", grid=grid, group=group)


def test_lint_runs_before_compilation():
    """A double in a body never reaches the compiler."""
    with pytest.raises(LintError, match=r"probe\.metal:2: double"):
        run("uint i = 0;\ndouble x = 1.0;\nout[i] = float(x);")


def test_exp_is_libm_accurate():
    """exp over [-80, 80] stays within 2 ulp of the double result."""
    x = np.linspace(-80, 80, 64).astype(np.float32)
    out, _ = run(TID + "out[i] = exp(a[i]);", x)
    expected = np.array([math.exp(float(v)) for v in x])
    np.testing.assert_allclose(out, expected, rtol=2 * 2.0**-23)
