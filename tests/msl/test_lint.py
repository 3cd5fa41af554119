"""The lint refuses what Apple's compiler would, and only that."""

import mlx.core as mx
import pytest

from msl import toolchain
from msl.lint import lint
from msl.wrapper import Body

pytestmark = pytest.mark.skipif(
    toolchain.reason_to_skip() is not None, reason=str(toolchain.reason_to_skip())
)
I = "uint i = thread_position_in_grid.x; "  # noqa: E741
INLINE = "inline float g(const float* x) { return x[0]; }\n"


def findings(source, header="", template=None):
    body = Body("n", ["a", "c"], ["o"], source, header)
    return lint(body, [((64,), "float32"), ((4,), "float32")], ["float32"], template)


FAULTY = {
    "double": (I + "double x = a[i]; o[i] = float(x);", ""),
    "long long": (I + "long long x = 3; o[i] = float(x);", ""),
    "recursion": (
        I + "o[i] = f(3);",
        "inline float f(int n) { return n == 0 ? 1.0f : n * f(n - 1); }\n",
    ),
    "function pointer": (
        I + "float (*fp)(float) = g; o[i] = fp(a[i]);",
        "inline float g(float x) { return x; }\n",
    ),
    "pointer parameter without address space": (I + "o[i] = g(a + i);", INLINE),
    "thread pointer without qualifier": (I + "float z[2] = {a[i], 1.0f}; o[i] = g(z);", INLINE),
    "reference without address space": (
        I + "float z = a[i]; g(z); o[i] = z;",
        "inline void g(float& x) { x += 1.0f; }\n",
    ),
    "device pointer passed as threadgroup": (
        I + "o[i] = g(a);",
        "inline float g(const threadgroup float* x) { return x[0]; }\n",
    ),
    "constant input bound to device": (I + "const device float* p = c; o[i] = p[0];", ""),
    "constant input passed as device": (
        I + "o[i] = g(c);",
        "inline float g(const device float* x) { return x[0]; }\n",
    ),
    "lambda": (I + "auto f = [](float x) { return x * 2.0f; }; o[i] = f(a[i]);", ""),
    "std": (I + "o[i] = std::max(a[i], 0.0f);", ""),
    "virtual": (I + "o[i] = 0.0f;", "struct S { virtual void f() {} };\n"),
    "new": (I + "float* p = new float[3]; o[i] = p[0];", ""),
    "variable length array": (I + "float t[i]; t[0] = 1.0f; o[i] = t[0];", ""),
    "threadgroup array in a function": (
        I + "o[i] = g(a[i]);",
        "inline float g(float x) { threadgroup float t[32]; t[0] = x; return t[0]; }\n",
    ),
    "threadgroup array in a block": (
        I + "if (i > 3) { threadgroup float t[32]; t[0] = 1.0f; o[i] = t[0]; }",
        "",
    ),
    "threadgroup array with initialiser": (
        I + "threadgroup float t[4] = {0, 0, 0, 0}; o[i] = t[0];",
        "",
    ),
    "global without constant": (I + "o[i] = G;", "float G = 3.0f;\n"),
    "static local": (I + "static float s = 0.0f; s += 1.0f; o[i] = s;", ""),
    "goto": (I + "if (i > 4) goto end; o[i] = 1.0f; end: ;", ""),
    "write to an input": (I + "a[i] = 1.0f; o[i] = 0.0f;", ""),
    "release ordering": (
        I + "threadgroup atomic_int t; "
        "atomic_store_explicit(&t, 0, memory_order_release); o[i] = 0.0f;",
        "",
    ),
    "misspelt attribute": (I + "o[i] = float(threadgroup_pos_in_grid.x);", ""),
    "vector of too few components": (I + "float4 v = float4(a[i], 1.0f, 2.0f); o[i] = v.x;", ""),
    "uninitialised local": (
        I + "float s; for (int k = 0; k < 3; k++) { s += a[k]; } o[i] = s;",
        "",
    ),
    "missing return": (
        I + "o[i] = g(a[i]);",
        "inline float g(float x) { if (x > 0.0f) { return 1.0f; } }\n",
    ),
    "non-ASCII comment": (I + "o[i] = 1.0f; // \u03bc", ""),
    "memcpy": (I + "float t[2]; memcpy(t, a, 8); o[i] = t[0];", ""),
    "missing semicolon": (I + "o[i] = 1.0f", ""),
    "if with initialiser": (I + "if (int k = 3; k > 2) { o[i] = 1.0f; }", ""),
    "cast across address spaces": (
        I + "threadgroup float4 t[4]; device float* p = (device float*)t; o[i] = p[0];",
        "",
    ),
    "shape only in a comment": (I + "o[i] = 1.0f; // a_shape1", ""),
}


@pytest.mark.parametrize("name", list(FAULTY))
def test_refused(name):
    assert findings(*FAULTY[name])


@pytest.mark.parametrize(
    "source",
    [
        "o[i] = a[i] * 0.5;",
        "if constexpr (sizeof(float) == 4) { o[i] = 1.0f; }",
        "threadgroup float t[4]; t[i % 4] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        " o[i] = t[0] + c[0] + simd_sum(a[i]);",
    ],
)
def test_accepted(source):
    assert findings(I + source) == []


def test_a_finding_names_its_line():
    source = "uint i = thread_position_in_grid.x;\nfloat x = a[i];\no[i] = x + y;"
    (found,) = findings(source)
    assert (found.part, found.line) == ("source", 3)
    assert "y" in found.message


def test_templates_are_substituted():
    assert (
        findings(I + "T x = T(N); o[i] = float(x);", template=[("T", mx.float16), ("N", 3)]) == []
    )
