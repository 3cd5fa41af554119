"""Fused operations: each a Metal kernel beside its twin in plain MLX operations."""

from mlx_dgemma.kernels.accept import Accepted, accept_renoise
from mlx_dgemma.kernels.attention import attend
from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.moe import moe
from mlx_dgemma.kernels.qkv import normed_heads
from mlx_dgemma.kernels.residual import (
    BranchNorms,
    Epsilons,
    Norms,
    after_attention,
    after_branches,
)
from mlx_dgemma.kernels.router import Routing, choose_experts
from mlx_dgemma.kernels.row_statistics import (
    RowStatistics,
    row_statistics,
    sliced_row_statistics,
)
from mlx_dgemma.kernels.soft_embeddings import sliced_soft_embeddings, soft_embeddings
from mlx_dgemma.kernels.sparse_embeddings import (
    CAPACITY,
    DROPPED_MASS,
    Survivors,
    gather_soft_embeddings,
    select_survivors,
)

__all__ = [
    "CAPACITY",
    "DROPPED_MASS",
    "Accepted",
    "BranchNorms",
    "Epsilons",
    "Matrix",
    "Norms",
    "Routing",
    "RowStatistics",
    "Survivors",
    "accept_renoise",
    "after_attention",
    "after_branches",
    "attend",
    "choose_experts",
    "gather_soft_embeddings",
    "moe",
    "normed_heads",
    "row_statistics",
    "select_survivors",
    "sliced_row_statistics",
    "sliced_soft_embeddings",
    "soft_embeddings",
]
