"""What training needs in memory, before its first step; an estimate from shapes.

weights      as they are stored, and in the computing dtype where they are expanded
trained      float32 parameters, their gradient and the optimizer's two moments
context      keys and values of the encoder pass, held for the decoder's gradient
activations  what a layer's gradient needs: of every layer, or with `checkpoint` of one beside
             what enters each
head         logits and their gradient, of HEAD_BYTES of float32 at a time
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_dgemma.errors import ResourceError
from mlx_dgemma.machine.hardware import Machine
from mlx_dgemma.machine.memory import gigabytes, usable
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.training.loss import HEAD_BYTES


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of each part; `peak` is their sum."""

    weights: int
    trained: int
    context: int
    activations: int
    head: int

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.context + self.activations + self.head

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {gigabytes(getattr(self, name))}"
            for name in ("weights", "trained", "context", "activations", "head")
        )
        return f"about {gigabytes(self.peak)} ({parts})"


def plan_training(
    config: ModelConfig,
    *,
    weights: int,
    trained: int,
    batch_size: int,
    seq_length: int,
    checkpoint: bool,
    itemsize: int,
    encoder_loss: bool = True,
) -> TrainingPlan:
    """weights: bytes stored. trained: parameters. seq_length: prompt and response tokens.
    itemsize: bytes of an activation. encoder_loss: whether the encoder pass has one of its own;
    else it reads the prompt alone."""
    text = config.text
    layers = text.num_hidden_layers
    encoded = batch_size * seq_length
    positions = encoded + batch_size * config.canvas_length
    keys = sum(2 * text.kv_heads_of(i) * text.head_dim_of(i) for i in range(layers))
    whole = sum(_layer_bytes(config, i, batch_size, seq_length, itemsize) for i in range(layers))
    most = max(_layer_bytes(config, i, batch_size, seq_length, itemsize) for i in range(layers))
    entering = 2 * positions * text.hidden_size * itemsize * layers
    return TrainingPlan(
        weights=weights,
        trained=16 * trained,
        context=2 * encoded * keys * itemsize,
        activations=entering + most if checkpoint else whole,
        head=3 * HEAD_BYTES,
    )


def _layer_bytes(
    config: ModelConfig, index: int, batch: int, seq_length: int, itemsize: int
) -> int:
    """What both passes of one layer hold for its gradient."""
    text = config.text
    positions = batch * (seq_length + config.canvas_length)
    heads = text.num_attention_heads
    attention = 4 * (heads + text.kv_heads_of(index)) * text.head_dim_of(index)
    dense = 4 * text.intermediate_size
    experts = text.top_k_experts * (2 * text.hidden_size + 4 * text.moe_intermediate_size)
    stream = 12 * text.hidden_size
    scores = (
        batch * heads * (seq_length**2 + config.canvas_length * (seq_length + config.canvas_length))
    )
    return (positions * (attention + dense + experts + stream) + 2 * scores) * itemsize


def check_training(plan: TrainingPlan, machine: Machine) -> None:
    """Raises ResourceError with the way out where the plan does not fit the machine."""
    room = usable(machine)
    if room is not None and plan.peak > room:
        raise ResourceError(
            f"Training needs {plan}, and {gigabytes(room)} can be used here: take "
            "--grad-checkpoint, a smaller --batch-size or --max-seq-length, a lower rank, or a "
            "checkpoint of fewer bits."
        )
