"""The experts as training runs them: rows in blocks of one expert, and gathers alone.

MLX's CPU backend multiplies gathered rows one at a time where each has an index of its own, so
there the pairs lie in blocks of up to 16 that share an expert, each expert's last one filled up
with rows that nothing reads. MLX's own gradient of a gather adds rows up in place, one after
another; the places of a token's rows are known, so here it is a gather too. A GPU keeps a row a
block, which its kernels take.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dgemma.kernels.gradients import on_cpu, row_sums, with_gradient
from mlx_dgemma.kernels.router import Routing

_MOST_ROWS = 16
_FILLED = 8  # of so many rows, no more than one should be there to fill a block


class Blocks(NamedTuple):
    """P rows, of which N hold pairs, in blocks of one expert each."""

    tokens: mx.array  # [P] int32: whose row it is; any token's where it holds no pair
    weights: mx.array  # [P, 1] float32: what it counts in its token's sum; 0 where it holds no pair
    places: mx.array  # [N] int32: where each pair lies
    experts: mx.array  # [P / size] uint32, ascending
    size: int  # rows of a block


def block_rows(pairs: int, experts: int) -> int:
    """Rows of a block: as many as leave few unused."""
    size = _MOST_ROWS if on_cpu() else 1
    while size > 1 and size * experts * _FILLED > pairs:
        size //= 2
    return size


def blocks(routing: Routing) -> Blocks:
    """How the pairs of a routing lie. Constant to gradients."""
    tokens, top_k = routing.experts.shape
    pairs, count = tokens * top_k, routing.offsets.shape[0] - 1
    size = block_rows(pairs, count)
    flat, weights = routing.experts.reshape(-1), mx.stop_gradient(routing.weights).reshape(-1)
    if size == 1:
        order, places = routing.order, routing.places
        return Blocks(
            order // top_k, weights[order][:, None], places, flat[order].astype(mx.uint32), 1
        )
    needed = (routing.offsets[1:] - routing.offsets[:-1] + size - 1) // size
    ends = mx.cumsum(needed)
    total = pairs // size + count
    shifts = (ends - needed) * size - routing.offsets[:-1]
    places = (routing.places + shifts[flat]).astype(mx.int32)
    owners = mx.zeros(total * size, mx.int32)
    owners[places] = mx.arange(pairs, dtype=mx.int32) // top_k
    shares = mx.zeros(total * size)
    shares[places] = weights
    experts = (mx.arange(total)[:, None] >= ends[None]).sum(axis=1)
    return Blocks(
        owners, shares[:, None], places, mx.minimum(experts, count - 1).astype(mx.uint32), size
    )


def spread(x: mx.array, laid: Blocks) -> mx.array:
    """Each row's token of x [T, H]: [P / size, size, H]."""
    tokens, width = x.shape

    def forward(x: mx.array) -> mx.array:
        return x[laid.tokens].reshape(-1, laid.size, width)

    def backward(x: mx.array, given: mx.array, _: Any) -> list[mx.array]:
        return [given.reshape(-1, width)[laid.places].reshape(tokens, -1, width).sum(axis=1)]

    found: mx.array = with_gradient(forward, backward)(x)
    return found


def collected(rows: mx.array, weights: mx.array, laid: Blocks) -> mx.array:
    """Each token's weighted sum [T, H] of rows [P / size, size, H]; weights float32 [T, k]."""
    tokens, top_k = weights.shape
    width = rows.shape[-1]

    def paired(rows: mx.array) -> mx.array:
        found = rows.reshape(-1, width)[laid.places].reshape(tokens, top_k, width)
        return found.astype(mx.float32)

    def forward(rows: mx.array, weights: mx.array) -> mx.array:
        return (paired(rows) * weights[..., None]).sum(axis=1).astype(rows.dtype)

    def backward(inputs: Any, given: mx.array, _: Any) -> list[mx.array]:
        rows, _ = inputs
        to_rows = given[laid.tokens] * laid.weights
        to_weights = row_sums(paired(rows) * given.astype(mx.float32)[:, None])
        return [to_rows.astype(rows.dtype).reshape(rows.shape), to_weights[..., 0]]

    found: mx.array = with_gradient(forward, backward)(rows, weights)
    return found
