"""The largest batch that training's memory plan allows on a Mac: the table of docs/fine-tuning.md.

    python studies/training_plans.py

Computed from shapes, not measured: the published model in 4 bits, computing in bfloat16, LoRA on
attention and the dense branch of every layer, `--grad-checkpoint`, the encoder's loss.
"""

from __future__ import annotations

from dataclasses import replace

from mlx_dgemma.benchmark.synthetic import published_config
from mlx_dgemma.checkpoint.known_repositories import COMMUNITY, KNOWN_REPOSITORIES
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import gigabytes, usable
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.parameters import matrices
from mlx_dgemma.training.plan import TrainingPlan, plan_training
from mlx_dgemma.training.tuning import ATTENTION, DENSE

MACS = (32, 64, 128)  # GB of memory
RANKS = (8, 32)
LENGTHS = (512, 1024, 2048, 4096)  # tokens of prompt and response
WEIGHTS = next(r.weight_bytes for r in KNOWN_REPOSITORIES if r.id == f"{COMMUNITY}-4bit")
CONFIG = ModelConfig.from_dict(published_config())


def parameters(rank: int) -> int:
    """Of LoRA on attention and the dense branch of every layer."""
    adapted = [
        shape
        for name, shape in matrices(CONFIG).items()
        if name.startswith("model.decoder.layers.") and name.endswith((*ATTENTION, *DENSE))
    ]
    return sum(rank * sum(shape) for shape in adapted)


def plan(rank: int, length: int, batch: int) -> TrainingPlan:
    return plan_training(
        CONFIG,
        weights=WEIGHTS,
        trained=parameters(rank),
        batch_size=batch,
        seq_length=length,
        checkpoint=True,
        itemsize=2,
        cpu=False,
    )


def largest(memory: int, rank: int, length: int) -> int:
    """The largest batch whose plan fits a Mac of `memory` GB; 0 where none does."""
    room = usable(replace(machine(), memory=memory << 30))
    assert room is not None
    batch = 0
    while plan(rank, length, batch + 1).peak <= room:
        batch += 1
    return batch


def table() -> str:
    """The table in Markdown."""
    rows = [
        f"| Mac | rank | {' | '.join(f'{length:,} tokens' for length in LENGTHS)} |",
        "| --- | --- " + "| --- " * len(LENGTHS) + "|",
    ]
    for memory in MACS:
        for rank in RANKS:
            cells = []
            for length in LENGTHS:
                batch = largest(memory, rank, length)
                peak = gigabytes(plan(rank, length, batch).peak) if batch else "-"
                cells.append(f"{batch} ({peak})")
            rows.append(f"| {memory} GB | {rank} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
    print()
    for size in (1, 4):  # what the recipe for sudokus plans
        print(f"rank 16, 512 tokens, batch {size}: {plan(16, 512, size)}")
