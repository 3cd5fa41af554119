"""The objective of a step: Google's for DiffusionGemma.

    canvas   cross-entropy of every position of a noised canvas, each token of which was replaced by
             a uniformly random one with probability t ~ U(0, 1), drawn per example
    encoder  cross-entropy of the next token in the causal pass over prompt and clean canvases
    signal   for half of the examples soft embeddings from a first pass, which has no gradient, over
             a canvas with at least as much noise, as in sampling

Sources: google-deepmind/gemma, gemma/diffusion; trl's sft_diffusion_gemma.py. The logits of the
vocabulary are made for a few rows at a time, and made again for the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from mlx_dgemma.model import Model
from mlx_dgemma.training.batches import Batch
from mlx_dgemma.training.forward import Passes

ROWS = 64  # whose logits are held at once: 67 MB in float32 of the published vocabulary


@dataclass(frozen=True)
class Objective:
    """encoder_weight: of the encoder's loss beside the canvas' one. detach_context: whether the
    canvas' loss leaves the encoder pass alone."""

    encoder_weight: float = 1.0
    detach_context: bool = False

    def __call__(self, passes: Passes, batch: Batch) -> tuple[mx.array, mx.array]:
        """The loss, and [2]: the canvas' and the encoder's part of it, unweighted."""
        model = passes.model
        encoded, context = passes.encode(batch)
        if self.detach_context:
            context = [(mx.stop_gradient(k), mx.stop_gradient(v)) for k, v in context]
        soft = signal(passes, batch, context) if batch.conditioned.any() else None
        hidden = passes.decode(mx.array(batch.noisy), batch.starts, context, soft)
        canvas = cross_entropy(
            model,
            hidden.reshape(-1, hidden.shape[-1]),
            mx.array(batch.clean.reshape(-1)),
            mx.full(batch.clean.size, batch.canvas_weight),
        )
        encoder = mx.array(0.0)
        if self.encoder_weight:
            places = mx.array(batch.learned.reshape(-1).nonzero()[0])
            following = mx.array(batch.tokens).reshape(-1)[places + 1]
            encoder = cross_entropy(
                model,
                encoded.reshape(-1, encoded.shape[-1])[places],
                following,
                mx.full(len(places), batch.encoder_weight),
            )
        return canvas + self.encoder_weight * encoder, mx.stop_gradient(mx.stack([canvas, encoder]))


def signal(passes: Passes, batch: Batch, context: list[tuple[mx.array, mx.array]]) -> mx.array:
    """[B, C, H] soft embeddings of a pass over the noisier canvas; zeros where the example is not
    conditioned. Without gradient."""
    model = passes.model
    frozen = [(mx.stop_gradient(keys), mx.stop_gradient(values)) for keys, values in context]
    hidden = mx.stop_gradient(passes.decode(mx.array(batch.noisier), batch.starts, frozen, None))
    flat = hidden.reshape(-1, hidden.shape[-1])
    parts: list[mx.array] = []
    for start in range(0, len(flat), ROWS):
        rows = mx.depends([flat[start : start + ROWS]], parts[-1:])[0] if parts else flat[:ROWS]
        parts.append(model.soft_embeddings(model.softcap(model.raw_logits(rows))))
    soft = mx.concatenate(parts).reshape(hidden.shape)
    return mx.stop_gradient(soft * mx.array(batch.conditioned)[:, None, None])


def cross_entropy(model: Model, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """sum of weights * -log softmax(logits)[target], float32, for hidden [R, H], targets int [R]
    and weights float32 [R], with no more than ROWS rows of logits at a time."""

    total = mx.array(0.0)
    for start in range(0, len(hidden), ROWS):
        some = slice(start, start + ROWS)
        total = total + mx.checkpoint(partial(_part, model, targets[some], weights[some]))(
            hidden[some]
        )
    return total


def _part(model: Model, targets: mx.array, weights: mx.array, hidden: mx.array) -> mx.array:
    logits = model.softcap(model.raw_logits(hidden))
    found = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (weights * (mx.logsumexp(logits, axis=-1) - found)).sum()


def obvious_cross_entropy(
    model: Model, hidden: mx.array, targets: mx.array, weights: mx.array
) -> mx.array:
    """The same with all logits at once."""
    logits = model.softcap(model.raw_logits(hidden))
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(weights * mx.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]).sum()
