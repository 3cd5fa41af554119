"""From a text with holes to filled texts: one canvas if all fits, else one after another.

What stands before the first hole goes into the context as far as the canvas has no room for
it. Holes that do not fit on the canvas wait: what is filled is committed, and the next canvas
begins behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas import CanvasRequest, Start
from mlx_dgemma.decoding.denoise import BlockResult, denoise_block
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.filling.lengths import (
    FINALISTS,
    LENGTHS,
    alike,
    belief,
    following,
    roomy,
    spread,
    suits,
    without_pads,
)
from mlx_dgemma.filling.reading import read_filling
from mlx_dgemma.filling.results import Filling, Infill
from mlx_dgemma.filling.template import Layout, Template
from mlx_dgemma.model import ContextCache, ImagePatches, Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.prompt.holes import Hole

# Canvases denoised side by side; bounds the logits to this many times [C, V].
BATCH = 8
# Work that pauses behind each batch of canvases, saying how many decoder passes there were so far.
T = TypeVar("T")
Turns = Generator[int, None, T]
# How a hole finds its length: candidates are tried, or the network ends it with pads.
LengthChoice = Literal["try", "pad"]


@dataclass(frozen=True)
class Job:
    """One text to fill. literals: the pieces around the holes, one more than holes.

    old: what each hole held before, if it is an edit. strength: how much of it to give up.
    images: one per run of image placeholders in the prompt. lengths: how a hole finds its own.
    """

    model: Model
    tokenizer: Tokenizer
    settings: DecodingSettings
    prompt: Sequence[int]
    literals: tuple[str, ...]
    holes: tuple[Hole, ...]
    final: bool = True
    cancel: threading.Event | None = None
    old: tuple[str, ...] = ()
    strength: float = 1.0
    images: Sequence[ImagePatches] = ()
    lengths: LengthChoice = "try"


@dataclass(frozen=True)
class _Window:
    """What one canvas takes on: `count` holes from `first`.

    skip: tokens of the literal before them that go into the context.
    """

    first: int
    count: int
    skip: int


@dataclass(frozen=True)
class _Filled:
    """A denoised canvas."""

    template: Template
    result: BlockResult

    @property
    def score(self) -> float:
        """Mean log-probability (nats) of the filled tokens."""
        assert self.result.logprobs is not None
        filled = [self.result.logprobs[slot.start : slot.end] for slot in self.template.slots]
        return float(np.concatenate(filled).mean())


class Filler:
    """Fills the holes of one job; `forwards` counts decoder passes, a row of a batch each."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model, self.tokenizer = job.model, job.tokenizer
        self.limit = job.model.config.canvas_length
        self.vocabulary = job.model.config.text.vocab_size
        self.pad = self._pad()
        self.layout = Layout(job.tokenizer, job.literals, job.holes, right=self.pad is None)
        self.old = self._old_ids()
        self.ranges = [self._possible(hole) for hole in range(len(job.holes))]
        self.forwards = 0

    def fill(self, seeds: Sequence[int]) -> Turns[list[Infill]]:
        """One Infill per seed; the prompt and what the first canvas needs are read once."""
        cache = self.model.make_cache(self.job.settings.kv_bits)
        prompt = mx.array(list(self.job.prompt))[None]
        self.model.prefill(prompt, cache, images=self.job.images)
        window = self._window(0)
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
                following = self._window(done)
                self._enter(cache, following)
                filled = yield from self._choose_lengths(cache, following, seed)
                chain.append((following, filled))
            results.append(self._assemble(chain, seed))
        return results

    # Planning

    def _pad(self) -> int | None:
        """The id that ends a hole early, if that is how holes find their length."""
        restricted = any(hole.choices or hole.alphabet is not None for hole in self.job.holes)
        if self.job.lengths == "try" or restricted:
            return None
        return self.tokenizer.ids.get("pad", self.model.config.generation.pad_token_id)

    def _old_ids(self) -> list[list[int]]:
        """What each hole held, with the edges it took over, as ids."""
        edges = zip(self.layout.before, self.job.old, self.layout.after, strict=False)
        return [self.tokenizer.encode(before + old + after) for before, old, after in edges]

    def _lengths(self, hole: int) -> list[int]:
        """The numbers of tokens to try in a hole."""
        asked, least = self.job.holes[hole], self.layout.least(hole)
        joined = self.layout.joined(hole)
        if asked.choices:
            return self._choice_lengths(hole)
        if asked.low is not None and asked.high is not None:
            if asked.low > self.limit:
                raise InputError(
                    f"A hole of {asked.low} tokens is longer than the canvas of {self.limit}: "
                    "make it shorter."
                )
            return spread(max(asked.low, least), max(min(asked.high + joined, self.limit), least))
        if self.old:
            count = len(self.old[hole])
            if count > self.limit:
                raise InputError(
                    f"A span of {count} tokens is longer than the canvas of {self.limit}: split it."
                )
            if self.job.strength < 1:
                return [count]
            return spread(max(count - 2, least), min(count + 2, self.limit))
        most = max(self.limit // 2, least)
        return [length for length in LENGTHS if least <= length <= most]

    def _possible(self, hole: int) -> list[int]:
        """The lengths to try, without those for which the vocabulary has no tokens."""
        lengths = self._lengths(hole)
        if self.job.holes[hole].alphabet is None:
            return lengths
        return [length for length in lengths if self.layout.possible(hole, length)] or lengths

    def _choice_lengths(self, hole: int) -> list[int]:
        lengths = sorted({len(ids) for ids in self.layout.choices[hole]})
        if lengths[-1] > self.limit:
            raise InputError(
                f"A choice of {lengths[-1]} tokens is longer than the canvas of {self.limit}: "
                "make it shorter."
            )
        return lengths

    def _window(self, first: int) -> _Window:
        """As many holes as fit at their longest; then as much of both sides as there is room."""
        used, count = self.ranges[first][-1], 1
        while first + count < len(self.ranges):
            more = len(self.layout.literals[first + count]) + self.ranges[first + count][-1]
            if used + more > self.limit:
                break
            used, count = used + more, count + 1
        last = first + count == len(self.ranges)
        behind = len(self.layout.literals[first + count]) + (1 if last and self.job.final else 0)
        before = len(self.layout.literals[first])
        room = max(self.limit - used - behind, 0)
        return _Window(first, count, max(before - room, 0))

    def _template(self, window: _Window, lengths: Sequence[int]) -> Template:
        ids = self.tokenizer.ids
        final = self.job.final
        return self.layout.template(
            window.first,
            lengths,
            skip=window.skip,
            limit=self.limit,
            tail=[ids.get("eot", min(self.tokenizer.stop_ids))] if final else [],
            filler=ids.get("eos") if final else None,
        )

    # Running

    def _enter(self, cache: ContextCache, window: _Window) -> None:
        skipped = self.layout.literals[window.first][: window.skip]
        if skipped:
            self.model.prefill(mx.array(skipped)[None], cache)

    def _leave(self, cache: ContextCache, window: _Window, filled: _Filled) -> None:
        """Commits a canvas up to the end of its last hole."""
        end = filled.template.slots[-1].end
        self.model.prefill(mx.array(filled.result.ids[:end])[None], cache)

    def _choose_lengths(self, cache: ContextCache, window: _Window, seed: int) -> Turns[_Filled]:
        """Tries the lengths of one hole after the other, the others as they are."""
        ranges = self.ranges[window.first : window.first + window.count]
        if self.pad is not None and any(len(choices) > 1 for choices in ranges):
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
        self, cache: ContextCache, window: _Window, ranges: Sequence[list[int]], seed: int
    ) -> Turns[_Filled | None]:
        """Holes with room to spare, ended by the network with pads; None if none suits."""
        assert self.pad is not None
        widths = [roomy(choices) for choices in ranges]
        most = max(map(len, widths))
        tries = [[width[min(row, len(width) - 1)] for width in widths] for row in range(most)]
        rows = [(option, seed) for option in tries]
        roomy_ones = yield from self._denoise(cache, window, rows, pad=self.pad)
        filled = [_Filled(*without_pads(one.template, one.result, self.pad)) for one in roomy_ones]
        suiting = [one for one in filled if suits(one.template, ranges)]
        if not suiting:
            return None
        return (yield from self._best_followed(cache, window, suiting, 0, seed))

    def _promising(
        self, cache: ContextCache, window: _Window, tries: list[list[int]], hole: int, seed: int
    ) -> Turns[list[list[int]]]:
        """Of many lengths of a hole the few worth filling, by one look at each with noise in it."""
        templates = [self._template(window, lengths) for lengths in tries]
        whole = [row for row, template in enumerate(templates) if not template.unseen]
        if whole:  # what pushes no text off the canvas
            tries, templates = [tries[row] for row in whole], [templates[row] for row in whole]
        if len(tries) <= FINALISTS:
            return tries
        looks = []
        for template in templates:
            length = template.length(self.limit)
            request = self._request(window, template, seed)
            noisy = request.initial(Place(window.first, 0, 0), length, self.vocabulary)
            looks.append((np.array(noisy), np.array(noisy), following(template, hole, length)))
        beliefs = yield from self._beliefs(cache, looks)
        best = sorted(range(len(tries)), key=lambda row: -beliefs[row])[:FINALISTS]
        return [tries[row] for row in sorted(best)]

    def _best_followed(
        self,
        cache: ContextCache,
        window: _Window,
        filled: Sequence[_Filled],
        hole: int,
        seed: int,
    ) -> Turns[_Filled]:
        """The filling after which the known text behind the hole is most probable."""
        if len(filled) == 1:
            return filled[0]
        looks = []
        for one in filled:
            ids = one.result.ids
            hidden = following(one.template, hole, len(ids))
            noise = SeededDraws(seed).canvas(Place(window.first, 1, 0), len(ids), self.vocabulary)
            looks.append((np.where(hidden, np.array(noise), ids), ids, hidden))
        beliefs = yield from self._beliefs(cache, looks)
        return filled[int(np.argmax(beliefs))]

    def _beliefs(
        self, cache: ContextCache, looks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
    ) -> Turns[list[float]]:
        """`belief` of (canvas, expected ids, counted positions), in batches."""
        found: dict[int, float] = {}
        for batch in alike([len(look[0]) for look in looks], BATCH):
            columns = zip(*(looks[row] for row in batch), strict=True)
            values = belief(self.model, cache, self.job.settings, *columns)
            found.update(zip(batch, values, strict=True))
            self.forwards += len(batch)
            yield self.forwards
        return [found[row] for row in range(len(looks))]

    def _denoise(
        self,
        cache: ContextCache,
        window: _Window,
        rows: Sequence[tuple[Sequence[int], int]],
        *,
        pad: int | None = None,
    ) -> Turns[list[_Filled]]:
        """Denoises (lengths, seed) rows side by side, those of one canvas length together.

        pad: a control token that the holes may take all the same.
        """
        templates = [self._template(window, lengths) for lengths, _ in rows]
        filled: dict[int, _Filled] = {}
        for batch in alike([template.length(self.limit) for template in templates], BATCH):
            requests = [self._request(window, templates[row], rows[row][1]) for row in batch]
            length = templates[batch[0]].length(self.limit)
            results = self._run(cache, window, requests, length, pad)
            for row, result in zip(batch, results, strict=True):
                filled[row] = _Filled(templates[row], result)
            yield self.forwards
        return [filled[row] for row in range(len(rows))]

    def _request(self, window: _Window, template: Template, seed: int) -> CanvasRequest:
        start = None
        if self.job.strength < 1:
            ids = np.array(template.pins(self.limit).ids)
            for hole, slot in enumerate(template.slots, start=window.first):
                ids[slot.start : slot.end] = self.old[hole]
            start = Start(ids, self.job.strength)
        return CanvasRequest(SeededDraws(seed), template.pins(self.limit), start, template.allowed)

    def _run(
        self,
        cache: ContextCache,
        window: _Window,
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
            logprobs=True,
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

    def _assemble(self, chain: Sequence[tuple[_Window, _Filled]], seed: int) -> Infill:
        text = self.job.literals[0]
        fillings: list[Filling] = []
        for window, filled in chain:
            for hole, slot in enumerate(filled.template.slots, start=window.first):
                edges = self.layout.before[hole], self.layout.after[hole]
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
