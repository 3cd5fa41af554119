"""What filling holes gives back: the text, each filling, and how sure the network was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp

Span = tuple[int, int]


@dataclass(frozen=True)
class TokenInfo:
    """One token of a filling or reply.

    span: its characters (start, end) in the text. logprob: nats, under the last step's
    untempered logits. entropy: nats, of the last step's tempered distribution. settled: the
    denoising step that last changed it.
    """

    text: str
    span: Span
    logprob: float
    entropy: float
    settled: int


@dataclass(frozen=True)
class Filling:
    """What stands in one hole.

    span: its characters in the text. length: tokens on the canvas. replaced: what stood there
    before an edit.
    """

    text: str
    span: Span
    length: int
    tokens: tuple[TokenInfo, ...]
    replaced: str = ""


@dataclass(frozen=True)
class Infill:
    """A text with its holes filled.

    text: literals exactly as they were given, fillings between them.
    score: mean log-probability (nats) per filled token; alternatives are sorted by it.
    seed, steps, converged: of the canvas this came from; with several canvases, the sum of
        the steps and whether all converged.
    forwards: decoder passes spent on the request, candidates for the length included.
    unseen: tokens of right context that did not fit on the canvas of some hole.
    """

    text: str
    fillings: tuple[Filling, ...]
    score: float
    seed: int
    steps: int
    converged: bool
    forwards: int
    unseen: int = 0
    alternatives: tuple[Infill, ...] = ()

    @property
    def tokens(self) -> tuple[TokenInfo, ...]:
        """Every filled token, in order."""
        return tuple(token for filling in self.fillings for token in filling.tokens)


def uncertain_spans(tokens: Iterable[TokenInfo], *, min_probability: float = 0.5) -> list[Span]:
    """Spans of neighbouring tokens whose probability is below the threshold, in order."""
    spans: list[Span] = []
    for token in tokens:
        if exp(token.logprob) >= min_probability or token.span[0] == token.span[1]:
            continue
        if spans and spans[-1][1] >= token.span[0]:
            spans[-1] = (spans[-1][0], token.span[1])
        else:
            spans.append(token.span)
    return spans
