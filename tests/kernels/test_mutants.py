"""Bugs planted in the kernels, one at a time: each must be caught, by a check or by its values."""

import mlx.core as mx
import numpy as np
import pytest
import test_metal_accept
import test_metal_attention
import test_metal_moe
import test_metal_qkv
import test_metal_router
import test_metal_row_statistics
import test_metal_soft_embeddings
from harness import emulated, emulator_only, mutated
from msl.launch import KernelError

from mlx_dgemma.kernels.accept import metal as accept
from mlx_dgemma.kernels.row_statistics import SLICE
from mlx_dgemma.kernels.row_statistics import metal as row_statistics

pytestmark = emulator_only
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def statistics():
    test_metal_row_statistics.check(
        *test_metal_row_statistics.inputs(5, 1499, mx.float32), "checked"
    )


def statistics_of_slices():
    """Of one slice no thread reads what another wrote: a compiler may leave those reads out."""
    raw = test_metal_row_statistics.inputs(2, 2 * SLICE + 77, mx.float32)
    test_metal_row_statistics.check(*raw, "checked")


def ties_and_poison():
    raw = mx.zeros((2, 700))
    raw[1, 3] = float("inf")
    with emulated():
        found = row_statistics(raw, 0.8, mx.full((2, 2), 0.5))
    assert found.argmax[0].item() == 0
    assert np.isnan(found.entropy[1].item())


def renoise():
    for length in (255, 256):
        test_metal_accept.test_agrees_with_the_definition(length, "checked")


def survivors():
    test_metal_soft_embeddings.check_survivors(
        test_metal_soft_embeddings.peaked(3, 4500, mx.float32), mx.float32, "checked", 64
    )


def gather4():
    test_metal_soft_embeddings.check_gather(mx.float32, 4, 128, "checked")


def gather8():
    test_metal_soft_embeddings.check_gather(mx.float32, 8, 64, "checked")


def route():
    mx.random.seed(9)
    scores = mx.round(mx.random.normal((9, 70)) * 3) / 3
    scores[0] = 0.0  # ties alone
    scores[1, 69] = 9.0  # somebody for the last expert
    test_metal_router.check(scores, 3, "checked")


def experts():
    test_metal_moe.check(
        mx.float32, 4, "checked", tokens=11, hidden=128, width=64, count=3, top_k=2, tile=8
    )  # fmt: skip


def ragged_experts():
    """Fewer columns than the last threadgroup has."""
    test_metal_moe.check(
        mx.float32, 8, "checked", tokens=9, hidden=96, width=32, count=3, top_k=2, tile=8
    )


def floats():
    test_metal_moe.check(
        mx.float32, "mxfp4", "checked", tokens=5, hidden=64, width=32, count=3, top_k=2, tile=8
    )


def heads():
    test_metal_qkv.check(mx.float32, 64, "checked", weight=True, rope=True)


def attention():
    test_metal_attention.check(mx.float32, "checked", counts=(37, 300), chunk=48, masked=True)


def shared_attention():
    test_metal_attention.check(mx.float32, "checked", counts=(40,), chunk=16, batch=2)


