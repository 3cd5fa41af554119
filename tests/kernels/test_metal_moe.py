"""The experts' Metal kernels in the emulator, against float64 on the dequantized weights."""

import mlx.core as mx
import numpy as np
import pytest
import references as ref
from harness import DTYPES, TOLERANCE, emulated, every_setting, skip

from mlx_dgemma.kernels import Matrix, choose_experts
from mlx_dgemma.kernels.moe import ROW_TILES, combine_metal, metal, row_tile

pytestmark = skip


def experts(count, rows, columns, bits, group, dtype, key):
    weight = mx.random.normal((count, rows, columns), key=mx.random.key(key)) * columns**-0.5
    weight = weight.astype(dtype)
    if bits == 0:
        return Matrix(weight), ref.numpy(weight)
    if bits == "mxfp4":
        packed, scales = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
        back = mx.dequantize(packed, scales, group_size=32, bits=4, mode="mxfp4")
        return Matrix(packed, scales, None, 32, 4, "mxfp4", dtype), ref.numpy(back)
    packed = mx.quantize(weight, group_size=group, bits=bits)
    wide = [part.astype(mx.float32) for part in packed[1:]]
    back = mx.dequantize(packed[0], *wide, group_size=group, bits=bits)
    return Matrix(packed[0], packed[1], packed[2], group, bits), ref.numpy(back)


def check(dtype, bits, setting, *, tokens, hidden, width, count, top_k, tile=None, scores=None):
    group = 64 if hidden % 64 == 0 and width % 64 == 0 else 32
    x = mx.random.normal((tokens, hidden), key=mx.random.key(tokens)).astype(dtype)
    up, up_values = experts(count, 2 * width, hidden, bits, group, dtype, 1)
    down, down_values = experts(count, hidden, width, bits, group, dtype, 2)
    if scores is None:
        scores = mx.random.normal((tokens, count), key=mx.random.key(3))
    per_expert = mx.random.uniform(0.5, 1.5, (count,), key=mx.random.key(4))
    routing = choose_experts(scores, per_expert, top_k)
    with emulated(setting):
        rows = metal(x, routing, up, down, tile=tile)
        found = combine_metal(rows, routing.places, routing.weights)
    expected = ref.moe(
        ref.numpy(x), np.array(routing.experts), ref.numpy(routing.weights), up_values, down_values
    )
    error = np.abs(ref.numpy(found) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype], error


@every_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits(dtype, setting):
    check(dtype, 4, setting, tokens=9, hidden=64, width=64, count=5, top_k=2)


@every_setting
@pytest.mark.parametrize("bits", [0, 8, "mxfp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_and_eight_bits(dtype, bits, setting):
    check(dtype, bits, setting, tokens=6, hidden=96, width=32, count=4, top_k=3)


@pytest.mark.parametrize("setting", ["checked", "greedy"])
@pytest.mark.parametrize("tile", ROW_TILES)
def test_tiles_empty_and_overfull_experts(tile, setting):
    for tokens in (1, tile - 1, tile, tile + 1, 2 * tile + 3):
        scores = mx.zeros((tokens, 40))
        scores[:, 37] = 9.0  # every token asks for the last but two
        scores[:, 3] = mx.arange(tokens) % 2 * 5.0  # every other one for expert 3
        check(
            mx.float32, 4, setting, tokens=tokens, hidden=32, width=32, count=40, top_k=2,
            tile=tile, scores=scores,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "setting"), [(4, "checked, greedy"), (4, "greedy"), (8, "greedy"), ("mxfp4", "greedy")]
)
def test_the_real_inner_widths(bits, setting):
    check(
        mx.bfloat16, bits, setting, tokens=1, hidden=2816, width=704, count=3, top_k=2
    )  # fmt: skip


def test_few_experts_are_unpacked_twice_and_few_rows_are_padding():
    """A canvas of the published layer under uniform routing, as studies/README.md tells it."""
    scores = np.random.default_rng(0).standard_normal((50, 256, 128))
    chosen = np.argsort(-scores, axis=2)[:, :, :8].reshape(50, -1)
    rows = np.stack([np.bincount(each, minlength=128) for each in chosen])
    tile = row_tile(256 * 8, 128)
    assert tile == 32
    passes, multiplied = -(-rows // tile), -(-rows // 8) * 8
    assert passes.sum() / (rows > 0).sum() < 1.001
    assert multiplied.sum() / rows.sum() == pytest.approx(1.22, abs=0.01)
    assert (-(-rows // 16)).sum() / (rows > 0).sum() == pytest.approx(1.43, abs=0.01)
