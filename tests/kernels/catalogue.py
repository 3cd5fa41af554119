"""Every Metal kernel of the package as it is launched: dtypes, template variants, tiny and usual
inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from msl.emulator import Launched
from msl.wrapper import Body

from mlx_dgemma.kernels import Matrix, choose_experts
from mlx_dgemma.kernels.accept import metal as accept
from mlx_dgemma.kernels.attention import metal as attention
from mlx_dgemma.kernels.moe import ROW_TILES, combine_metal
from mlx_dgemma.kernels.moe import metal as moe
from mlx_dgemma.kernels.qkv import metal as normed_heads
from mlx_dgemma.kernels.residual import BranchNorms, Epsilons, Norms, attended_metal, branches_metal
from mlx_dgemma.kernels.router import metal as router
from mlx_dgemma.kernels.row_statistics import metal as row_statistics
from mlx_dgemma.kernels.sparse_embeddings import Survivors, gather_metal, survivors_metal

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Launches are written down and answered with zeros; nothing is compiled."""
    launched: list[Launched] = []

    def metal_kernel(
        name, input_names, output_names, source, header="", ensure_row_contiguous=True
    ):
        body = Body(name, input_names, output_names, source, header)

        def call(*, inputs, output_shapes, output_dtypes, template, grid, threadgroup):
            launched.append(Launched(body, inputs, output_shapes, output_dtypes, template, None))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    real = mx.fast.metal_kernel
    mx.fast.metal_kernel = metal_kernel
    try:
        yield launched
    finally:
        mx.fast.metal_kernel = real


def launches() -> dict[str, Launched]:
    """Readable name -> launch, one per distinct kernel text."""
    with recorded() as everything:
        for dtype in DTYPES:
            _vocabulary_operations(dtype)
            _network_operations(dtype)
        for length in (2, 40):
            _accept(length)
    named = {}
    for one in everything:
        values = (str(value).split(".")[-1] for _, value in one.template)
        spaces = "".join("c" if array.size < 8 else "d" for array in one.inputs)
        named[f"{one.body.name} {' '.join(values)} {spaces}"] = one
    return named


def _vocabulary_operations(dtype: mx.Dtype) -> None:
    for rows, columns in ((2, 3), (9, 40)):
        raw = mx.zeros((rows, columns), dtype)
        for temp in (0.0, 1.0, 2.0):
            row_statistics(raw, 0.8, mx.zeros((rows, 2)), temp=temp)
        survivors_metal(raw, mx.zeros((rows,)), 0.8, dtype, capacity=4)
    for bits in (0, 4, 8):
        for rows in (1, 9):
            survivors = Survivors(
                mx.zeros((rows, 4), mx.int32),
                mx.zeros((rows, 4)),
                mx.zeros((rows,), mx.int32),
                None,
            )
            gather_metal(survivors, _matrix((40, 64), bits, dtype), np.ones(rows, int))


def _network_operations(dtype: mx.Dtype) -> None:
    heads, tables = mx.zeros((1, 3, 2, 64), dtype), (mx.zeros((3, 32), dtype),) * 2
    for weight in (None, mx.zeros((64,), dtype)):
        for rope in (None, tables):
            normed_heads(heads, weight, rope, 1e-6)
    for length in (1, 9):
        queries, keys = mx.zeros((2, 2, length, 8), dtype), mx.zeros((1, 1, 9, 8), dtype)
        for mask in (None, mx.zeros((length, 9), mx.bool_)):
            attention(queries, [(keys, keys)], mask=mask)
        attention(queries, [(mx.zeros((2, 1, 9, 8), dtype),) * 2])
    for tokens in (1, 20):
        router(mx.zeros((tokens, 5), dtype), mx.zeros((5,)), 2)
        routing = choose_experts(mx.zeros((tokens, 5)), mx.ones((5,)), 2)
        _residual_operations(tokens, dtype)
        combine_metal(mx.zeros((tokens * 2, 64), dtype), routing.places, routing.weights)
        for bits in (0, 4, 8, "mxfp4"):
            for tile in ROW_TILES:
                x = mx.zeros((tokens, 64), dtype)
                up, down = (_matrix((5, 128, 64), bits, dtype), _matrix((5, 64, 64), bits, dtype))
                moe(x, routing, up, down, tile=tile)


def _residual_operations(tokens: int, dtype: mx.Dtype) -> None:
    for stream in {dtype, mx.float32}:
        x, other, weight = (
            mx.zeros((tokens, 64), stream),
            mx.zeros((tokens, 64), dtype),
            mx.ones(64),
        )
        attended_metal(x, other, Norms(*[weight] * 4), 1e-6)
        branches_metal(
            x, other, other, BranchNorms(*[weight] * 3), mx.ones(1), Epsilons(1e-6, 1e-6)
        )


def _accept(length: int) -> None:
    ids, entropy = mx.zeros((1, length), mx.int32), mx.zeros((1, length))
    for previous in (None, ids):
        for pinned in (None, mx.zeros((1, length), mx.bool_)):
            accept(ids, entropy, ids, ids, ids, previous, 0.1, pinned=pinned)


def _matrix(shape: tuple[int, ...], bits: int | str, dtype: mx.Dtype) -> Matrix:
    weight = mx.zeros(shape, dtype)
    if bits == "mxfp4":
        return Matrix(*mx.quantize(weight, mode=bits), None, 32, 4, bits, dtype)
    return Matrix(*mx.quantize(weight, bits=bits), 64, bits) if bits else Matrix(weight)
