"""Events as a generation yields them, made by hand: fast, and the same every time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlx_dgemma.decoding.events import Draft, Finish

STOP = 0
WORDS = [
    "<stop>",
    "The",
    " fox",
    " jumps",
    " over",
    " the",
    " dog",
    ".",
    "\n",
    " naïve",
    " \x1b[31m",
]


def decode(ids: Iterable[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def draft(
    ids: list[int], accepted: list[bool], entropy: list[float], *, step: int = 1, block: int = 0
) -> Draft:
    return Draft(
        ids=np.array(ids, dtype=np.int32),
        draft_text=decode(i for i in ids if i != STOP),
        accepted=np.array(accepted),
        entropy=np.array(entropy, dtype=np.float32),
        step=step,
        block=block,
    )


def settled(ids: list[int], **place: int) -> Draft:
    return draft(ids, [True] * len(ids), [0.0] * len(ids), **place)


def finish(**changed: object) -> Finish:
    values: dict[str, object] = {
        "reason": "stop",
        "seed": 7,
        "blocks": 2,
        "steps_per_block": (5, 8),
        "converged": (True, True),
        "tokens_per_forward": 3.5,
        "prompt_tokens": 11,
        "generated_tokens": 40,
        "prefill_seconds": 0.25,
        "denoise_seconds": 2.0,
        "peak_memory_bytes": 1_240_000_000,
        **changed,
    }
    return Finish(**values)  # type: ignore[arg-type]
