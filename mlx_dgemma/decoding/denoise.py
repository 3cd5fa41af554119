"""One block: a canvas of noise becomes a draft worth committing.

    canvas -> hidden states -> raw logits -> row statistics (entropy, argmax, sample)
           -> accept and renoise -> next canvas;  soft embeddings -> next step's signal

Everything stays on the device but for one small vector per step.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding import active_steps, self_conditioning
from mlx_dgemma.decoding.block_result import BlockResult, finished, untouched
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.draws import Place
from mlx_dgemma.decoding.predicted import Prediction
from mlx_dgemma.decoding.prediction import predict
from mlx_dgemma.decoding.report import Numbers, Report
from mlx_dgemma.decoding.sampler import Decision, StepInput, make_sampler
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.step import Step
from mlx_dgemma.decoding.stopping import AllAccepted, StableAndConfident, stop_rules
from mlx_dgemma.errors import NumericsError
from mlx_dgemma.kernels.sparse_embeddings import Survivors

if TYPE_CHECKING:
    from mlx_dgemma.model import ContextCache, Model


def denoise_block(
    model: Model,
    cache: ContextCache,
    settings: DecodingSettings,
    requests: Sequence[CanvasRequest],
    *,
    block: int = 0,
    attempt: int = 0,
    length: int | None = None,
    alternatives: int | None = None,
    banned: Sequence[int] = (),
    stop_ids: Collection[int] = (),
) -> Generator[Step, None, list[BlockResult]]:
    """Denoises a batch of canvases over one shared context; yields each step, returns each row.

    Every row has its own draws, pins and stop: it draws what it draws alone, and a row that
    has stopped is no longer computed. The context is read, never written. Whether another step
    follows is decided before a step is yielded, and its first layers are sent to the device, which
    works on them while the caller has the step.

    length: canvas positions; None is the settings' or the checkpoint's.
    alternatives: score each row's ids, and list so many likely ids beside them; None scores none.
    banned: ids that no free position can take; the network's logits for them are discarded.
    stop_ids: what ends the text, for settings that leave out what follows it.

    Raises NumericsError at the first step whose logits are not finite.
    """
    length = length or settings.canvas_length or model.config.canvas_length
    vocab_size, steps = model.config.text.vocab_size, settings.max_denoising_steps
    fresh = Place(block, attempt, 0)
    state = CanvasState.initial(
        requests, fresh, length, vocab_size, steps, positions=settings.positions
    )
    rules = stop_rules(settings)
    results = untouched(state, alternatives=alternatives)
    state.keep(state.remaining > 0)
    model.await_context(cache, length)
    while state.rows:
        outcome = step(model, cache, settings, state, banned, stop_ids)
        mx.eval(outcome.report.packed, outcome.shown, outcome.settled)
        done = outcome.as_step(state)
        numbers = outcome.report.read()
        _check_finite(numbers, state)
        converged = _converged(rules, state, outcome, numbers, settings)
        ended = converged | state.last
        results |= finished(
            state, ended, converged, outcome.seen, outcome.settled, alternatives=alternatives
        )
        if not ended.all():
            advance(model, state, outcome, numbers)
        state.keep(~ended)
        if state.rows:
            _begin(model, cache, state)
        yield done
    return [results[row] for row in range(len(requests))]


class Outcome(NamedTuple):
    """One step on the device: the prediction, what the sampler made of it, and the report.

    survivors: the tokens that carry the probability, where the signal may be summed over them.
    settled: int32 [b, C], the state's after this step.
    """

    seen: Prediction
    decision: Decision
    survivors: Survivors | None
    settled: mx.array
    report: Report

    @property
    def shown(self) -> tuple[mx.array, mx.array, mx.array]:
        """What a display reads of a step: draft, accepted and entropy, [b, C] each."""
        return self.seen.draft, self.decision.accepted, self.seen.entropy

    def as_step(self, state: CanvasState) -> Step:
        """The step as its observers see it, before `state` moves on."""
        draft, accepted, entropy = self.shown
        return Step(
            places=tuple(state.places),
            rows=tuple(state.rows),
            canvas=state.canvas,
            draft=draft,
            sample=self.seen.sample,
            accepted=accepted,
            entropy=entropy,
            computed=self.seen.computed,
        )


def step(
    model: Model,
    cache: ContextCache,
    settings: DecodingSettings,
    state: CanvasState,
    banned: Sequence[int] = (),
    stop_ids: Collection[int] = (),
    *,
    dispatch: bool = True,
) -> Outcome:
    """Builds one denoising step of `state`, from canvas and signal to the report.

    `state` does not change: `advance` moves it on. Layers are sent to the device as they are built;
    without `dispatch` nothing is evaluated.
    """
    seen = predict(model, cache, settings, state, banned, dispatch=dispatch)
    decision = make_sampler(settings).decide(_step_input(model, state, seen), last=state.last)
    survivors = None
    # Several processes sum the signal over the vocabulary together: each over its own part.
    alone = model.team is None
    wanted = alone and settings.sparse_conditioning(8 * model.embedding_matrix.dtype.size)
    vocabulary = model.config.text.vocab_size
    if wanted and not state.last.all() and self_conditioning.may_be_sparse(state, vocabulary):
        survivors = seen.logits.survivors(seen.stats, seen.temperature)
    marks = None
    if state.active is not None:
        marks = active_steps.marks(state, seen, decision, stop_ids)
    report = Report.pack(decision, seen.entropy, survivors, marks)
    return Outcome(seen, decision, survivors, state.settled_after(seen.draft), report)


def advance(model: Model, state: CanvasState, outcome: Outcome, numbers: Numbers) -> None:
    """Gives `state` the canvas that the next step denoises, its self-conditioning, and what of the
    canvas it computes."""
    if state.active is not None:
        active_steps.advance(state, state.active, outcome.seen, numbers)
    state.signal = self_conditioning.signal(model, outcome.seen, state, outcome.survivors, numbers)
    free = numbers.entropy[~state.pinned.reshape(-1)]
    state.least_entropy = float(free.min(initial=np.inf))
    state.canvas, state.revealed = outcome.decision.canvas, outcome.decision.revealed
    state.draft, state.settled = outcome.seen.draft, outcome.settled
    counts = outcome.seen.computed.sum(axis=1).tolist()
    state.computed = [(*some, n) for some, n in zip(state.computed, counts, strict=True)]
    state.begun = None
    state.taken, state.remaining = state.taken + 1, state.remaining - 1


def _converged(
    rules: tuple[StableAndConfident, AllAccepted],
    state: CanvasState,
    outcome: Outcome,
    numbers: Numbers,
    settings: DecodingSettings,
) -> np.ndarray:
    """bool [b]: which rows are done by either rule; `state` counts this step's repeated drafts."""
    stable, accepted = rules
    state.repeats = stable.count(state.repeats, numbers.repeated)
    converged = stable(state.repeats, numbers.mean_entropy)
    fallen = None if state.active is None else state.active.fallen
    converged |= accepted(numbers.complete, numbers.mean_entropy, fallen)
    if state.active is not None:
        converged &= ~active_steps.hold_back(state, outcome.seen, numbers, converged, settings)
    return converged


