"""One block: a canvas of noise becomes a draft worth committing.

    canvas -> hidden states -> raw logits -> row statistics (entropy, argmax, sample)
           -> accept and renoise -> next canvas;  soft embeddings -> next step's signal

Everything stays on the device but for one small vector per row and step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding import schedule
from mlx_dgemma.decoding.canvas import CanvasRequest, stack_pins
from mlx_dgemma.decoding.draws import Place
from mlx_dgemma.decoding.logits import Logits, make_logits
from mlx_dgemma.decoding.sampler import StepInput, make_sampler
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.step import Step
from mlx_dgemma.decoding.stopping import StableAndConfident
from mlx_dgemma.errors import NumericsError
from mlx_dgemma.kernels.row_statistics import RowStatistics, row_statistics
from mlx_dgemma.kernels.soft_embeddings import (
    DROPPED_MASS,
    Survivors,
    gather_soft_embeddings,
    scale_embeddings,
)
from mlx_dgemma.model.network import DISPATCH_EVERY

if TYPE_CHECKING:
    from mlx_dgemma.model import ContextCache, Model


@dataclass(frozen=True)
class BlockResult:
    """A row's finished block.

    ids: int32 [C], the last draft (not the noisy canvas).
    entropy: float32 [C], nats, of the last step's tempered distributions; 0 where pinned.
    settled: int32 [C], the step (1 is the block's first) that last changed the draft there.
    logprobs: float32 [C] of `ids` under the last step's untempered logits, when asked for.
    steps: denoising steps taken. converged: whether the stop test fired.
    """

    ids: np.ndarray
    entropy: np.ndarray
    settled: np.ndarray
    logprobs: np.ndarray | None
    steps: int
    converged: bool


class _Prediction(NamedTuple):
    """One decoder pass over a batch; draft, sample and entropy are [b, C]."""

    logits: Logits
    stats: RowStatistics
    draft: mx.array
    sample: mx.array
    entropy: mx.array


@dataclass
class _Batch:
    """The rows still being denoised; every array has one line for each."""

    rows: list[int]
    canvas: mx.array
    settled: mx.array
    pins: tuple[mx.array, mx.array] | None
    signal: mx.array | None = None
    draft: mx.array | None = None

    def keep(self, lines: np.ndarray) -> None:
        self.rows = [self.rows[line] for line in lines]
        index = mx.array(lines)
        self.canvas, self.settled = self.canvas[index], self.settled[index]
        self.signal = None if self.signal is None else self.signal[index]
        self.draft = None if self.draft is None else self.draft[index]
        self.pins = None if self.pins is None else (self.pins[0][index], self.pins[1][index])


def denoise_block(
    model: Model,
    cache: ContextCache,
    settings: DecodingSettings,
    requests: Sequence[CanvasRequest],
    *,
    block: int = 0,
    attempt: int = 0,
    length: int | None = None,
    logprobs: bool = False,
    banned: Sequence[int] = (),
) -> Generator[Step, None, list[BlockResult]]:
    """Denoises a batch of canvases over one shared context; yields each step, returns each row.

    Every row has its own draws, pins and stop: it draws what it draws alone, and a row that
    has stopped is no longer computed. The context is read, never written.

    length: canvas positions; None is the settings' or the checkpoint's.
    banned: ids that no free position can take; the network's logits for them are discarded.

    Raises NumericsError at the first step whose logits are not finite.
    """
    length = length or settings.canvas_length or model.config.canvas_length
    vocab_size = model.config.text.vocab_size
    total = settings.max_denoising_steps
    fresh = Place(block, attempt, 0)
    batch = _Batch(
        rows=list(range(len(requests))),
        canvas=mx.stack([request.initial(fresh, length, vocab_size) for request in requests]),
        settled=mx.zeros((len(requests), length), dtype=mx.int32),
        pins=stack_pins(requests, length),
    )
    first = _first_step(requests, total)
    if first == 0:
        return [_untouched(ids, logprobs) for ids in np.array(batch.canvas)]

    results: dict[int, BlockResult] = {}
    sampler = make_sampler(settings)
    sparse = settings.sparse_conditioning(8 * model.embedding_matrix.dtype.size)
    stop = StableAndConfident(
        settings.stability_threshold, settings.confidence_threshold, len(requests)
    )
    for taken, step in enumerate(range(first, 0, -1), start=1):
        place = Place(block, attempt, taken)
        temperature = schedule.temperature(step, total, settings.t_min, settings.t_max)
        draws = [requests[row].draws for row in batch.rows]

        # One decoder pass, and what decoding wants to know of its distributions.
        seen = _predict(model, cache, settings, batch, requests, place, temperature, banned)
        # Which samples the next canvas keeps; all its other positions are noise again.
        decision = sampler.decide(
            StepInput(
                canvas=batch.canvas,
                entropy=seen.entropy,
                draft=seen.draft,
                sample=seen.sample,
                sample_probability=_sample_probability(model, seen, temperature),
                fresh=mx.stack([source.renoise(place, length, vocab_size) for source in draws]),
                previous_draft=batch.draft,
                pinned=None if batch.pins is None else batch.pins[1],
            ),
            last=step == 1,
        )
        changed = True if batch.draft is None else seen.draft != batch.draft
        batch.settled = mx.where(changed, taken, batch.settled)
        survivors = seen.logits.survivors(seen.stats, temperature) if sparse and step > 1 else None
        report = _report(decision.status, survivors, batch.pins)
        shown = (seen.draft, decision.accepted, seen.entropy)
        mx.eval(report, decision.complete, *shown, batch.settled)
        yield Step(
            place=place,
            rows=tuple(batch.rows),
            canvas=batch.canvas,
            draft=seen.draft,
            sample=seen.sample,
            accepted=decision.accepted,
            entropy=seen.entropy,
        )

        # The one host read of a step.
        numbers = np.array(report)
        repeated, mean_entropy, finite = numbers[:-2].reshape(-1, 3).T
        if not finite.all():
            raise NumericsError(
                f"The network's logits are not finite at block {block}, denoising step {taken}: "
                "the weights are damaged or the precision is too low; verify the checkpoint."
            )
        done = stop(np.array(batch.rows), repeated > 0, mean_entropy)
        if decision.complete is not None:
            done |= np.array(decision.complete)
        ended = np.ones_like(done) if step == 1 else done
        for line in np.flatnonzero(ended):
            results[batch.rows[line]] = BlockResult(
                ids=np.array(seen.draft[line]),
                entropy=np.array(seen.entropy[line]),
                settled=np.array(batch.settled[line]),
                logprobs=_logprobs(model, seen, int(line)) if logprobs else None,
                steps=taken,
                converged=bool(done[line]),
            )
        if ended.all():
            break
        # What the next step is told of this one's distributions, and the canvas it denoises.
        few = survivors if numbers[-2] < DROPPED_MASS else None
        batch.signal = _signal(model, seen, temperature, batch.pins, few, int(numbers[-1]))
        batch.canvas, batch.draft = decision.canvas, seen.draft
        if ended.any():
            going = np.flatnonzero(~ended)
            batch.keep(going)
            sampler.keep(mx.array(going))
        mx.async_eval(batch.signal)  # the device begins while Python builds the first layers
    return [results[row] for row in range(len(requests))]


def _first_step(requests: Sequence[CanvasRequest], total: int) -> int:
    firsts = {total if row.start is None else row.start.first_step(total) for row in requests}
    if len(firsts) != 1:
        raise ValueError("the rows of one batch must start with one strength")
    return firsts.pop()


def _untouched(ids: np.ndarray, logprobs: bool) -> BlockResult:
    """A draft kept at strength 0: nothing was predicted, so nothing is known of it."""
    unknown = np.full(ids.shape, np.nan, dtype=np.float32)
    return BlockResult(
        ids=ids,
        entropy=unknown,
        settled=np.zeros_like(ids),
        logprobs=unknown if logprobs else None,
        steps=0,
        converged=True,
    )


def _predict(
    model: Model,
    cache: ContextCache,
    settings: DecodingSettings,
    batch: _Batch,
    requests: Sequence[CanvasRequest],
    place: Place,
    temperature: float,
    banned: Sequence[int],
) -> _Prediction:
    shape = batch.canvas.shape
    hidden = model.hidden(batch.canvas, cache, batch.signal, dispatch_every=DISPATCH_EVERY)
    logits = make_logits(model, hidden, np.array(banned, dtype=np.int32), settings)
    if settings.temp == 0:
        uniforms = mx.zeros((*shape, 2))
    else:
        uniforms = mx.stack([requests[row].draws.sample(place, shape[1]) for row in batch.rows])
    stats = logits.statistics(temperature, uniforms.reshape(-1, 2), settings.temp)
    entropy = stats.entropy.reshape(shape)
    draft, sample = stats.argmax.reshape(shape), stats.sample.reshape(shape)
    for line, row in enumerate(batch.rows):
        for position, options in requests[row].allowed.items():
            choice = mx.array(options)
            best = row_statistics(
                logits.row(line, position, choice)[None],
                temperature,
                uniforms[line, position][None],
                softcap=model.config.text.final_logit_softcapping,
                temp=settings.temp,
            )
            draft[line, position] = choice[best.argmax[0]]
            sample[line, position] = choice[best.sample[0]]
            entropy[line, position] = best.entropy[0]
    if batch.pins is not None:
        ids, pinned = batch.pins
        draft, sample = mx.where(pinned, ids, draft), mx.where(pinned, ids, sample)
        entropy = mx.where(pinned, 0.0, entropy)
    return _Prediction(logits, stats, draft, sample, entropy)


def _softcapped(model: Model, raw: mx.array) -> mx.array:
    softcap = model.config.text.final_logit_softcapping
    return softcap * mx.tanh(raw / softcap)


def _sample_probability(model: Model, seen: _Prediction, temperature: float) -> mx.array:
    """float32 [b, C]: the tempered probability of each position's sample."""
    tempered = _softcapped(model, seen.logits.at(seen.sample)) / temperature
    return mx.exp(tempered - seen.stats.log_z.reshape(tempered.shape))


def _report(
    status: mx.array, survivors: Survivors | None, pins: tuple[mx.array, mx.array] | None
) -> mx.array:
    """float32 [3 b + 2]: every row's status, then the most probability dropped and tokens kept."""
    if survivors is None:
        return mx.concatenate([status.reshape(-1), mx.array([1.0, 0.0])])
    dropped, count = survivors.dropped, survivors.counts
    if pins is not None:  # a pinned position's signal is its own embedding
        free = mx.logical_not(pins[1].reshape(-1))
        dropped, count = dropped * free, count * free
    return mx.concatenate([status.reshape(-1), dropped.max()[None], count.max()[None]])


def _signal(
    model: Model,
    seen: _Prediction,
    temperature: float,
    pins: tuple[mx.array, mx.array] | None,
    survivors: Survivors | None = None,
    kept: int = 0,
) -> mx.array:
    """The next step's self-conditioning [b, C, H]; a pinned position's is its own embedding.

    survivors: the tokens to sum over, at most `kept` per position; None sums over all.
    """
    if survivors is None:
        soft = seen.logits.signal(seen.stats, temperature)
    else:
        width = 1 << max(kept - 1, 0).bit_length()  # few different shapes
        table = model.embedding_matrix
        soft = gather_soft_embeddings(survivors, table, width=width, scale=model.embed_scale)
        soft = soft.reshape(*seen.draft.shape, -1)
    if pins is None:
        return soft
    ids, pinned = pins
    certain = scale_embeddings(model.embedding_rows(ids).astype(soft.dtype), model.embed_scale)
    return mx.where(pinned[..., None], certain, soft)


def _logprobs(model: Model, seen: _Prediction, line: int) -> np.ndarray:
    """float32 [C]: log-probability of the draft under the untempered, softcapped logits."""
    capped = _softcapped(model, seen.logits.at(seen.draft)[line])
    return np.array(capped - seen.logits.log_z(line))
