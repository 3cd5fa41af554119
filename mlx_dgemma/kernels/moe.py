"""The experts: rows gathered by expert, gate and up with GeGLU, down, weighted combination.

    h[n] = gelu_tanh(gate(x[token n])) * up(x[token n])        for every (token, choice) pair n
    y[t] = sum over the k pairs of t of weight * down(h[n])

Pairs come sorted by expert (see router), so an expert's weights are read once. Sums run in float32.

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import mlx.core as mx

from mlx_dgemma.kernels import dispatch, expert_blocks, gradients, registry
from mlx_dgemma.kernels.elementwise import fused
from mlx_dgemma.kernels.matrix import DENSE, Matrix
from mlx_dgemma.kernels.router import Routing
from mlx_dgemma.kernels.router import twin as choose_experts
from mlx_dgemma.kernels.samples import dtype_named, random_matrix


def moe(
    x: mx.array,
    routing: Routing,
    gate_up: Matrix,
    down: Matrix,
) -> mx.array:
    """Output [T, H] for tokens x [T, H]; gate_up [E, 2F, H], gate first; down [E, H, F]."""
    if gradients.wanted():
        return in_blocks(x, routing, gate_up, down)
    tokens, hidden = x.shape
    sizes = (
        x.dtype,
        tokens,
        hidden,
        gate_up.weight.shape[1] // 2,
        gate_up.weight.shape[0],
        routing.experts.shape[1],
        gate_up.packing,
        down.packing,
    )
    same = gate_up.dtype == down.dtype == x.dtype
    run = metal if same and dispatch.use(OPERATION, *sizes) else twin
    return combine(run(x, routing, gate_up, down), routing)


def combine(rows: mx.array, routing: Routing) -> mx.array:
    """The weighted sums [T, H] of the experts' outputs [N, H], which come in sorted order."""
    tokens, top_k = routing.experts.shape
    use = dispatch.use(COMBINE, rows.dtype, tokens, rows.shape[1], top_k)
    return (combine_metal if use else combine_twin)(rows, routing.places, routing.weights)


class ExpertMatrices(Protocol):
    """Matrices [experts, out, in] that rows are multiplied with by expert."""

    def apply_gathered(self, rows: mx.array, experts: mx.array) -> mx.array:
        """[N, m, out] of blocks of rows [N, m, in], which are sorted by their experts [N]."""


def in_blocks(
    x: mx.array, routing: Routing, gate_up: ExpertMatrices, down: ExpertMatrices
) -> mx.array:
    """Output [T, H] as training computes it."""
    laid = expert_blocks.blocks(routing)
    both = gate_up.apply_gathered(expert_blocks.spread(x, laid), laid.experts).astype(x.dtype)
    gate, up = mx.split(both, 2, axis=-1)
    rows = down.apply_gathered(geglu(gate, up), laid.experts).astype(x.dtype)
    return expert_blocks.collected(rows, routing.weights, laid)


def twin(
    x: mx.array,
    routing: Routing,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
) -> mx.array:
    """The experts' outputs [N, H] in sorted order, in plain MLX operations."""
    return down_twin(gate_up_twin(x, routing, gate_up), routing, down)


