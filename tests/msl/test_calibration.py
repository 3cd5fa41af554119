"""Is the emulator itself right? MLX's own kernels, known good on Apple GPUs, through every check.

Their text is read from the headers in the installed wheel, so this also fails where an MLX upgrade
needs something the emulator lacks.
"""

import re

import mlx.core as mx
import numpy as np
import pytest

from msl import toolchain
from msl.build import library
from msl.emulator import to_numpy
from msl.launch import Buffer, Options, launch

pytestmark = pytest.mark.skipif(
    toolchain.reason_to_skip() is not None, reason=str(toolchain.reason_to_skip())
)
KERNELS = "mlx/backend/metal/kernels/"
TYPES = {"float": mx.float32, "half": mx.float16, "bfloat16_t": mx.bfloat16}
TOLERANCE = {"float": 3e-6, "half": 3e-3, "bfloat16_t": 2e-2}


def flatten(paths, seen):
    """Headers with their own includes in place, each once; the emulator's overrides first."""
    out = []
    for path in paths:
        file = toolchain.INCLUDE / path
        file = file if file.exists() else toolchain.mlx_headers() / path
        if file not in seen:
            seen.add(file)
            text = file.read_text().replace("#pragma once", "")
            nested = lambda m: flatten([m.group(1)], seen) + "\n"  # noqa: E731
            out.append(re.sub(r'#include "(mlx/[^"]+)"', nested, text))
    return "\n".join(out)


def run(headers, call, arguments, attributes, grid, group, mode="checked", constants=None):
    """arguments: (array, C++ cast, output?) in the order of the kernel's buffers."""
    text = flatten([KERNELS + name for name in ("utils.h", *headers)], set())
    constant = r"constant (\w+) {} \[\[function_constant\(\d+\)\]\];"
    for name, value in (constants or {}).items():
        text = re.sub(constant.format(name), rf"constant const \1 {name} = {value};", text)
    text = re.sub(constant.format(r"(\w+)"), r"constant \1 \2 = 0;", text)
    text = re.sub(r"\[\[threadgroup\(\d\)\]\]", "", text)
    buffers, casts = [], []
    for index, (array, cast, output) in enumerate(arguments):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        buffers.append(Buffer(f"argument {index}", data, array.itemsize, output))
        casts.append(f"{cast}b[{index}]")
    casts += [f"a->{attribute}" for attribute in attributes]
    signature = "void mslsim_kernel_entry(void** b, const mslsim_attrs* a)"
    entry = f'extern "C" {signature} {{ {call}({", ".join(casts)}); }}\n'
    built = library(text, entry, mode, "#include <metal_stdlib>\n")
    result = launch(built, buffers, grid, group, Options(checked=mode == "checked"))
    assert result.issues == [], "\n".join(map(str, result.issues))
    return [buffer.data for buffer in buffers if buffer.output]


def typed(data, kind):
    if kind == "bfloat16_t":
        return np.array(mx.array(data.view(np.uint16)).view(mx.bfloat16).astype(mx.float32))
    return data.view({"half": np.float16, "float": np.float32}[kind]).astype(np.float32)


def bits(array):
    return to_numpy(array)[0]


def number(value):
    return np.array([value], np.int32), "*(const int*)", False


def normal(shape, kind, scale=1.0):
    values = mx.random.normal(shape, key=mx.random.key(sum(shape)))
    return (values * scale).astype(TYPES[kind])


