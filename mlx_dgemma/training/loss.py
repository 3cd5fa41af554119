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
from typing import cast

import mlx.core as mx

from mlx_dgemma.model import Model
from mlx_dgemma.training.batches import Batch
from mlx_dgemma.training.forward import Passes

HEAD_BYTES = 64 << 20  # of float32 logits that are held at once


def rows_at_once(vocabulary: int) -> int:
    """Positions whose logits are held at once: 64 of the published vocabulary."""
    return max(1, HEAD_BYTES // (4 * vocabulary))


@dataclass(frozen=True)
class Objective:
    """encoder_weight: of the encoder's loss beside the canvas' one. detach_context: whether the
    canvas' loss leaves the encoder pass alone. certainty_weight: of the entropy (nats) at the
    canvas' positions where the likeliest token is the target."""

    encoder_weight: float = 1.0
    detach_context: bool = False
    certainty_weight: float = 0.0

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
            certainty=self.certainty_weight,
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
    rows = batch.conditioned.nonzero()[0]
    some = mx.array(rows)
    frozen = [
        (mx.stop_gradient(keys)[some], mx.stop_gradient(values)[some]) for keys, values in context
    ]
    hidden = passes.decode(mx.array(batch.noisier[rows]), batch.starts[rows], frozen, None)
    hidden = mx.stop_gradient(hidden)
    flat = hidden.reshape(-1, hidden.shape[-1])
    parts: list[mx.array] = []
    count = rows_at_once(model.config.text.vocab_size)
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        part = mx.depends([part], parts[-1:])[0] if parts else part
        parts.append(model.soft_embeddings(model.softcap(model.raw_logits(part))))
    found = mx.concatenate(parts).reshape(hidden.shape)
    soft = mx.zeros((len(batch.conditioned), *hidden.shape[1:]), found.dtype)
    soft[some] = found
    return mx.stop_gradient(soft)


def cross_entropy(
    model: Model, hidden: mx.array, targets: mx.array, weights: mx.array, *, certainty: float = 0.0
) -> mx.array:
    """sum of weights * (-log p[target] + certainty * entropy where target is argmax), float32.

    hidden [R, H], targets int [R], weights float32 [R]; p = softmax(logits), of which no more than
    `rows_at_once` are held at a time."""
    count = rows_at_once(model.config.text.vocab_size)
    parts = [
        _Part(model, targets[start : start + count], weights[start : start + count], certainty)
        for start in range(0, len(hidden), count)
    ]

    def rows(hidden: mx.array, number: int, before: list[mx.array]) -> mx.array:
        """A part's rows, which wait for the part before it: else MLX computes several at once."""
        some = hidden[number * count : (number + 1) * count]
        return mx.depends([some], before[-1:])[0] if before else some

    def loss(hidden: mx.array) -> mx.array:
        found: list[mx.array] = []
        for number, part in enumerate(parts):
            found.append(part.loss(rows(hidden, number, found)))
        return mx.stack(found).sum()

    def gradient(hidden: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        found: list[mx.array] = []
        for number, part in enumerate(parts):
            found.append(part.gradient(rows(hidden, number, found), cotangent))
        return mx.concatenate(found)

    if not parts:
        return mx.array(0.0)
    whole = mx.custom_function(loss)
    whole.vjp(gradient)
    return cast("mx.array", whole(hidden))


@dataclass(frozen=True)
class _Part:
    """The loss of some rows, with its gradient in closed form: the logits are made again for it,
    and few arrays of their size are held."""

    model: Model
    targets: mx.array
    weights: mx.array
    certainty: float

    def _read(self, hidden: mx.array) -> tuple[mx.array, ...]:
        logits = self.model.softcap(self.model.raw_logits(hidden))
        log_z = mx.logsumexp(logits, axis=-1, keepdims=True)
        likely = mx.exp(logits - log_z)
        expected = (likely * logits).sum(axis=-1, keepdims=True)
        right = (logits.argmax(axis=-1) == self.targets)[:, None]
        return logits, log_z, likely, expected, right

    def loss(self, hidden: mx.array) -> mx.array:
        """Of hidden [r, H]: a float32 scalar."""
        if not self.certainty:
            logits = self.model.softcap(self.model.raw_logits(hidden))
            losses = mx.logsumexp(logits, axis=-1, keepdims=True)
        else:
            logits, log_z, _, expected, right = self._read(hidden)
            losses = log_z + self.certainty * right * (log_z - expected)
        losses = losses - mx.take_along_axis(logits, self.targets[:, None], axis=-1)
        return (self.weights * losses[:, 0]).sum()

    def gradient(self, hidden: mx.array, cotangent: mx.array) -> mx.array:
        """Of the loss with respect to hidden [r, H], times the scalar cotangent."""
        logits, _, likely, expected, right = self._read(hidden)
        places = self.targets[:, None]
        slope = likely
        if self.certainty:
            slope = likely * (1 - self.certainty * right * (logits - expected))
        found = mx.take_along_axis(slope, places, axis=-1) - 1
        slope = mx.put_along_axis(slope, places, found, axis=-1)
        cap = self.model.config.text.final_logit_softcapping
        slope = slope * (1 - mx.square(logits / cap)) * (self.weights * cotangent)[:, None]
        table = self.model.embedding_matrix
        return table.apply(slope.astype(table.dtype), transpose=False).astype(hidden.dtype)


def obvious_cross_entropy(
    model: Model, hidden: mx.array, targets: mx.array, weights: mx.array, *, certainty: float = 0.0
) -> mx.array:
    """The same with all logits at once."""
    logits = model.softcap(model.raw_logits(hidden))
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    losses = -mx.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]
    entropy = -(mx.exp(logs) * logs).sum(axis=-1)
    right = logs.argmax(axis=-1) == targets
    return (weights * (losses + certainty * right * entropy)).sum()
