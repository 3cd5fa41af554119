"""Every operation's own probes, which decide on a Mac whether its kernel runs, in the emulator.

The shapes are the published layouts' and the demo's; rows, experts and tokens are fewer, so that
the emulator is done in seconds, and every width is the real one.
"""

import ast
import inspect
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from harness import DTYPES, emulated, emulator_only, mutated
from msl.launch import KernelError

import mlx_dgemma
from mlx_dgemma.kernels import probe, registry
from mlx_dgemma.kernels.report import published_shapes

LAYOUTS = ("affine 4/64", "affine 8/64", "mxfp4 4/32", "dense")
# What the emulator can do in a second or two, of each operation's rows.
FEWER = {
    "row_statistics": {"rows": 1},
    "survivors": {"rows": 1},
    "gather_embeddings": {"rows": 4},
    "normed_heads": {"length": 5},
    "attention": {"length": 1, "heads": 4},
    "router": {"tokens": 40},
    "moe": {"tokens": 3, "experts": 2, "top_k": 1},
}
DEMO = {
    "row_statistics": {"vocabulary": 896, "rows": 32},
    "accept": {"length": 32},
    "survivors": {"vocabulary": 896, "rows": 32},
    "gather_embeddings": {"hidden": 128, "rows": 4},
    "normed_heads": {"length": 32, "heads": 4, "head_dim": 64},
    "attention": {"length": 4, "heads": 4, "kv_heads": 1, "head_dim": 64},
    "router": {"tokens": 32, "experts": 8, "top_k": 2},
    "moe": {"tokens": 32, "hidden": 128, "width": 64, "experts": 8, "top_k": 2},
}


def cases():
    """(operation, shape): the published widths and the demo's, every dtype and layout."""
    for name, published in published_shapes().items():
        for sizes in (FEWER.get(name, {}), DEMO[name]):
            for dtype in DTYPES if "dtype" in published else [None]:
                for layout in LAYOUTS if name in ("moe", "gather_embeddings") else [None]:
                    if name == "gather_embeddings" and layout == "mxfp4 4/32":
                        continue  # the table's twin is taken
                    shape = {**published, **sizes}
                    real = sizes is not DEMO[name]
                    if real and name in ("moe", "row_statistics") and dtype != mx.bfloat16:
                        continue  # as wide, and of another dtype, in the demo's shape
                    if dtype is not None:
                        shape["dtype"] = str(dtype)
                    if name == "survivors":
                        shape["table"] = str(dtype)
                    if name == "gather_embeddings":
                        shape["table"] = layout
                    if name == "moe":
                        shape["gate_up"] = shape["down"] = layout
                    yield name, shape


CASES = list(cases())


def checked(name, shape):
    """The findings of a real check but its times: probes, their order and their judgement."""
    with emulated("greedy"):
        return probe.check(registry.operations()[name], shape)


@pytest.fixture(autouse=True)
def _untimed(monkeypatch):
    monkeypatch.setattr(probe, "_median_ms", lambda run: 1.0)


@emulator_only
@pytest.mark.parametrize(
    ("name", "shape"), CASES, ids=[" ".join(map(str, (n, *s.values()))) for n, s in CASES]
)
def test_a_right_kernel_passes(name, shape):
    findings = checked(name, shape)
    assert findings["failure"] is None


