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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.kernels.gradients import exp, gradients, row_sums, tanh, with_gradient
from mlx_dgemma.model import Model
from mlx_dgemma.training.batches import Batch
from mlx_dgemma.training.forward import Passes

HEAD_BYTES = 32 << 20  # of float32 logits that are made at once


def rows_at_once(vocabulary: int) -> int:
    """Positions whose logits are made at once: 32 of the published vocabulary."""
    return max(1, HEAD_BYTES // (4 * vocabulary))


@dataclass(frozen=True)
class Objective:
    """encoder_weight: of the encoder's loss beside the canvas' one. detach_context: whether the
    canvas' loss leaves the encoder pass alone. certainty_weight: of the entropy (nats) at positions
    of a `sure` canvas where the likeliest token is the target. temperature: of the first pass of
    such a canvas, as in sampling."""

    encoder_weight: float = 1.0
    detach_context: bool = False
    certainty_weight: float = 0.0
    temperature: float = 1.0

    def __call__(self, passes: Passes, batch: Batch) -> tuple[mx.array, mx.array]:
        """The loss, and [2]: the canvas' and the encoder's part of it, unweighted."""
        model = passes.model
        encoded, context = passes.encode(batch)
        if self.detach_context:
            context = [(mx.stop_gradient(k), mx.stop_gradient(v)) for k, v in context]
        soft = None
        if batch.conditioned.any():
            soft = signal(passes, batch, context, self.temperature)
        sure = batch.sure.repeat(batch.clean.shape[1]) if self.certainty_weight else None
        hidden = passes.decode(mx.array(batch.noisy), batch.starts, context, soft)
        canvas = cross_entropy(
            model,
            hidden.reshape(-1, hidden.shape[-1]),
            mx.array(batch.clean.reshape(-1)),
            mx.full(batch.clean.size, batch.canvas_weight),
            certainty=None if sure is None else self.certainty_weight * mx.array(sure),
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
                after=canvas,
            )
        return canvas + self.encoder_weight * encoder, mx.stop_gradient(mx.stack([canvas, encoder]))


def value_and_gradient(passes: Passes, objective: Objective) -> Callable[[Batch], Any]:
    """Of a batch: what the objective gives, and the gradient of every trainable parameter."""
    of = nn.value_and_grad(passes.model, lambda batch: objective(passes, batch))

    def step(batch: Batch) -> Any:
        with gradients():  # layers that are computed again are so in here
            return of(batch)

    return step


def signal(
    passes: Passes,
    batch: Batch,
    context: list[tuple[mx.array, mx.array]],
    temperature: float = 1.0,
) -> mx.array:
    """[B, C, H] soft embeddings of a pass over the noisier canvas; zeros where the example is not
    conditioned. Without gradient. temperature: divides the logits of `sure` canvases."""
    model = passes.model
    rows = batch.conditioned.nonzero()[0]
    some = mx.array(rows)
    frozen = [
        (mx.stop_gradient(keys)[some], mx.stop_gradient(values)[some]) for keys, values in context
    ]
    hidden = passes.decode(mx.array(batch.noisier[rows]), batch.starts[rows], frozen, None)
    hidden = mx.stop_gradient(hidden)
    flat = hidden.reshape(-1, hidden.shape[-1])
    divisors = np.where(batch.sure[rows], temperature, 1.0).astype(np.float32)
    divided = mx.array(divisors.repeat(hidden.shape[1]))[:, None]
    parts: list[mx.array] = []
    count = rows_at_once(model.config.text.vocab_size)
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        part = mx.depends([part], parts[-1:])[0] if parts else part
        _, likely, total = _exponentials(model, part, divided[start : start + count])
        mixed = model.embedding_matrix.apply((likely / total).astype(model.dtype), transpose=False)
        parts.append(mixed.astype(model.dtype) * model.embed_scale)
    found = mx.concatenate(parts).reshape(hidden.shape)
    soft = mx.zeros((len(batch.conditioned), *hidden.shape[1:]), found.dtype)
    soft[some] = found
    return mx.stop_gradient(soft)


def cross_entropy(
    model: Model,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    certainty: mx.array | None = None,
    after: mx.array | None = None,
) -> mx.array:
    """sum of weights * (-log p[target] + certainty * entropy where target is argmax), float32.

    hidden [R, H], targets int [R], weights and certainty float32 [R]; p = softmax(logits), of which
    no more than `rows_at_once` are held at a time. A model in training finds the gradient with the
    loss. after: what is computed first, with logits of its own."""
    count = rows_at_once(model.config.text.vocab_size)
    parts = [
        _Part(
            model,
            targets[start : start + count],
            weights[start : start + count],
            None if certainty is None else certainty[start : start + count],
        )
        for start in range(0, len(hidden), count)
    ]
    if not parts:
        return mx.array(0.0)

    def read(hidden: mx.array) -> tuple[mx.array, mx.array]:
        """The loss, and its gradient [R, H] if there will be need of it."""
        losses: list[mx.array] = []
        slopes: list[mx.array] = []
        for number, part in enumerate(parts):
            some = hidden[number * count : (number + 1) * count]
            # After the part before it: else MLX computes several at once.
            before = [losses[-1], *slopes[-1:]] if number else [] if after is None else [after]
            some = mx.depends([some], before)[0] if before else some
            loss, slope = part.read(some, gradient=model.training)
            losses.append(loss)
            slopes += [] if slope is None else [slope]
        return mx.stack(losses).sum(), mx.concatenate(slopes) if slopes else mx.zeros(1)

    def gradient(_: mx.array, cotangents: Any, outputs: Any) -> list[mx.array]:
        return [outputs[1] * cotangents[0].astype(outputs[1].dtype)]

    return cast("mx.array", with_gradient(read, gradient)(hidden)[0])


def _exponentials(
    model: Model, hidden: mx.array, divisors: float | mx.array = 1.0
) -> tuple[mx.array, mx.array, mx.array]:
    """Of hidden [r, H], float32: logits over their softcap and their exponentials [r, V], divided
    by [r, 1] before, and the sums of these [r, 1]. No logit passes the softcap, so none needs to
    be subtracted first."""
    cap = model.config.text.final_logit_softcapping
    bent = tanh(model.raw_logits(hidden).astype(mx.float32) * (1 / cap))
    likely = exp(bent * (cap / divisors))
    return bent, likely, row_sums(likely)


@dataclass(frozen=True)
class _Part:
    """The loss of some rows, with its gradient in closed form, from logits that are made once."""

    model: Model
    targets: mx.array
    weights: mx.array
    certainty: mx.array | None

    def read(self, hidden: mx.array, *, gradient: bool) -> tuple[mx.array, mx.array | None]:
        """Of hidden [r, H]: a float32 scalar, and its gradient [r, H]."""
        cap = self.model.config.text.final_logit_softcapping
        bent, likely, total = _exponentials(self.model, hidden)
        at = mx.take_along_axis(bent, self.targets[:, None], axis=-1)
        losses = mx.log(total) - at * cap
        certain = None
        if self.certainty is not None:
            right = (self.certainty * (bent.argmax(axis=-1) == self.targets))[:, None]
            expected = row_sums(likely * bent) / total * cap
            losses = losses + right * (mx.log(total) - expected)
            certain = 1 + right * expected, right * cap
        weights = self.weights[:, None]
        loss = (weights * losses).sum()
        if not gradient:
            return loss, None
        # Of the softcap [r, V]; 1 - tanh^2 is its own slope.
        slope = likely * (weights / total)
        if certain is not None:
            slope = slope * (certain[0] - bent * certain[1])
        slope = slope * (1 - bent * bent)
        places = self.targets[:, None]
        found = mx.take_along_axis(slope, places, axis=-1) - weights * (1 - at * at)
        slope = mx.put_along_axis(slope, places, found, axis=-1)
        table = self.model.embedding_matrix
        back = table.apply(slope.astype(table.dtype), transpose=False)
        return loss, back.astype(hidden.dtype)


def obvious_cross_entropy(
    model: Model,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    certainty: mx.array | None = None,
) -> mx.array:
    """The same with all logits at once."""
    logits = model.softcap(model.raw_logits(hidden))
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    losses = -mx.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]
    entropy = -(mx.exp(logs) * logs).sum(axis=-1)
    right = logs.argmax(axis=-1) == targets
    if certainty is not None:
        losses = losses + certainty * right * entropy
    return (weights * losses).sum()
