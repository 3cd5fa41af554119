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
    layers = range(text.num_hidden_layers)
    decoded = batch_size * config.canvas_length
    read = seq_length if encoder_loss else seq_length - config.canvas_length
    encoded = batch_size * read
    keys = sum(2 * text.kv_heads_of(i) * text.head_dim_of(i) for i in layers)
    held = [_layer_numbers(config, i) * (encoded + decoded) for i in layers]
    if not encoder_loss:  # of the encoder's last layer keys and values alone are computed
        held[-1] -= _layer_numbers(config, layers[-1]) * encoded
    heads = batch_size * text.num_attention_heads
    scores = 5 * heads * max(read**2, config.canvas_length * (read + config.canvas_length))
    experts = 2 * _expert_numbers(config) * max(encoded, decoded)
    entering = (encoded + decoded) * text.hidden_size * len(layers)
    gates = 5 * _gate_numbers(config) * (encoded + decoded) * len(layers)
    whole = entering + max(held) if checkpoint else sum(held) + gates
    return TrainingPlan(
        weights=weights,
        trained=16 * trained,
        context=(2 * encoded + decoded) * keys * itemsize,
        activations=(whole + scores + experts) * itemsize,
        head=6 * min(HEAD_BYTES, 4 * max(encoded, decoded) * text.vocab_size),
    )


def _expert_numbers(config: ModelConfig) -> int:
    """Of one position: both halves of the chosen experts' inner rows, and their outputs."""
    text = config.text
    return text.top_k_experts * (2 * text.moe_intermediate_size + text.hidden_size)


def _gate_numbers(config: ModelConfig) -> int:
    """Of one position: the gated rows, of whose activation five arrays are held (measured)."""
    text = config.text
    return text.intermediate_size + text.top_k_experts * text.moe_intermediate_size


def _layer_numbers(config: ModelConfig, index: int) -> int:
    """What a layer's gradient needs of one position: attention's rows raw, normed and rotated, the
    dense branch's three, the experts', and eleven of the residual stream's width."""
    text = config.text
    heads = 4 * text.num_attention_heads + 5 * text.kv_heads_of(index)
    attention = heads * text.head_dim_of(index)
    return attention + 3 * text.intermediate_size + _expert_numbers(config) + 11 * text.hidden_size


def check_training(plan: TrainingPlan, machine: Machine) -> None:
    """Raises ResourceError with the way out where the plan does not fit the machine."""
    room = usable(machine)
    if room is not None and plan.peak > room:
        raise ResourceError(
            f"Training needs {plan}, and {gigabytes(room)} can be used here: take "
            "--grad-checkpoint, a smaller --batch-size or --max-seq-length, a lower rank, or a "
            "checkpoint of fewer bits."
        )
