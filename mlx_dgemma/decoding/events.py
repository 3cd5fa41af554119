"""What a generation yields: frozen records of plain Python and NumPy values.

A display, a server and a command all consume the same events; nothing here knows about a
terminal, a socket or MLX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlx_dgemma.model.scores import Scores

FinishReason = Literal["stop", "length", "cancelled", "unconverged"]


Alternatives = tuple[tuple[int, float], ...]  # (id, log-probability in nats), the likeliest first


@dataclass(frozen=True)
class Draft:
    """The canvas after one denoising step; it may still change.

    ids: int32 [C], the argmax of every canvas position.
    draft_text: `ids` up to their first stop id as text, markers removed.
    accepted: bool [C], the positions that kept their sample for the next step.
    entropy: float32 [C], nats, of the tempered distribution at every position.
    step: 1 for the block's first step.
    block: 0 for the request's first canvas.
    """

    ids: np.ndarray
    draft_text: str
    accepted: np.ndarray
    entropy: np.ndarray
    step: int
    block: int

    @property
    def text(self) -> str:
        """Empty: a draft adds nothing to the answer."""
        return ""


@dataclass(frozen=True)
class Commit:
    """A finished block: its ids will not change again.

    ids: the committed token ids, without the stop id.
    text: what they add to the answer; characters cut by the block's edge arrive with the next.
    block: 0 for the request's first canvas.
    thinking: what they add to the thought channel, which is no part of the answer.
    tool_calls: calls completed by this block, {"name": str, "arguments": dict} each.
    malformed_calls: calls that could not be parsed; their text is part of `text` as well.
    cut_call: what was written of a call the reply ended inside; neither a call nor text.
    logprobs: per id, the log-probability (nats) under the last step's untempered logits.
    alternatives: per id, the likeliest ids there and their log-probabilities, the likeliest first.
    entropies: per id, the entropy (nats) of the last step's tempered distribution.
    settled: per id, the denoising step (1 is the block's first) that last changed it.
    """

    ids: tuple[int, ...]
    text: str
    block: int
    thinking: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    malformed_calls: tuple[str, ...] = ()
    cut_call: str = ""
    logprobs: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()
    entropies: tuple[float, ...] = ()
    settled: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of a request, and what it cost.

    reason: "stop" (a stop id or stop string), "length" (max_tokens or the context is full),
        "cancelled", or "unconverged" (refused by `on_unconverged="refuse"`).
    seed: repeats this generation on the same build and device.
    blocks: canvases denoised. steps_per_block, converged: one entry per block.
    tokens_per_forward: committed tokens per decoder pass.
    prompt_tokens: of the whole prompt, with what a PromptCache already held.
    prefill_seconds: reading the prompt. denoise_seconds: denoising and committing; wall time.
    peak_memory_bytes: MLX's peak for the request, or for all that take turns in a Runtime.
    fell_back: one entry per block, whether one of which not all was computed was left to the
        reference. computed: one entry per decoder pass, the canvas positions that it computed.
    stop_string: the stop string that ended the answer, if one did.
    """

    reason: FinishReason
    seed: int
    blocks: int
    steps_per_block: tuple[int, ...]
    converged: tuple[bool, ...]
    tokens_per_forward: float
    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    denoise_seconds: float
    peak_memory_bytes: int
    stop_string: str | None = None
    fell_back: tuple[bool, ...] = ()
    computed: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Empty: everything was committed before."""
        return ""


Event = Draft | Commit | Finish


def listed(scored: Scores, count: int) -> tuple[Alternatives, ...]:
    """The alternatives at the first `count` places, as a Commit holds them."""
    places = zip(scored.top_ids[:count].tolist(), scored.top_logprobs[:count].tolist(), strict=True)
    return tuple(tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in places)
