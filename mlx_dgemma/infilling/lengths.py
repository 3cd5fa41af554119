"""How long a hole should be: the length at which what follows the hole follows.

A denoiser predicts every position of the canvas it is shown, those that are known among them. Where
a hole is too short or too long, the known text after it stands where it does not belong and looks
to it like noise. So one decoder pass with noise in the hole ranks all lengths, and the best is
filled. Filling four and choosing then costs three times as much and is right no more often.
A few lengths are all filled, and one pass decides that is shown the filling but noise after it:
how probable is the text that was hidden? What the filled tokens' own probabilities say is worth
less: a network that has talked itself into a filling is sure of it (studies/README.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.infilling.template import Slot, Template
from mlx_dgemma.model import ContextCache, Model
from mlx_dgemma.model.scores import Scores, scores

# Lengths tried for a hole whose length is left to the model; never more than the canvas holds.
LENGTHS = (*range(1, 13), 14, 16, 20, 24, 32)
# So many lengths are all filled and the fillings compared; of more, the FINALISTS best are filled.
FEW = 4
FINALISTS = 1
# A network that was trained for it ends a hole that is up to so many tokens too long with pads.
SPARE = 6


def spread(low: int, high: int) -> list[int]:
    """Every length from low to high, or those of LENGTHS among them when that is many."""
    if high - low < len(LENGTHS):
        return list(range(low, high + 1))
    return [low, *(length for length in LENGTHS if low < length < high), high]


def roomy(lengths: Sequence[int]) -> list[int]:
    """The fewest lengths that cover all of `lengths` with at most SPARE to spare."""
    low, high = lengths[0], lengths[-1]
    return [*range(low + SPARE, high, SPARE), high]


def equal_lengths(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of equal canvas lengths together, at most `most` at a time."""
    for length in sorted(set(lengths)):
        rows = [row for row, found in enumerate(lengths) if found == length]
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def following(template: Template, hole: int, length: int) -> np.ndarray:
    """bool [length]: the known text after a hole, the stop id included; all of it if none is."""
    known = np.zeros(length, dtype=bool)
    known[: len(template.ids)] = [token is not None for token in template.ids]
    after = known & (np.arange(length) >= template.slots[hole].end)
    return after if after.any() else known


def mean_logprob(
    model: Model,
    cache: ContextCache,
    canvases: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    counted: Sequence[np.ndarray],
) -> list[float]:
    """Mean log-probability (nats) of the tokens expected on a canvas; one decoder pass for each.

    canvases: int32 [C] each, of one length, as they are shown to the network. expected: int32 [C].
    counted: bool [C], the positions that count; where none does, all lengths score the same: 0.
    """
    ids = mx.array(np.stack(canvases).astype(np.int32))
    tokens = mx.array(np.stack(expected).astype(np.int32))
    rows = np.flatnonzero(np.stack(counted))
    if not rows.size:
        return [0.0] * len(canvases)
    hidden, chosen = model.hidden(ids, cache), mx.array(rows)
    hidden = hidden.reshape(-1, hidden.shape[-1])[chosen]
    logprobs = scores(model, hidden, tokens.reshape(-1)[chosen]).logprobs
    found = np.split(logprobs, np.cumsum([mask.sum() for mask in counted])[:-1])
    return [float(row.mean()) if row.size else 0.0 for row in found]


def suits(template: Template, ranges: Sequence[list[int]]) -> bool:
    """Whether every hole is as long as was asked."""
    lengths = [slot.end - slot.start for slot in template.slots]
    pairs = zip(lengths, ranges, strict=True)
    return all(choices[0] <= length <= choices[-1] for length, choices in pairs)


def without_pads(template: Template, result: BlockResult, pad: int) -> tuple[Template, BlockResult]:
    """A denoised canvas with the pads of its holes taken out; what follows moves up."""
    spare = np.zeros(len(result.ids), dtype=bool)
    for slot in template.slots:
        spare[slot.start : slot.end] = result.ids[slot.start : slot.end] == pad
    moved = np.cumsum(spare)
    slots = tuple(
        Slot(
            slot.start - int(moved[slot.start - 1]) if slot.start else 0,
            slot.end - int(moved[slot.end - 1]),
        )
        for slot in template.slots
    )
    ids = tuple(token for token, dropped in zip(template.ids, spare, strict=False) if not dropped)
    compact = replace(template, ids=ids, slots=slots, allowed={})
    fill = 0 if template.filler is None else int(spare.sum())

    def shifted(values: np.ndarray, filler: int = 0) -> np.ndarray:
        return np.concatenate(
            [values[~spare], np.full((fill, *values.shape[1:]), filler, dtype=values.dtype)]
        )

    return compact, replace(
        result,
        ids=shifted(result.ids, template.filler or 0),
        entropy=shifted(result.entropy),
        settled=shifted(result.settled),
        scores=None if result.scores is None else Scores(*map(shifted, result.scores)),
    )