RACE = {"race-threadgroup", "uninit-threadgroup"}
VALUE = {"value"}
MUTANTS = [
    # row statistics
    (statistics, "row_statistics", BARRIER + "\n\n    // 2.", "// 2.", RACE),
    (statistics_of_slices, "row_statistics", BARRIER + "\n\n    // 3.", "// 3.", RACE),
    (statistics, "row_statistics", BARRIER + "\n      if (lid == 0) {\n        float total",
     "if (lid == 0) {\n        float total", RACE),
    (statistics, "row_statistics", "i += TG * 4", "i += TG", VALUE),
    (statistics, "row_statistics", "if (i + j < stop)", "if (i + j <= stop)", {"out-of-bounds"}),
    (statistics, "row_statistics", "top = simd_max(m);", "top = m;", VALUE),
    (statistics, "row_statistics", "s = shrink * (s + z * (m - now));", "s = shrink * s;", VALUE),
    (statistics, "row_statistics", "      target -= running;\n", "", VALUE),
    (statistics, "row_statistics", "uniforms[row * 2 + 1]", "uniforms[row * 2]", VALUE),
    (statistics, "row_statistics", "static_cast<ulong>(row) * V;",
     "static_cast<ulong>(row) * (V + 1);", {"out-of-bounds"}),
    (statistics, "row_statistics", "simd_max(best);", "simd_shuffle_xor(best, ushort(1));", VALUE),
    (ties_and_poison, "row_statistics", "group_index[g] < index", "group_index[g] > index", VALUE),
    (ties_and_poison, "row_statistics", "poisoned != 0 ? NAN : ", "", VALUE),
    # accept and renoise
    (renoise, "accept", "own : LAST;\n    " + BARRIER, "own : LAST;", RACE),
    (renoise, "accept", "ascending[rank] = value;\n    " + BARRIER, "ascending[rank] = value;",
     RACE),
    (renoise, "accept", "other == value && j < i", "other == value && j > i", VALUE),
    (renoise, "accept", "other == value && j < i", "other == value && j <= i",
     {"value", "out-of-bounds", "uninit-threadgroup", "undefined-behaviour"}),
    (renoise, "accept", "running - next <= limit", "running <= limit", VALUE),
    (renoise, "accept", "inside && !held && is_finite", "inside && is_finite", VALUE),
    (renoise, "accept", "simd_min(same ? 1u : 0u)", "(same ? 1u : 0u)", VALUE),
    (renoise, "accept", "simd_sum(free_here ? own : 0.0f)", "simd_sum(own)", VALUE),
    (renoise, "accept", "status[b * 3 + 1]", "status[b * 2 + 1]",
     {"race-device", "unwritten-output", "value"}),
    # survivors
    (survivors, "survivors", BARRIER + "\n    }\n    const uint count", "}\n    const uint count",
     RACE),
    (survivors, "survivors", BARRIER + "\n      uint place", "uint place", RACE),
    (survivors, "survivors", "g < sg ?", "g <= sg ?",
     {"unwritten-output", "race-device", "out-of-bounds"}),
    (survivors, "survivors", "simd_prefix_exclusive_sum(mine)", "simd_prefix_inclusive_sum(mine)",
     {"unwritten-output", "race-device", "out-of-bounds"}),
    (survivors, "survivors", "uint i = count + lid;", "uint i = count + lid + 1;",
     {"unwritten-output"}),
    (survivors, "survivors", "simd_sum(total)", "total", VALUE),
    # gather
    (gather4, "gather_embeddings", "id * (H / GROUP) + column / GROUP", "id * (H / GROUP)", VALUE),
    (gather8, "gather_embeddings", "packed >> (j * WIDTH)", "packed >> (j * 4)", VALUE),
    (gather4, "gather_embeddings", "sum[j] / total", "sum[j]", VALUE),
    (gather4, "gather_embeddings", "id * (H / SPAN) + part", "id * (H / SPAN) + part + 1",
     {"out-of-bounds", "value"}),
    # router
    (route, "top_experts", "value[j] > best)", "value[j] >= best)", VALUE),
    (route, "top_experts", "open &= ~(1u << (winner / 32));", "open &= ~0u;", VALUE),
    (route, "top_experts", "simd_min(best == top ? where : 0xffffffffu)",
     "simd_max(best == top ? where : 0u)", VALUE),
    (route, "sort_by_expert", BARRIER + "\n    uint mine", "uint mine", RACE),
    (route, "sort_by_expert", BARRIER + "\n    for (uint g", "for (uint g", RACE),
    (route, "sort_by_expert", "g < sg;", "g <= sg;",
     {"out-of-bounds", "value", "race-device", "uninit-threadgroup"}),
    (route, "sort_by_expert", "lid == count - 1", "lid == count - 2",
     {"value", "unwritten-output"}),
    # experts
    (experts, "experts", BARRIER + "\n      if (staged_row", "if (staged_row", RACE),
    (experts, "experts", BARRIER + "\n      // 4.", "// 4.", RACE),
    (experts, "experts", "found[1] = 0;\n    }\n    " + BARRIER, "found[1] = 0;\n    }\n", RACE),
    (experts, "experts", BARRIER + "\n    const int expert", "const int expert", RACE),
    (experts, "experts", BARRIER + "\n    for (int q = lid; q < rows", "for (int q = lid; q < rows",
     RACE),
    (experts, "experts", "staged_row < rows;", "staged_row <= rows;", {"out-of-bounds", "value"}),
    (experts, "experts", "order[pair] / TOP_K", "order[pair]", {"out-of-bounds", "value"}),
    (experts, "experts", "(GLU ? c * O : 0)", "(GLU ? c * 8 : 0)", VALUE),
    (experts, "experts", "k % 8 / 2 * 8 + k / 8 * 2", "k % 8 / 2 * 2 + k / 8 * 8", VALUE),
    (experts, "experts", "quarter * 8;", "quarter * 4;", VALUE),
    (experts, "experts", "if (i * 8 < rows) {\n          #", "if (i * 8 + 8 < rows) {\n          #",
     VALUE),
    (ragged_experts, "experts", "O - 1);", "O);", {"out-of-bounds"}),
    (experts, "experts", "(rows + TM - 1) / TM", "rows / TM", {"unwritten-output"}),
    (experts, "experts", "m * 8, LD, ulong2", "m * 8, LD - 1, ulong2",
     {"uninit-threadgroup", "value"}),
    (experts, "experts", "static_cast<ulong>(row0 + r) * O", "static_cast<ulong>(r) * O",
     {"race-device", "unwritten-output", "value"}),
    (experts, "experts", "expert) * matrix_rows", "expert) * O", VALUE),
    (experts, "experts", "first / GROUP;", "(first - k0) / GROUP;", VALUE),
    (experts, "experts", "(packed >> (j % PER_WORD * (32 / PER_WORD)))", "(packed >> j)", VALUE),
    (experts, "experts", "if (sg == 0) {", "if (sg == 0 && lane < 31) {",
     {"simd-divergence", "simd-lane", "value", "barrier"}),
    (floats, "experts", "stored - 127.0f", "stored - 126.0f", VALUE),
    (floats, "experts", "(code & 8u) != 0 ? -", "false ? -", VALUE),
    # norm and rope
    (heads, "normed_heads", "simd_sum(squares)", "squares", VALUE),
    (heads, "normed_heads", "first * c - second * s", "first * c + second * s", VALUE),
    (heads, "normed_heads", "weight[i + D / 2]", "weight[i]", VALUE),
    (heads, "normed_heads", "cosine[l * (D / 2) + i]", "cosine[i]", VALUE),
    (heads, "normed_heads", "* heads + head) * length + l", "* length + l) * heads + head", VALUE),
    (heads, "normed_heads", "thread_position_in_grid.z / length", "thread_position_in_grid.z",
     {"out-of-bounds"}),
    # attention
    (attention, "chunk_softmax", BARRIER + "\n    float highest", "float highest", RACE),
    (attention, "chunk_softmax", BARRIER + "\n    float whole", "float whole", RACE),
    (attention, "chunk_softmax", "simd_max(top)", "top", VALUE),
    (attention, "chunk_softmax", "simd_sum(sum)", "sum", VALUE),
    (attention, "chunk_softmax", "mask[line + i]", "mask[i]", VALUE),
    (attention, "chunk_softmax", "held[j] = LOWEST;", "held[j] = 9.0f;", VALUE),
    (attention, "chunk_softmax", "whole > 0.0f ? 1.0f / whole : 0.0f", "1.0f", VALUE),
    (attention, "merge_attention", "chunk_total[chunk_row] * ", "", VALUE),
    (attention, "merge_attention", "total[row] * keep + add", "total[row] + add", VALUE),
    (attention, "merge_attention", "output[at] * keep", "output[at]", VALUE),
    (shared_attention, "merge_attention", "SHARED ? ", "false ? ", VALUE),
    (experts, "combine", "weights[pair]", "weights[token]", VALUE),
    (experts, "combine", "places[pair]", "pair", VALUE),
]  # fmt: skip


def symptoms(check) -> set[str]:
    """The rules a run broke, or "value" if only its numbers are wrong; empty if nothing was."""
    try:
        check()
    except KernelError as error:
        return error.kinds
    except AssertionError:
        return {"value"}
    return set()


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_caught(number):
    check, kernel, old, new, expected = MUTANTS[number]
    with mutated(kernel, old, new):
        assert symptoms(check) & expected


@pytest.mark.parametrize(
    "check", sorted({mutant[0] for mutant in MUTANTS}, key=lambda f: f.__name__)
)
def test_the_kernels_as_they_are_pass_the_same_checks(check):
    check()


def test_a_race_of_equal_values_is_benign():
    """Every lane writes its SIMD-group's sum, the same one; Metal allows it, so no alarm."""
    entropy, ids = mx.zeros((1, 40)), mx.zeros((1, 40), dtype=mx.int32)
    first_lane = "if (lane == 0) {\n      sums[sg]"
    with mutated("accept", first_lane, "{\n      sums[sg]"), emulated():
        found = accept(ids, entropy, ids, ids, ids, ids, 0.1)
    assert found.status.tolist() == [[1.0, 0.0, 1.0]]
