"""Every operation's own probes, which decide on a Mac whether its kernel runs, in the emulator.

Their shapes are planned from the configs of the published layouts and of the demo. Rows, experts
and layers are fewer, so that the emulator is done in seconds; every width is the real one.
"""

import ast
import inspect
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from harness import emulated, emulator_only, mutated

import mlx_dgemma
from mlx_dgemma.benchmark.synthetic import published_config, synthetic_config
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.kernels import checking, dispatch, verdicts
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.model.config import FULL, SLIDING, ModelConfig
from mlx_dgemma.model.kernel_shapes import kernel_shapes

LAYOUTS = ("4bit", "8bit", "mxfp4", "bf16")
DTYPES = ("float32", "float16", "bfloat16")
ROWS = {"tokens": (3,), "length": (5,), "rows": (2,), "patches": (20,)}


def published(layout):
    raw = synthetic_config(f"26b-{layout}") | {"vision_config": published_config()["vision_config"]}
    config = ModelConfig.from_dict(raw)
    text = replace(config.text, num_experts=2, top_k_experts=1, layer_types=(SLIDING, FULL))
    return replace(config, text=text, canvas_length=2)


def demo(layout):
    packing = {"bits": 4, "group_size": 64}
    quantization = {
        "4bit": packing,
        "8bit": {**packing, "bits": 8},
        "mxfp4": {**packing, "group_size": 32, "mode": "mxfp4"},
        "bf16": None,
    }[layout]
    return replace(ModelConfig.from_folder(CHECKPOINT), quantization=quantization)


def cases():
    """(operation, shape), each once: both models, every layout, every dtype."""
    everywhere = {dtype: {"normed_heads", "attention", "fused_attention"} for dtype in DTYPES}
    everywhere["float16"] |= {"combine", "after_attention", "after_branches"}
    with pytest.MonkeyPatch.context() as patch:
        for name, most in ROWS.items():
            patch.setitem(dispatch.ROW_CLASSES, name, most)
        for layout in LAYOUTS:
            for dtype in DTYPES:
                for request in kernel_shapes(demo(layout), dtype):
                    yield request.operation.name, dispatch.shape_class(request.shape)
                for request in kernel_shapes(published(layout), dtype):
                    name = request.operation.name
                    halved = dtype == "float16" and (name, layout) == ("moe", "4bit")
                    if dtype == "bfloat16" or name in everywhere[dtype] or halved:
                        yield name, dispatch.shape_class(request.shape)


KNOWN = operations()
CASES = {
    " ".join(map(str, (name, *shape.values()))): (KNOWN[name], shape)
    for name, shape in cases()
    if KNOWN[name].supports(shape)
}


def checked(operation, shape):
    """The findings of a real check but its times: probes, their order and their judgement."""
    with emulated("greedy"):
        return checking.check(operation, shape)


@pytest.fixture(autouse=True)
def _untimed(monkeypatch):
    monkeypatch.setattr(checking, "times", lambda probe: (1.0, 2.0))


@emulator_only
@pytest.mark.parametrize("case", CASES)
def test_a_right_kernel_passes(case):
    assert checked(*CASES[case]).failure is None


@emulator_only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_cache_ends_with_every_operation_enabled(layout, tmp_path, monkeypatch):
    """A simulated GPU loads a real layout: what `load` checks, in a process that may not start
    another. Only the times are made up, since the emulator says nothing about them."""
    monkeypatch.setattr(verdicts, "cache_file", lambda: tmp_path / "kernels.json")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "auto")
    for name, most in ROWS.items():
        monkeypatch.setitem(dispatch.ROW_CLASSES, name, most)
    config = published(layout)
    with emulated("greedy"):
        dispatch.prepare(kernel_shapes(config))
        found = verdicts.remembered()
        assert all(verdict.enabled and verdict.lasting for verdict in found.values()), found
        monkeypatch.setattr(checking, "check", lambda *_: pytest.fail("checked twice"))
        used = [
            request.operation.name
            for request in kernel_shapes(config)
            if dispatch.use(request.operation, *request.shape.values())
        ]
    assert set(used) == set(KNOWN)
    assert len(used) == len(kernel_shapes(config))
    dispatch.forget()


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
    ("after_attention", "after_attention", "parts[sg] = together", "parts[sg] = value"),
    ("after_attention", "after_attention", "static_cast<float>(x[from + i]) + normed", "normed"),
    ("after_attention", "after_attention", "own + settings[0]", "mean + settings[0]"),
    ("after_attention", "after_attention", "scaled * root", "scaled"),
    ("after_branches", "after_branches", "two[j] * factor_two", "two[j] * factor_one"),
    ("after_branches", "after_branches", "sum * multiplier", "sum"),
    ("after_branches", "after_branches", "mean_two + branch_eps", "mean_two + eps"),
    ("moe", "experts", "static_cast<ulong>(row0 + r) * O", "static_cast<ulong>(r) * O"),
    ("moe", "experts", "first / GROUP;", "(first - k0) / GROUP;"),
    ("moe", "experts", "(GLU ? c * O : 0)", "(GLU ? c * 8 : 0)"),
    ("moe", "experts", "gelu_tanh(gate) * up", "gate * up"),
    ("combine", "combine", "weights[pair]", "weights[token]"),
    ("combine", "combine", "places[pair]", "pair"),
    ("router", "sort_by_expert", "places[i] = static_cast<int>(place)", "places[i] = i"),
]  # fmt: skip


# Of several heads and many experts, where the demo has too few to tell.
WIDE = {
    "attention": {"dtype": "bfloat16", "length": 1, "heads": 4, "kv_heads": 2, "head_dim": 512},
    "router": {"dtype": "bfloat16", "tokens": 40, "experts": 128, "top_k": 8},
}


@emulator_only
@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_a_wrong_kernel_fails(number):
    name, kernel, old, new = MUTANTS[number]
    demos = (shape for operation, shape in CASES.values() if operation.name == name)
    shape = {**next(demos), **WIDE.get(name, {})}
    with mutated(kernel, old, new):
        # a wrong value, or something written where it must not be, or left unwritten
        assert checked(KNOWN[name], shape).failure is not None


def test_every_kernel_has_a_mutant():
    kernels = {kernel.name for one in KNOWN.values() for kernel in one.kernels}
    assert {kernel for _, kernel, _, _ in MUTANTS} == kernels


def test_what_should_vanish_has_its_own_scale():
    tiny, nothing = [mx.array([1.2e-7])], [mx.array([0.0])]
    assert checking.largest_error(tiny, nothing) == float("inf")
    assert checking.largest_error(tiny, nothing, least=1.0) < 1e-6
    assert checking.largest_error(nothing, nothing) == 0.0
    assert checking.largest_error([mx.array([1])], [mx.array([1.0])]) == float("inf")


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
