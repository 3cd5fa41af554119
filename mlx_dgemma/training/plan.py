"""What training needs in memory, before its first step: a sum of what is held, from shapes.

weights      as they are stored, or as they were expanded
trained      float32 parameters, their gradient and the optimizer's two moments
context      keys and values that the decoder pass reads, of every layer
activations  what the layers' gradients read: of every trained layer, or with `checkpoint` what
             enters each
work         beside these either the head's logits, or one layer's work, whichever is more

A step holds most either at its losses, when every layer waits for its gradient, or in the first
layers that it goes back through.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_dgemma.errors import ResourceError
from mlx_dgemma.kernels import gradients
from mlx_dgemma.kernels.expert_blocks import block_rows
from mlx_dgemma.machine.hardware import Machine
from mlx_dgemma.machine.memory import gigabytes, usable
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.training.loss import HEAD_BYTES

_WIDE = 4  # bytes of a float32


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of each part; `peak` is their sum."""

    weights: int
    trained: int
    context: int
    activations: int
    work: int

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.context + self.activations + self.work

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {gigabytes(getattr(self, name))}"
            for name in ("weights", "trained", "context", "activations", "work")
        )
        return f"about {gigabytes(self.peak)} ({parts})"


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer in one pass over `positions` that see `keys` keys.

    itemsize: of an activation. experts: whether those are trained, and not only what is around
    them. whole: whether all of the layer is. cpu: see `plan_training`."""

    config: ModelConfig
    index: int
    positions: int
    keys: int
    itemsize: int
    experts: bool
    whole: bool
    cpu: bool

    @property
    def rows(self) -> int:
        """Of the experts: a position's choices, and what fills their blocks."""
        text = self.config.text
        pairs = self.positions * text.top_k_experts
        size = block_rows(pairs, text.num_experts) if self.cpu else 1
        return pairs + (size * text.num_experts if size > 1 else 0)

    @property
    def entering(self) -> int:
        """The residual stream."""
        return self.itemsize * self.positions * self.config.text.hidden_size

    @property
    def key_values(self) -> int:
        """Keys and values of the layer's own positions."""
        text = self.config.text
        width = text.kv_heads_of(self.index) * text.head_dim_of(self.index)
        return 2 * self.itemsize * self.positions * width

    @property
    def likely(self) -> int:
        """Attention's probabilities, float32."""
        return _WIDE * self.config.text.num_attention_heads * self.positions * self.keys

    @property
    def held(self) -> int:
        """What the gradient reads, but keys and values as attention takes them."""
        text = self.config.text
        heads = text.num_attention_heads * text.head_dim_of(self.index)
        # normed stream, attention's input, attention's output normed, the stream after it normed,
        # the dense branch's input, both branches and their sum normed
        stream = 8 + (2 if self.whole else 0)  # the router's and the experts' input
        # queries normed and rotated, what attention gives, by heads and side by side
        numbers = stream * text.hidden_size + 4 * heads + 3 * text.intermediate_size
        dense = self.positions * (numbers * self.itemsize + _WIDE * text.intermediate_size)
        inner = text.moe_intermediate_size
        each = 2 * inner + text.hidden_size  # gate and up; the output, for the router's weights
        if self.experts or self.whole:
            each += inner + text.hidden_size  # what the two matrices multiply
        routed = self.rows * (each * self.itemsize + _WIDE * inner)
        # keys and values normed, before they are rotated
        return dense + routed + self.key_values + (self.likely if self.cpu else 0)

    @property
    def work(self) -> int:
        """What is made on the way and gone when the layer is done: attention's scores, or the
        experts' rows, whichever is more."""
        text = self.config.text
        wide = max(self.itemsize, _WIDE if self.cpu else 0)
        routed = self.rows * wide * (3 * text.hidden_size + 4 * text.moe_intermediate_size)
        dense = self.positions * wide * 6 * text.intermediate_size
        return max(4 * self.likely, routed, dense)


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
    layers: int = -1,
    experts: bool = False,
    whole: bool = False,
    cpu: bool | None = None,
) -> TrainingPlan:
    """weights: bytes stored. trained: parameters. seq_length: prompt and response tokens.
    itemsize: bytes of an activation. encoder_loss: whether the encoder pass has one of its own;
    else it reads the prompt alone. layers: how many are trained, from the last one; -1 is all.
    experts, whole: whether the experts, or whole layers, are trained. cpu: whether on MLX's CPU
    backend, which keeps probabilities and fills blocks of experts; by default what is used here."""
    text = config.text
    cpu = gradients.on_cpu() if cpu is None else cpu
    read = seq_length if encoder_loss else seq_length - config.canvas_length
    encoded, decoded = batch_size * read, batch_size * config.canvas_length
    every = range(text.num_hidden_layers)

    def layer(index: int, positions: int, keys: int) -> _Layer:
        return _Layer(config, index, positions, keys, itemsize, experts, whole, cpu)

    encoder = [layer(index, encoded, read) for index in every]
    decoder = [layer(index, decoded, read + config.canvas_length) for index in every]
    passes = list(zip(encoder, decoder, strict=True))
    learning = passes[-layers:] if layers > 0 else passes
    last = encoder[-1]
    context = sum(e.key_values for e in encoder)
    work = max(max(e.work, d.work) for e, d in learning)
    if checkpoint:
        held = sum(e.entering + d.entering for e, d in learning)
        # One layer, what was made on its way forward and back, and the gradient of the context.
        work += work // 2 + sum(e.key_values for e, _ in learning)
        work += max(max(e.held, d.held + e.key_values + d.key_values) for e, d in learning)
    else:
        context += sum(e.key_values + d.key_values for e, d in learning)
        held = sum(e.held + d.held for e, d in learning)
        if not encoder_loss:  # of the encoder's last layer keys and values alone are computed
            held -= last.held - last.key_values - 2 * last.entering
    return TrainingPlan(
        weights=weights,
        trained=4 * _WIDE * trained,
        context=context,
        activations=held,
        work=max(work, _head(text.vocab_size, decoded, encoded if encoder_loss else 0)),
    )


def _head(vocabulary: int, decoded: int, encoded: int) -> int:
    """Of both losses, which take so many positions, a part of them at a time. MLX sends tens of
    operations ahead and frees what they read when they are done, so that of a part there are, in
    float32, its logits, their square, numerator and denominator of their tanh, what is raised to a
    power, its whole part and that part's bits, the power, the gradient without the targets: nine;
    and of the part before or after it logits, square and numerator."""
    canvas, text = (min(HEAD_BYTES, _WIDE * rows * vocabulary) for rows in (decoded, encoded))
    largest = max(canvas, text)
    return 9 * largest + 3 * (largest if largest == HEAD_BYTES or not text else min(canvas, text))


def check_training(plan: TrainingPlan, machine: Machine) -> None:
    """Raises ResourceError with the way out where the plan does not fit the machine."""
    room = usable(machine)
    if room is not None and plan.peak > room:
        raise ResourceError(
            f"Training needs {plan}, and {gigabytes(room)} can be used here: take "
            "--grad-checkpoint, a smaller --batch-size or --max-seq-length, a lower rank, or a "
            "checkpoint of fewer bits."
        )