def _begin(model: Model, cache: ContextCache, state: CanvasState) -> None:
    """Sends the first layers of the step that comes next."""
    state.begun = model.begin(state.canvas, cache, state.signal, held=state.held)
    if state.active is not None:
        mx.async_eval(state.active.kept)


def _step_input(model: Model, state: CanvasState, seen: Prediction) -> StepInput:
    length, vocab_size = state.canvas.shape[1], model.config.text.vocab_size
    sources = zip(state.requests, state.places, strict=True)
    return StepInput(
        canvas=state.canvas,
        entropy=seen.entropy,
        draft=seen.draft,
        sample=seen.sample,
        sample_probability=seen.sample_probability(),
        fresh=mx.stack([one.draws.renoise(place, length, vocab_size) for one, place in sources]),
        previous_draft=state.draft,
        outside=active_steps.outside(state),
        revealed=state.revealed,
    )


def _check_finite(numbers: Numbers, state: CanvasState) -> None:
    if numbers.finite.all():
        return
    place = state.places[int(numbers.finite.argmin())]
    raise NumericsError(
        f"The network's logits are not finite at block {place.block}, denoising step {place.step}: "
        "the weights are damaged or the precision is too low; check the weights with "
        "`mlx_dgemma.convert verify`, or compute in another dtype."
    )
