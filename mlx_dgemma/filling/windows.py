"""From a text with holes to filled texts: one canvas if all fits, else one after another.

What stands before the first hole goes into the context as far as the canvas has no room for
it. Holes that do not fit on the canvas wait: what is filled is committed, and the next canvas
begins behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas import CanvasRequest, Start
from mlx_dgemma.decoding.denoise import BlockResult, denoise_block
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.filling.results import Filling, Infill, TokenInfo
from mlx_dgemma.filling.template import Layout, Slot, Template
from mlx_dgemma.model import ContextCache, Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.prompt.holes import Hole

# Lengths tried for a hole whose length is left to the model; never more than the canvas holds.
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
# Canvases denoised side by side; bounds the logits to this many times [C, V].
BATCH = 8
# Work that pauses behind each batch of canvases, saying how many decoder passes there were so far.
T = TypeVar("T")
Turns = Generator[int, None, T]


@dataclass(frozen=True)
class Job:
    """One text to fill. literals: the pieces around the holes, one more than holes.

    old: what each hole held before, if it is an edit. strength: how much of it to give up.
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
        """Mean log-probability (nats) of the filled tokens: see benchmarks/README.md."""
        assert self.result.logprobs is not None
        filled = [self.result.logprobs[slot.start : slot.end] for slot in self.template.slots]
        return float(np.concatenate(filled).mean())


class Filler:
    """Fills the holes of one job; `forwards` counts decoder passes, a row of a batch each."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model, self.tokenizer = job.model, job.tokenizer
        self.limit = job.model.config.canvas_length
        self.layout = Layout(job.tokenizer, job.literals, job.holes)
        self.old = self._old_ids()
        self.ranges = [self._lengths(hole) for hole in range(len(job.holes))]
        self.forwards = 0

    def fill(self, seeds: Sequence[int]) -> Turns[list[Infill]]:
        """One Infill per seed; the prompt and what the first canvas needs are read once."""
        cache = self.model.make_cache()
        self.model.prefill(mx.array(list(self.job.prompt))[None], cache)
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
            return _spread(max(asked.low, least), max(min(asked.high + joined, self.limit), least))
        if self.old:
            count = len(self.old[hole])
            if count > self.limit:
                raise InputError(
                    f"A span of {count} tokens is longer than the canvas of {self.limit}: split it."
                )
            if self.job.strength < 1:
                return [count]
            return _spread(max(count - 2, least), min(count + 2, self.limit))
        most = max(self.limit // 2, least)
        return [length for length in LENGTHS if least <= length <= most]

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
        lengths = [choices[min(2, len(choices) - 1)] for choices in ranges]
        best: _Filled | None = None
        for hole, choices in enumerate(ranges):
            if len(choices) == 1 and best is not None:
                continue
            tries = [[*lengths[:hole], length, *lengths[hole + 1 :]] for length in choices]
            filled = yield from self._denoise(cache, window, [(option, seed) for option in tries])
            best = max(filled, key=lambda canvas: canvas.score)
            lengths = [slot.end - slot.start for slot in best.template.slots]
        assert best is not None
        return best

    def _denoise(
        self, cache: ContextCache, window: _Window, rows: Sequence[tuple[Sequence[int], int]]
    ) -> Turns[list[_Filled]]:
        """Denoises (lengths, seed) rows side by side, those of one canvas length together."""
        templates = [self._template(window, lengths) for lengths, _ in rows]
        order = sorted(range(len(rows)), key=lambda row: templates[row].length(self.limit))
        filled: dict[int, _Filled] = {}
        while order:
            length = templates[order[0]].length(self.limit)
            batch = [row for row in order if templates[row].length(self.limit) == length][:BATCH]
            order = [row for row in order if row not in batch]
            requests = [self._request(window, templates[row], rows[row][1]) for row in batch]
            results = self._run(cache, window, requests, length)
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
    ) -> list[BlockResult]:
        steps = denoise_block(
            self.model,
            cache,
            self.job.settings,
            requests,
            block=window.first,
            length=length,
            logprobs=True,
            banned=sorted(self.tokenizer.control_ids),
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
                filling = self._filling(hole, slot, filled.result, len(text))
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

    def _filling(self, hole: int, slot: Slot, result: BlockResult, at: int) -> Filling:
        """A hole's text without the literal text its edges took over."""
        ids = result.ids[slot.start : slot.end].tolist()
        detokenizer = self.tokenizer.detokenizer()
        pieces = [detokenizer.feed([token]) for token in ids]
        pieces[-1] += detokenizer.finish()
        whole = "".join(pieces)
        low, high = len(self.layout.before[hole]), len(whole) - len(self.layout.after[hole])
        tokens: list[TokenInfo] = []
        end = 0
        for offset, piece in enumerate(pieces, start=slot.start):
            start, end = end, end + len(piece)
            visible = min(max(start, low), high), min(max(end, low), high)
            assert result.logprobs is not None
            tokens.append(
                TokenInfo(
                    text=whole[visible[0] : visible[1]],
                    span=(at + visible[0] - low, at + visible[1] - low),
                    logprob=float(result.logprobs[offset]),
                    entropy=float(result.entropy[offset]),
                    settled=int(result.settled[offset]),
                )
            )
        text = whole[low:high]
        replaced = self.job.old[hole] if self.job.old else ""
        return Filling(text, (at, at + len(text)), slot.end - slot.start, tuple(tokens), replaced)


def _spread(low: int, high: int) -> list[int]:
    """Every length from low to high, or those of LENGTHS among them when that is many."""
    if high - low < len(LENGTHS):
        return list(range(low, high + 1))
    return [low, *(length for length in LENGTHS if low < length < high), high]
