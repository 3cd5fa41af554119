"""From a text with holes to filled texts: one canvas if all fits, else one after another.

What stands on which canvas is the plan's (see planning). What is filled is committed, and the next
canvas begins after it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.decoding.canvas import CanvasRequest, Start
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.errors import CancelledError
from mlx_dgemma.infilling.filled import Filling, Infill
from mlx_dgemma.infilling.lengths import (
    FEW,
    FINALISTS,
    equal_lengths,
    following,
    mean_logprob,
    roomy,
    suits,
    without_pads,
)
from mlx_dgemma.infilling.planning import Job, Plan, Window
from mlx_dgemma.infilling.reading import read_filling
from mlx_dgemma.infilling.template import Template
from mlx_dgemma.model import ContextCache

# Work that pauses after each batch of canvases and yields the decoder passes so far.
T = TypeVar("T")
Turns = Generator[int, None, T]


@dataclass(frozen=True)
class _Filled:
    """A denoised canvas."""

    template: Template
    result: BlockResult

    @property
    def score(self) -> float:
        """Mean log-probability (nats) of the filled tokens."""
        assert self.result.scores is not None
        filled = [
            self.result.scores.logprobs[slot.start : slot.end] for slot in self.template.slots
        ]
        return float(np.concatenate(filled).mean())


class Filler:
    """Fills the holes of one job; `forwards` counts decoder passes, a row of a batch each."""

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, Plan(job)
        self.model, self.tokenizer = job.model, job.tokenizer
        self.vocabulary = job.model.config.text.vocab_size
        self.forwards = 0

    def fill(self, seeds: Sequence[int]) -> Turns[list[Infill]]:
        """One Infill per seed; the prompt and what the first canvas needs are read once."""
        cache = self.model.make_cache(self.job.settings.kv_bits)
        self.model.prefill(np.array(self.job.prompt)[None], cache, images=self.job.images)
        window = self.plan.window(0)
        self._enter(cache, window)
        start = cache.snapshot()
        first = yield from self._choose_lengths(cache, window, seeds[0])
        lengths = [slot.end - slot.start for slot in first.template.slots]
        others = yield from self._denoise(cache, window, [(lengths, seed) for seed in seeds[1:]])
        drafts = [(window, filled) for filled in [first, *others]]
        results = []
        for seed, (_, filled) in zip(seeds, drafts, strict=True):
            cache.restore(start)
            chain = [(window, filled)]
            while (done := chain[-1][0].first + chain[-1][0].count) < len(self.job.holes):
                self._leave(cache, *chain[-1])
                following = self.plan.window(done)
                self._enter(cache, following)
                filled = yield from self._choose_lengths(cache, following, seed)
                chain.append((following, filled))
            results.append(self._assemble(chain, seed))
        return results

    def _enter(self, cache: ContextCache, window: Window) -> None:
        skipped = self.plan.layout.literals[window.first][: window.skip]
        if skipped:
            self.model.prefill(np.array(skipped)[None], cache)

    def _leave(self, cache: ContextCache, window: Window, filled: _Filled) -> None:
        """Commits a canvas up to the end of its last hole."""
        end = filled.template.slots[-1].end
        self.model.prefill(filled.result.ids[None, :end], cache)

    def _choose_lengths(self, cache: ContextCache, window: Window, seed: int) -> Turns[_Filled]:
        """Tries the lengths of one hole after the other, the others as they are."""
        ranges = self.plan.ranges[window.first : window.first + window.count]
        if self.plan.pad is not None and any(len(choices) > 1 for choices in ranges):
            found = yield from self._end_early(cache, window, ranges, seed)
            if found is not None:
                return found
        lengths = [choices[min(2, len(choices) - 1)] for choices in ranges]
        best: _Filled | None = None
        for hole, choices in enumerate(ranges):
            if len(choices) == 1 and best is not None:
                continue
            tries = [[*lengths[:hole], length, *lengths[hole + 1 :]] for length in choices]
            tries = yield from self._promising(cache, window, tries, hole, seed)
            filled = yield from self._denoise(cache, window, [(option, seed) for option in tries])
            best = yield from self._best_followed(cache, window, filled, hole, seed)
            lengths = [slot.end - slot.start for slot in best.template.slots]
        assert best is not None
        return best

    def _end_early(
        self, cache: ContextCache, window: Window, ranges: Sequence[list[int]], seed: int
    ) -> Turns[_Filled | None]:
        """Holes with room to spare, ended by the network with pads; None if none suits."""
        pad = self.plan.pad
        assert pad is not None
        widths = [roomy(choices) for choices in ranges]
        most = max(map(len, widths))
        tries = [[width[min(row, len(width) - 1)] for width in widths] for row in range(most)]
        rows = [(option, seed) for option in tries]
        roomy_ones = yield from self._denoise(cache, window, rows, pad=pad)
        filled = [_Filled(*without_pads(one.template, one.result, pad)) for one in roomy_ones]
        suiting = [one for one in filled if suits(one.template, ranges)]
        if not suiting:
            return None
        return (yield from self._best_followed(cache, window, suiting, 0, seed))

    def _promising(
        self, cache: ContextCache, window: Window, tries: list[list[int]], hole: int, seed: int
    ) -> Turns[list[list[int]]]:
        """Of many lengths of a hole the few worth filling, by one look at each with noise in it."""
        templates = [self.plan.template(window, lengths) for lengths in tries]
        whole = [row for row, template in enumerate(templates) if not template.unseen]
        if whole:  # what pushes no text off the canvas
            tries, templates = [tries[row] for row in whole], [templates[row] for row in whole]
        if len(tries) <= FEW:
            return tries
        looks = []
        for template in templates:
            length = template.length(self.plan.limit)
            request = self._request(window, template, seed)
            noisy = request.initial(Place(window.first, 0, 0), length, self.vocabulary)
            looks.append((np.array(noisy), np.array(noisy), following(template, hole, length)))
        mean_logprobs = yield from self._mean_logprobs(cache, looks)
        best = sorted(range(len(tries)), key=lambda row: -mean_logprobs[row])[:FINALISTS]
        return [tries[row] for row in sorted(best)]

    def _best_followed(
        self,
        cache: ContextCache,
        window: Window,
        filled: Sequence[_Filled],
        hole: int,
        seed: int,
    ) -> Turns[_Filled]:
        """The filling after which the known text after the hole is most probable."""
        if len(filled) == 1:
            return filled[0]
        looks = []
        for one in filled:
            ids = one.result.ids
            hidden = following(one.template, hole, len(ids))
            noise = SeededDraws(seed).canvas(Place(window.first, 1, 0), len(ids), self.vocabulary)
            looks.append((np.where(hidden, np.array(noise), ids), ids, hidden))
        mean_logprobs = yield from self._mean_logprobs(cache, looks)
        return filled[int(np.argmax(mean_logprobs))]

    def _mean_logprobs(
        self, cache: ContextCache, looks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
    ) -> Turns[list[float]]:
        """`mean_logprob` of (canvas, expected ids, counted positions), in batches."""
        found: dict[int, float] = {}
        for batch in equal_lengths([len(look[0]) for look in looks], self.job.together):
            columns = zip(*(looks[row] for row in batch), strict=True)
            values = mean_logprob(self.model, cache, *columns)
            found.update(zip(batch, values, strict=True))
            self.forwards += len(batch)
            yield self.forwards
        return [found[row] for row in range(len(looks))]

    def _denoise(
        self,
        cache: ContextCache,
        window: Window,
        rows: Sequence[tuple[Sequence[int], int]],
        *,
        pad: int | None = None,
    ) -> Turns[list[_Filled]]:
        """Denoises (lengths, seed) rows side by side, those of one canvas length together.

        pad: a control token that the holes may take all the same.
        """
        templates = [self.plan.template(window, lengths) for lengths, _ in rows]
        filled: dict[int, _Filled] = {}
        for batch in equal_lengths(
            [template.length(self.plan.limit) for template in templates], self.job.together
        ):
            requests = [self._request(window, templates[row], rows[row][1]) for row in batch]
            length = templates[batch[0]].length(self.plan.limit)
            results = self._run(cache, window, requests, length, pad)
            for row, result in zip(batch, results, strict=True):
                filled[row] = _Filled(templates[row], result)
            yield self.forwards
        return [filled[row] for row in range(len(rows))]

    def _request(self, window: Window, template: Template, seed: int) -> CanvasRequest:
        start, pins = None, template.pins(self.plan.limit)
        if self.job.strength < 1:
            ids = np.array(pins.ids)
            for hole, slot in enumerate(template.slots, start=window.first):
                ids[slot.start : slot.end] = self.plan.old[hole]
            start = Start(ids, self.job.strength)
        return CanvasRequest(SeededDraws(seed), pins, start, template.allowed, spans=template.spans)

    def _run(
        self,
        cache: ContextCache,
        window: Window,
        requests: Sequence[CanvasRequest],
        length: int,
        pad: int | None,
    ) -> list[BlockResult]:
        steps = denoise_block(
            self.model,
            cache,
            self.job.settings,
            requests,
            block=window.first,
            length=length,
            alternatives=0,
            banned=sorted(self.tokenizer.control_ids - {pad}),
        )
        while True:
            if self.job.cancel is not None and self.job.cancel.is_set():
                steps.close()
                raise CancelledError("The request was cancelled.")
            try:
                self.forwards += len(next(steps).rows)
            except StopIteration as done:
                results: list[BlockResult] = done.value
                return results

    # Reading the result

    def _assemble(self, chain: Sequence[tuple[Window, _Filled]], seed: int) -> Infill:
        text = self.job.literals[0]
        fillings: list[Filling] = []
        for window, filled in chain:
            for hole, slot in enumerate(filled.template.slots, start=window.first):
                edges = self.plan.layout.before[hole], self.plan.layout.after[hole]
                filling = read_filling(self.tokenizer, edges, slot, filled.result, len(text))
                if self.job.old:
                    filling = replace(filling, replaced=self.job.old[hole])
                fillings.append(filling)
                text += filling.text + self.job.literals[hole + 1]
        logprobs = [token.logprob for filling in fillings for token in filling.tokens]
        return Infill(
            text=text,
            fillings=tuple(fillings),
            score=float(np.mean(logprobs)),
            seed=seed,
            steps=sum(filled.result.steps for _, filled in chain),
            converged=all(filled.result.converged for _, filled in chain),
            forwards=self.forwards,
            unseen=max(filled.template.unseen for _, filled in chain),
        )
