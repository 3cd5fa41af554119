"""The experts: rows gathered by expert, gate and up with GeGLU, down, weighted combination.

    h[n] = gelu_tanh(gate(x[token n])) * up(x[token n])        for every (token, choice) pair n
    y[t] = sum over the k pairs of t of weight * down(h[n])

Pairs come sorted by expert (see router), so an expert's weights are read once. Sums run in float32.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma.kernels.fuse import fused
from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.router import Routing


def moe(
    x: mx.array,
    routing: Routing,
    gate_up: Matrix | mx.array | nn.Module,
    down: Matrix | mx.array | nn.Module,
) -> mx.array:
    """Output [T, H] for tokens x [T, H]; gate_up [E, 2F, H], gate first; down [E, H, F]."""
    return twin(x, routing, gate_up, down)


def twin(
    x: mx.array,
    routing: Routing,
    gate_up: Matrix | mx.array | nn.Module,
    down: Matrix | mx.array | nn.Module,
) -> mx.array:
    """The same in plain MLX operations."""
    hidden = gate_up_twin(x, routing, gate_up)
    return combine_twin(down_twin(hidden, routing, down), routing.weights, x.dtype)


def gate_up_twin(x: mx.array, routing: Routing, gate_up: Matrix | mx.array | nn.Module) -> mx.array:
    """GeGLU rows [N, F] in sorted order."""
    top_k = routing.experts.shape[1]
    rows = x[routing.order // top_k][:, None, :]
    both = Matrix.of(gate_up).apply_gathered(rows, _sorted_experts(routing))[:, 0]
    width = both.shape[1] // 2
    return geglu(both[:, :width], both[:, width:])


def down_twin(hidden: mx.array, routing: Routing, down: Matrix | mx.array | nn.Module) -> mx.array:
    """Expert outputs [T, k, H] in token order from sorted rows [N, F]."""
    rows = Matrix.of(down).apply_gathered(hidden[:, None, :], _sorted_experts(routing))[:, 0]
    places = mx.put_along_axis(
        mx.zeros_like(routing.order),
        routing.order,
        mx.arange(routing.order.shape[0], dtype=mx.int32),
        axis=0,
    )
    return rows[places].reshape(*routing.experts.shape, -1)


def combine_twin(rows: mx.array, weights: mx.array, dtype: mx.Dtype) -> mx.array:
    """Weighted sum over a token's choices: rows [T, k, H], weights [T, k] float32 -> [T, H]."""
    return (rows.astype(mx.float32) * weights[..., None]).sum(axis=1).astype(dtype)


def _sorted_experts(routing: Routing) -> mx.array:
    return routing.experts.reshape(-1)[routing.order].astype(mx.uint32)


@fused
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh approximation, in float32, rounded once."""
    g = gate.astype(mx.float32)
    inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    return (0.5 * g * (1.0 + mx.tanh(inner)) * up.astype(mx.float32)).astype(gate.dtype)
