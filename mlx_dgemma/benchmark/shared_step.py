"""What several machines that hold one model do in a step: each its part, and what they exchange.

Times are floors, as in `costs`: the largest part's work at the chip's ceilings, then the
collectives one after another. Arithmetic that stays below its ceiling favours more machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dgemma.benchmark.chips import Chip
from mlx_dgemma.benchmark.costs import Conditioning, Cost, floor_seconds, step_costs
from mlx_dgemma.checkpoint.sizes import ITEM_SIZE
from mlx_dgemma.distributed.link import Link
from mlx_dgemma.kernels.row_statistics import SLICE, SliceStatistics
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.share import Share

_SUMS_PER_LAYER = 2
_DRAWN = 3  # numbers per row that the head's statistics need


@dataclass(frozen=True)
class Traffic:
    """What one denoising step exchanges. collectives: how many. nbytes: of their arrays together,
    each counted once."""

    collectives: int
    nbytes: int


def step_traffic(config: ModelConfig, size: int, rows: int, item_size: int) -> Traffic:
    """Of a step of `rows` canvas positions with a dense signal, activations of `item_size` bytes.

    In every layer the attention's output and the two branches' outputs are summed; rank 0 hands out
    what enters the layers, what leaves them, and the draws; statistics per slice of the vocabulary
    are gathered, and the soft embeddings summed.
    """
    text = config.text
    activations = rows * text.hidden_size * item_size
    stream = rows * text.hidden_size * max(item_size, 4 if text.dtype == "float16" else item_size)
    slices = [Share(rank, size).vocabulary(text) for rank in range(size)]
    most = max(-(-(last - first) // SLICE) for first, last in slices)
    nbytes = 3 * text.num_hidden_layers * activations + stream + activations
    nbytes += rows * _DRAWN * 4
    nbytes += most * len(SliceStatistics._fields) * rows * 4
    nbytes += rows * (text.hidden_size + 1) * 4
    return Traffic(_SUMS_PER_LAYER * text.num_hidden_layers + 5, nbytes)


def largest_part(config: ModelConfig, size: int) -> dict[str, float]:
    """Component -> the largest share that any rank has of it."""
    text = config.text
    locals_ = [Share(rank, size).config(config).text for rank in range(size)]
    vocabulary = [Share(rank, size).vocabulary(text) for rank in range(size)]
    head = max(last - first for first, last in vocabulary) / text.vocab_size
    return {
        "attention": 1 / size,
        "dense": max(one.intermediate_size for one in locals_) / text.intermediate_size,
        "router": 1.0,
        "experts": max(one.moe_intermediate_size for one in locals_) / text.moe_intermediate_size,
        "head": head,
        "self-conditioning": head,
        "sampler": head,
    }


def alone_seconds(config: ModelConfig, chip: Chip) -> float:
    """The same of one machine, which in 16 bits sums a sure position's signal over its likely ids
    alone; several do not."""
    sparse = ITEM_SIZE[config.text.dtype] == 2
    return step_seconds(config, chip, 1, None, conditioning="sparse" if sparse else "dense")


def step_seconds(
    config: ModelConfig,
    chip: Chip,
    size: int,
    link: Link | None,
    *,
    context_tokens: int = 1024,
    conditioning: Conditioning = "dense",
) -> float:
    """The least time of one denoising step on `size` machines of this chip; of one without a
    link."""
    costs = step_costs(config, context_tokens, conditioning=conditioning)
    if size == 1 or link is None:
        return floor_seconds(costs, chip)
    shares = largest_part(config, size)
    parts = {
        name: Cost(cost.flops * shares[name], cost.nbytes * shares[name])
        for name, cost in costs.items()
    }
    item_size = ITEM_SIZE[config.text.dtype]
    traffic = step_traffic(config, size, config.canvas_length, item_size)
    return floor_seconds(parts, chip) + link.seconds(traffic.collectives, traffic.nbytes)


def ring(name: str, latency: float, bandwidth: float, size: int) -> Link:
    """A link that is assumed, not measured: seconds from one machine to the next, and bytes per
    second of one connection. A sum goes round twice, each machine sending 2 (n - 1) / n of it."""
    hops = 2 * (size - 1)
    return Link(
        name=name,
        ranks=size,
        latency=latency * hops,
        bandwidth=bandwidth * size / hops,
    )


# Assumed: what IP over a Thunderbolt 4 cable and a 10 Gbit/s network carry, and what RDMA over
# Thunderbolt 5 (80 Gbit/s) does. None of it was measured here.
ASSUMED: Sequence[tuple[str, float, float]] = (
    ("Thunderbolt 4, ring", 100e-6, 3.0e9),
    ("Thunderbolt 5, jaccl", 10e-6, 7.0e9),
    ("10 Gbit Ethernet, ring", 150e-6, 1.15e9),
)
