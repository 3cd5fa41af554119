"""What stands on which canvas: which holes share one, how long each may be, the text around them.

What stands before the first hole of a canvas goes into the context as far as the canvas has no room
for it. Holes that do not fit wait for the next canvas. Nothing here asks the network.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.errors import InputError
from mlx_dgemma.infilling.lengths import LENGTHS, spread
from mlx_dgemma.infilling.template import Layout, Template
from mlx_dgemma.model import ImagePatches, Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.prompt.holes import Hole

# How a hole finds its length: candidates are tried, or the network ends it with pads.
LengthChoice = Literal["try", "pad"]
MOST_TOGETHER = 8  # canvases denoised side by side where memory allows


@dataclass(frozen=True)
class Job:
    """One text to fill. literals: the pieces around the holes, one more than holes.

    old: what each hole held before, if it is an edit. strength: how much of it to give up.
    images: one per run of image placeholders in the prompt. lengths: how a hole finds its own.
    together: canvases denoised side by side at most; bounds memory to so many times one canvas'.
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
    together: int = MOST_TOGETHER


@dataclass(frozen=True)
class Window:
    """What one canvas takes on: `count` holes from `first`.

    skip: tokens of the literal before them that go into the context.
    """

    first: int
    count: int
    skip: int


class Plan:
    """How one job's holes lie on canvases.

    pad: the id that ends a hole early, or None. layout: literals and holes as ids. old: what each
    hole held, as ids. ranges: the numbers of tokens to try in each hole, ascending.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = job.tokenizer
        self.limit = job.model.config.canvas_length
        self.pad = self._pad()
        self.layout = Layout(
            job.tokenizer,
            job.literals,
            job.holes,
            right=self.pad is None,
            vocabulary=job.model.config.text.vocab_size,
        )
        self.old = self._old_ids()
        self.ranges = [self._possible(hole) for hole in range(len(job.holes))]

    def window(self, first: int) -> Window:
        """As many holes as fit at their longest; then as much of both sides as there is room."""
        used, count = self.ranges[first][-1], 1
        while first + count < len(self.ranges):
            more = len(self.layout.literals[first + count]) + self.ranges[first + count][-1]
            if used + more > self.limit:
                break
            used, count = used + more, count + 1
        last = first + count == len(self.ranges)
        after = len(self.layout.literals[first + count]) + (1 if last and self.job.final else 0)
        before = len(self.layout.literals[first])
        room = max(self.limit - used - after, 0)
        return Window(first, count, max(before - room, 0))

    def template(self, window: Window, lengths: Sequence[int]) -> Template:
        """The canvas of a window whose holes have these lengths."""
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

    def _pad(self) -> int | None:
        """The id that ends a hole early, if that is how holes find their length."""
        restricted = any(hole.constraint is not None for hole in self.job.holes)
        if self.job.lengths == "try" or restricted:
            return None
        return self.tokenizer.ids.get("pad", self.job.model.config.generation.pad_token_id)

    def _old_ids(self) -> list[list[int]]:
        """What each hole held, with the edges it took over, as ids."""
        edges = zip(self.layout.before, self.job.old, self.layout.after, strict=False)
        return [self.tokenizer.encode(before + old + after) for before, old, after in edges]

    def _lengths(self, hole: int) -> list[int]:
        """The numbers of tokens to try in a hole."""
        asked, least = self.job.holes[hole], self.layout.least(hole)
        joined = self.layout.joined(hole)
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
        if hole in self.layout.languages:
            return self._held_lengths(hole, lengths)
        return lengths

    def _held_lengths(self, hole: int, lengths: list[int]) -> list[int]:
        """Those in which a text of the hole's language can be written."""
        asked = self.job.holes[hole]
        found = self.layout.languages[hole].automaton.lengths(self.limit)
        if not found:
            raise InputError(
                f"No text of hole {hole + 1}'s constraint fits the canvas of {self.limit} tokens: "
                "make it shorter."
            )
        common = sorted({*lengths} & {*found})
        if not common and asked.low is not None:
            raise InputError(
                f"No text of hole {hole + 1}'s constraint has {lengths[0]} to {lengths[-1]} "
                f"tokens: it takes {found[0]} to {found[-1]}."
            )
        return common or found[:1]
