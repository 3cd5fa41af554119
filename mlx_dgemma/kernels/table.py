"""Every fused operation by name."""

from mlx_dgemma.kernels.accept import OPERATION as ACCEPT
from mlx_dgemma.kernels.attention import OPERATION as ATTENTION
from mlx_dgemma.kernels.fused_attention import OPERATION as FUSED_ATTENTION
from mlx_dgemma.kernels.moe import COMBINE
from mlx_dgemma.kernels.moe import OPERATION as MOE
from mlx_dgemma.kernels.qkv import OPERATION as NORMED_HEADS
from mlx_dgemma.kernels.registry import Operation
from mlx_dgemma.kernels.residual import ATTENDED, BRANCHES
from mlx_dgemma.kernels.router import OPERATION as ROUTER
from mlx_dgemma.kernels.row_statistics import OPERATION as ROW_STATISTICS
from mlx_dgemma.kernels.sparse_embeddings import GATHER, SELECT


def operations() -> dict[str, Operation]:
    """The operations, those of every layer first."""
    found = (
        NORMED_HEADS,
        ATTENTION,
        ROUTER,
        MOE,
        COMBINE,
        ATTENDED,
        BRANCHES,
        ROW_STATISTICS,
        ACCEPT,
        SELECT,
        GATHER,
        FUSED_ATTENTION,
    )
    return {operation.name: operation for operation in found}