# A wrong value in every part of every kernel; races are for the emulator's own checks.
MUTANTS = [
    ("row_statistics", "row_statistics", "top = simd_max(m);", "top = m;"),
    ("row_statistics", "row_statistics", "      target -= running;\n", ""),
    ("row_statistics", "row_statistics", "SAMPLING == 2 ? w : z;", "z;"),
    ("row_statistics", "row_statistics", "best == group_top ? best_index", "true ? best_index"),
    ("accept", "accept", "running - next <= limit", "running <= limit"),
    ("accept", "accept", "other == value && j < i", "other == value && j > i"),
    ("accept", "accept", "inside && !held && is_finite", "inside && is_finite"),
    ("survivors", "survivors", "simd_sum(kept)", "kept"),
    ("survivors", "survivors", "simd_sum(total)", "total"),
    ("survivors", "survivors", "1.0f - sum_kept / sum", "1.0f - sum_kept"),
    ("survivors", "survivors", "1.0f - sum_kept / sum", "0.0f"),
    ("survivors", "survivors", "static_cast<float>(static_cast<E>(t)) - shift",
     "t - shift - 0.01f"),
    ("gather_embeddings", "gather_embeddings", "sum[j] / total", "sum[j]"),
    ("gather_embeddings", "gather_embeddings", "id * (H / GROUP) + column / GROUP",
     "id * (H / GROUP)"),
    ("gather_embeddings", "gather_embeddings", "packed >> (j * WIDTH)", "packed >> j"),
    ("normed_heads", "normed_heads", "simd_sum(squares)", "squares"),
    ("normed_heads", "normed_heads", "first * c - second * s", "first * c + second * s"),
    ("normed_heads", "normed_heads", "x_strides[1] + head", "x_strides[1] + 0 * head"),
    ("attention", "chunk_softmax", "mask[line + i]", "mask[i]"),
    ("attention", "chunk_softmax", "held[j] = LOWEST;", "held[j] = 9.0f;"),
    ("attention", "chunk_softmax", "whole > 0.0f ? 1.0f / whole : 0.0f", "1.0f"),
    ("attention", "merge_attention", "output[at] * keep", "output[at]"),
    ("attention", "merge_attention", "SHARED ? ", "false ? "),
    ("router", "top_experts", "value[j] > best)", "value[j] >= best)"),
    ("router", "top_experts", "* static_cast<float>(per_expert[index[k]])", ""),
    ("router", "sort_by_expert", "mine += choice[i] == lid", "mine += choice[i] <= lid"),
    ("moe", "experts", "(weight_row * K + k0) / GROUP", "(weight_row * K) / GROUP"),
    ("moe", "experts", "(own_row / 8) * O", "(own_row / 8) * 8"),
    ("moe", "experts", "GLU ? row0 + r : order[row0 + r]", "row0 + r"),
    ("moe", "experts", "gelu_tanh(gate) * up", "gate * up"),
    ("moe", "combine", "weights[pair]", "weights[token]"),
]  # fmt: skip


@emulator_only
@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_a_wrong_kernel_fails(number):
    name, kernel, old, new = MUTANTS[number]
    sizes = FEWER if name in ("router", "attention") else DEMO
    shape = {**published_shapes()[name], **sizes[name]}
    with mutated(kernel, old, new):
        try:
            failure = checked(name, shape)["failure"]
        except KernelError as error:  # it wrote where it must not, or left something unwritten
            failure = str(error)
    assert failure is not None


def test_every_kernel_has_a_mutant():
    kernels = {kernel.name for one in registry.operations().values() for kernel in one.kernels}
    assert {kernel for _, kernel, _, _ in MUTANTS} == kernels


def test_what_should_vanish_has_its_own_scale():
    tiny, nothing = [mx.array([1.2e-7])], [mx.array([0.0])]
    assert probe.largest_error(tiny, nothing) == float("inf")
    assert probe.largest_error(tiny, nothing, least=1.0) < 1e-6
    assert probe.largest_error(nothing, nothing) == 0.0
    assert probe.largest_error([mx.array([1])], [mx.array([1.0])]) == float("inf")


def test_every_name_of_mlx_that_the_package_uses_is_there():
    """What `Any` or an ignored complaint would hide until a Mac runs into it."""
    absent = []
    for path in Path(mlx_dgemma.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            chain, inner = [], node
            while isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
                inner = inner.value
            if not (chain and isinstance(inner, ast.Name) and inner.id in ("mx", "nn")):
                continue
            found = {"mx": mx, "nn": nn}[inner.id]
            for attribute in reversed(chain):
                if not (inspect.ismodule(found) or found is mx.array):
                    break
                if not hasattr(found, attribute):
                    absent.append(f"{path.name}:{node.lineno}: {'.'.join(reversed(chain))}")
                    break
                found = getattr(found, attribute)
    assert absent == []