def gate_up_twin(x: mx.array, routing: Routing, gate_up: ExpertMatrices) -> mx.array:
    """GeGLU rows [N, F] in sorted order."""
    top_k = routing.experts.shape[1]
    rows = _apart(x[routing.order // top_k])
    both = gate_up.apply_gathered(rows, _sorted_experts(routing))[:, 0]
    width = both.shape[1] // 2
    return geglu(both[:, :width], both[:, width:])


def down_twin(hidden: mx.array, routing: Routing, down: ExpertMatrices) -> mx.array:
    """Expert outputs [N, H] from GeGLU rows [N, F], both in sorted order."""
    return down.apply_gathered(_apart(hidden), _sorted_experts(routing))[:, 0]


def _apart(rows: mx.array) -> mx.array:
    """[N, 1, W] of [N, W]. As a reshape: MLX's CPU backend multiplies a new axis' view five times
    as slowly."""
    return rows.reshape(rows.shape[0], 1, -1)


def combine_twin(rows: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """Weighted sums in plain MLX operations: rows [N, H], places [N] of the pairs among them,
    weights [T, k] float32 -> [T, H]."""
    paired = rows[places].reshape(*weights.shape, -1).astype(mx.float32)
    return (paired * weights[..., None]).sum(axis=1).astype(rows.dtype)


def combine_metal(rows: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """The same as one Metal kernel, which reads each row once, where it lies."""
    (tokens, top_k), width = weights.shape, rows.shape[1]
    return registry.launch(
        _COMBINE,
        [rows, places, weights],
        template=[("T", rows.dtype), ("TOP_K", top_k)],
        grid=(width, tokens, 1),
        threadgroup=(min(width, 256), 1, 1),
        outputs=[((tokens, width), rows.dtype)],
    )[0]


def _sorted_experts(routing: Routing) -> mx.array:
    return routing.experts.reshape(-1)[routing.order].astype(mx.uint32)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, [n, width], with the tanh approximation: in float32, rounded once to the
    dtype of gate."""
    return (gradients.geglu if gradients.wanted() else _geglu)(gate, up)


@fused
def _geglu(gate: mx.array, up: mx.array) -> mx.array:
    g = gate.astype(mx.float32)
    inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    return (0.5 * g * (1.0 + mx.tanh(inner)) * up.astype(mx.float32)).astype(gate.dtype)


_EXPERTS = registry.Kernel(
    "experts", inputs=("x", "order", "offsets", "w", "scales", "biases"), outputs=("y",)
)
_COMBINE = registry.Kernel("combine", inputs=("rows", "places", "weights"), outputs=("y",))
ROW_TILES = (8, 16, 32)
_PACKED = ("affine 4", "affine 8", "mxfp4 4")


def _supports(shape: registry.Shape) -> bool:
    """Dense, affine with 4 or 8 bits, or mxfp4, in whole blocks of columns."""
    packings = (str(shape[side]).split("/")[0] for side in ("gate_up", "down"))
    known = all(packing == DENSE or packing in _PACKED for packing in packings)
    whole = int(shape["hidden"]) % 32 == 0 and int(shape["width"]) % 32 == 0
    return registry.is_float(shape) and known and whole and int(shape["tokens"]) > 0


def row_tile(pairs: int, experts: int) -> int:
    """Rows per tile: the smallest of `ROW_TILES` that holds twice an expert's average share.

    A tile unpacks all of the expert's weights, so that few experts should need a second one;
    blocks of 8 rows that stay empty cost nothing.
    """
    return next((tile for tile in ROW_TILES if 2 * pairs <= tile * experts), ROW_TILES[-1])


def metal(
    x: mx.array,
    routing: Routing,
    gate_up: Matrix,
    down: Matrix,
    *,
    tile: int | None = None,
) -> mx.array:
    """The same as two Metal kernels: gate_up with GeGLU, and down."""
    pairs, experts = routing.order.shape[0], routing.offsets.shape[0] - 1
    tile = row_tile(pairs, experts) if tile is None else tile
    hidden = _multiply(x, routing, gate_up, tile, glu=True)
    return _multiply(hidden, routing, down, tile, glu=False)


def _multiply(x: mx.array, routing: Routing, matrix: Matrix, tile: int, *, glu: bool) -> mx.array:
    """Rows [pairs, out] of every pair's expert; the grid covers the worst case of tiles."""
    pairs, experts = routing.order.shape[0], routing.offsets.shape[0] - 1
    out = matrix.weight.shape[1] // (2 if glu else 1)
    columns = 32 if glu else 64
    tiles = min(pairs, pairs // tile + experts)
    scales = x if matrix.scales is None else matrix.scales
    return registry.launch(
        _EXPERTS,
        [
            x,
            routing.order,
            routing.offsets,
            matrix.weight,
            scales,
            scales if matrix.biases is None else matrix.biases,
        ],
        template=[
            ("T", x.dtype),
            ("TM", tile),
            ("BITS", matrix.bits if matrix.quantized else 0),
            ("FP4", matrix.mode == "mxfp4"),
            ("GROUP", matrix.group_size),
            ("GLU", glu),
            ("EXPERTS", experts),
            ("TOP_K", routing.experts.shape[1]),
        ],
        grid=(-(-out // columns) * 128, tiles, 1),
        threadgroup=(128, 1, 1),
        outputs=[((pairs, out), x.dtype)],
    )[0]


_TOLERANCE = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 3e-2}
_PROBED_EXPERTS = 32  # enough to spill every cache, and a quarter of the published layer's memory


def _probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    dtype, width, hidden = dtype_named(shape["dtype"]), int(shape["width"]), int(shape["hidden"])
    count = min(int(shape["experts"]), _PROBED_EXPERTS)
    top_k = min(int(shape["top_k"]), count)
    keys = mx.random.split(mx.random.key(0), 2)
    up = random_matrix((count, 2 * width, hidden), str(shape["gate_up"]), dtype, keys[0])
    down = random_matrix((count, hidden, width), str(shape["down"]), dtype, keys[1])
    wide = up.widened(), down.widened()
    for tokens in (1, 5, max(1, int(shape["tokens"]) * count // int(shape["experts"]))):
        x = mx.random.normal((tokens, hidden), key=mx.random.key(tokens)).astype(dtype)
        scores = mx.random.normal((tokens, count), key=mx.random.key(tokens + 1))
        routing = choose_experts(scores, mx.linspace(0.5, 1.5, count), top_k)
        mx.eval(routing)  # else it would be timed with the kernel and with its twin
        yield registry.Probe(
            partial(metal, x, routing, up, down),
            partial(twin, x, routing, up, down),
            tolerance=_TOLERANCE[dtype],
            expected=partial(twin, x.astype(mx.float32), routing, *wide),
        )


OPERATION = registry.Operation(
    "moe",
    ("dtype", "tokens", "hidden", "width", "experts", "top_k", "gate_up", "down"),
    (_EXPERTS,),
    _supports,
    _probes,
)


def _combine_supports(shape: registry.Shape) -> bool:
    return registry.is_float(shape) and int(shape["tokens"]) > 0


def _combine_probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    dtype, hidden, top_k = dtype_named(shape["dtype"]), int(shape["hidden"]), int(shape["top_k"])
    for tokens in (1, 5, int(shape["tokens"])):
        rows = mx.random.normal((tokens * top_k, hidden), key=mx.random.key(tokens)).astype(dtype)
        weights = mx.random.uniform(0.1, 1.0, (tokens, top_k), key=mx.random.key(1))
        places = mx.argsort(mx.random.uniform(shape=(tokens * top_k,), key=mx.random.key(2)))
        places = places.astype(mx.int32)
        mx.eval(rows, weights, places)  # else they would be timed with the kernel and its twin
        yield registry.Probe(
            partial(combine_metal, rows, places, weights),
            partial(combine_twin, rows, places, weights),
            tolerance={mx.float32: 1e-5, mx.float16: 2e-3}.get(dtype, 1e-2),
            expected=partial(combine_twin, rows.astype(mx.float32), places, weights),
        )


COMBINE = registry.Operation(
    "combine",
    ("dtype", "tokens", "hidden", "top_k"),
    (_COMBINE,),
    _combine_supports,
    _combine_probes,
)
