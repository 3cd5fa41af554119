"""The emulator's own rules: MLX's wrapper text, Metal's rounding, strides, and each detector."""

import mlx.core as mx
import numpy as np
import pytest

from msl import toolchain
from msl.build import rewrite_threadgroup
from msl.emulator import MetalKernel
from msl.launch import KernelError, Options
from msl.wrapper import Body, text_for, text_from_mlx

needs_clang = pytest.mark.skipif(
    toolchain.reason_to_skip() is not None, reason=str(toolchain.reason_to_skip())
)
I = "uint i = thread_position_in_grid.x; "  # noqa: E741
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "template"),
    [
        (
            Body(
                "z",
                ["a", "s"],
                ["o", "p"],
                I + "o[i] = a[i * a_strides[0]] + a_ndim + s; p[i] = a_shape[0] * grid_size.x;",
                "// header\n",
            ),
            [mx.zeros((9, 3)), mx.array(2)],
            [mx.float32, mx.int32],
            [("N", 3), ("F", True), ("T", mx.float16)],
        ),
        (
            Body("tiny", ["a", "s"], ["o", "p"], I + "o[i] = a[i] + s; p[i] = 1;"),
            [mx.zeros((3,)), mx.array(2)],
            [mx.float32, mx.int32],
            None,
        ),
        (
            Body(
                "sum",
                ["a"],
                ["o"],
                I + "atomic_fetch_add_explicit(&o[0], a[i], memory_order_relaxed);",
                atomic_outputs=True,
            ),
            [mx.zeros((64,))],
            [mx.float32],
            None,
        ),
    ],
)
def test_wrapper_text_is_mlx_own(body, inputs, outputs, template):
    described = [(tuple(a.shape), str(a.dtype).split(".")[-1]) for a in inputs]
    names = [str(dtype).split(".")[-1] for dtype in outputs]
    theirs = text_from_mlx(body, inputs, [(4,)] * len(outputs), outputs, template)
    assert text_for(body, described, names, template).text.strip() == theirs.strip()


def run(source, *, inputs=(), dtype=mx.float32, size=64, group=64, mode="checked", **options):
    arrays = [mx.array(a) for a in inputs] or [mx.zeros((size,))]
    names = ["a", "b", "c"][: len(arrays)]
    kernel = MetalKernel("t", names, ["o"], I + source)
    return kernel(
        inputs=arrays,
        output_shapes=[(size,)],
        output_dtypes=[dtype],
        grid=(size, 1, 1),
        threadgroup=(group, 1, 1),
        mode=mode,
        options=Options(**options),
    )[0]


@needs_clang
def test_every_operation_rounds_in_its_type():
    a, b, c = (np.random.default_rng(n).standard_normal(64).astype(np.float16) for n in range(3))
    product = run("o[i] = a[i] * b[i] + c[i];", inputs=(a, b, c), dtype=mx.float16)
    np.testing.assert_array_equal(np.array(product), a * b + c)
    wide = a.astype(np.float32)
    tenth = run("o[i] = a[i] * 0.1;", inputs=(wide,))  # 0.1 is a float in MSL
    np.testing.assert_array_equal(np.array(tenth), wide * np.float32(0.1))
    x, y, z = (mx.array(v).astype(mx.bfloat16) for v in (a, b, c))
    brain = run("o[i] = a[i] * b[i] + c[i];", inputs=(x, y, z), dtype=mx.bfloat16)
    assert mx.array_equal(brain, x * y + z)


@needs_clang
def test_strided_inputs_keep_or_lose_their_strides():
    source = I + "o[i] = a[elem_to_loc(i, a_shape, a_strides, a_ndim)];"
    x = np.arange(64, dtype=np.float32).reshape(8, 8)[::2]
    for contiguous in (True, False):
        kernel = MetalKernel("s", ["a"], ["o"], source, ensure_row_contiguous=contiguous)
        (found,) = kernel(
            inputs=[x],
            output_shapes=[x.shape],
            output_dtypes=[mx.float32],
            grid=(x.size, 1, 1),
            threadgroup=(32, 1, 1),
        )
        np.testing.assert_array_equal(np.array(found), x)


@needs_clang
def test_edge_threadgroups_are_smaller():
    sizes = run("o[i] = threads_per_threadgroup.x;", size=70, group=32)
    assert sizes.tolist() == [32.0] * 64 + [6.0] * 6


BUGS = {
    "out-of-bounds": "o[i] = a[i + 1];",
    "race-threadgroup": "threadgroup float t[64]; t[i] = a[i]; o[i] = t[(i + 32) % 64];",
    "race-device": "o[0] = float(i); o[i] = 1.0f;",
    "uninit-threadgroup": "threadgroup float t[64]; if (i < 9) { t[i] = a[i]; } "
    + BARRIER
    + "o[i] = t[i];",
    "uninit-device": "float x = o[i]; o[i] = x;",
    "simd-divergence": "float x = 0.0f; if (i % 2 == 0) { x = simd_sum(a[i]); } "
    "else { x = simd_sum(a[i] + 1.0f); } o[i] = x;",
    "barrier": "if (i < 40) { " + BARRIER + "} o[i] = 1.0f;",
    "undefined-behaviour": "int n = int(a[i]); o[i] = float(7 / n);",
    "timeout": "float x = 1.0f; while (x > 0.0f) { x += 1.0f; if (x > 9.0f) { x = 1.0f; } } "
    "o[i] = x;",
    "simd-lane": "o[i] = simd_shuffle(a[i], ushort(40));",
    "limit": "threadgroup float t[9000]; t[i] = a[i]; o[i] = t[i];",
    "unwritten-output": "if (i != 5) { o[i] = a[i]; }",
    "write-to-input": "const_cast<device float*>(a)[i] = 1.0f; o[i] = 1.0f;",
}


@needs_clang
@pytest.mark.parametrize("kind", list(BUGS))
def test_each_detector(kind):
    with pytest.raises(KernelError) as caught:
        run(BUGS[kind], timeout=2)
    assert kind in caught.value.kinds


@needs_clang
def test_guard_pages_catch_what_fast_mode_does_not_check():
    with pytest.raises(KernelError) as caught:
        run("o[i] = a[i + 100000];", mode="fast")
    assert caught.value.kinds == {"memory-fault"}
    assert "kernel.metal" in str(caught.value)


@needs_clang
def test_a_report_names_both_lines_of_a_race():
    source = "threadgroup float t[64];\nt[i] = a[i];\no[i] = t[(i + 32) % 64];"
    with pytest.raises(KernelError) as caught:
        run(source, schedule="in order")
    race = next(issue for issue in caught.value.issues if issue.kind == "race-threadgroup")
    assert len({where.split(" ")[0] for where in race.where}) == 2


def test_threadgroup_declarations_are_rewritten_on_their_line():
    source = (
        "int x;\nthreadgroup float a[4], b[2][3];\nthreadgroup float* p = a; // threadgroup q;\n"
    )
    assert rewrite_threadgroup(source).split("\n") == [
        "int x;",
        "MSLSIM_TG(a, [4], float) MSLSIM_TG(b, [2][3], float)",
        "threadgroup float* p = a; // threadgroup q;",
        "",
    ]