@pytest.mark.parametrize(("kind", "columns"), [("float", 1000), ("bfloat16_t", 1001)])
def test_softmax(kind, columns):
    x = normal((3, columns), kind, 5.0)
    threads = ((columns + 3) // 4 + 31) // 32 * 32
    (found,) = run(
        ["softmax.h"],
        f"softmax_single_row<{kind}, float>",
        [
            (bits(x), f"(const {kind}*)", False),
            (np.zeros(x.shape, bits(x).dtype), f"({kind}*)", True),
            number(columns),
        ],
        ["tgpig.x", "tpit.x", "tiis", "sgit"],
        (3 * threads, 1, 1),
        (threads, 1, 1),
    )
    expected = np.array(mx.softmax(x.astype(mx.float32), axis=-1))
    np.testing.assert_allclose(typed(found, kind).reshape(3, -1), expected, atol=TOLERANCE[kind])


@pytest.mark.parametrize(("kind", "head_dim"), [("half", 64), ("bfloat16_t", 128)])
def test_attention_of_one_query(kind, head_dim):
    heads, keys = 2, 77
    q, k, v = (normal((1, heads, n, head_dim), kind) for n in (1, keys, keys))
    read = f"(const {kind}*)"
    stride = lambda n: (np.array([n], np.int64), "*(const size_t*)", False)  # noqa: E731
    nothing = np.zeros(8, np.uint16)
    flags = ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks")
    (found,) = run(
        ["sdpa_vector.h"],
        f"sdpa_vector<{kind}, {head_dim}>",
        [
            *((bits(array), read, False) for array in (q, k, v)),
            (np.zeros((heads, head_dim), bits(q).dtype), f"({kind}*)", True),
            number(1),
            number(keys),
            *(stride(n) for n in (keys * head_dim, head_dim, keys * head_dim, head_dim)),
            (np.array([head_dim**-0.5], np.float32), "*(const float*)", False),
            (nothing, "(const bool*)", False),
            (nothing, read, False),
            *(number(0),) * 3,
            (nothing, read, False),
            number(heads),
        ],
        ["tgpig", "tgpg", "sgit", "tiis"],
        (heads * 1024, 1, 1),
        (1024, 1, 1),
        constants={**dict.fromkeys(flags, "false"), "blocks": "0"},
    )
    wide = (array.astype(mx.float32) for array in (q, k, v))
    expected = np.array(mx.fast.scaled_dot_product_attention(*wide, scale=head_dim**-0.5))
    error = np.abs(typed(found, kind) - expected.reshape(-1)).max()
    assert error < TOLERANCE[kind]


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "inner", "mode"),
    [
        ("half", 40, 96, 256, "checked"),
        ("bfloat16_t", 33, 80, 128, "checked"),
        ("float", 33, 64, 128, "fast"),
    ],
)
def test_quantized_matrix_product(kind, rows, columns, inner, mode):
    packed, scales, biases = mx.quantize(normal((columns, inner), kind, 0.05))
    x = normal((rows, inner), kind)
    read, none = f"(const {kind}*)", np.zeros(4, np.int64)
    aligned = "true" if columns % 32 == 0 else "false"
    shape, strides = (np.zeros(4, np.int32), "(const int*)", False), "(const int64_t*)"
    (found,) = run(
        ["steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"],
        f"affine_qmm_t<{kind}, 64, 4, {aligned}, false>",
        [
            (bits(packed), "(const uint32_t*)", False),
            (bits(scales), read, False),
            (bits(biases), read, False),
            (bits(x), read, False),
            (np.zeros((rows, columns), bits(x).dtype), f"({kind}*)", True),
            *(number(n) for n in (inner, columns, rows, 1)),
            shape,
            (none, strides, False),
            number(1),
            shape,
            *((none, strides, False),) * 3,
        ],
        ["tgpig", "tiit", "sgit", "tiis"],
        (32 * -(-columns // 32), 2 * -(-rows // 32), 2),
        (32, 2, 2),
        mode,
    )
    wide = [array.astype(mx.float32) for array in (scales, biases)]
    weight = np.array(mx.dequantize(packed, *wide)).astype(np.float64)
    expected = np.array(x.astype(mx.float32)).astype(np.float64) @ weight.T
    error = np.abs(typed(found, kind).reshape(rows, columns) - expected).max()
    assert error / np.abs(expected).max() < TOLERANCE[kind]
