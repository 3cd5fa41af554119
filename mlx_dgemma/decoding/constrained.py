"""A step's canvases within their languages: between the device's distributions and the sums."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_dgemma.constraints.automaton import WHOLE
from mlx_dgemma.decoding.candidates import Distributions
from mlx_dgemma.decoding.canvas_constraint import Mixture
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.conditioning import Conditioned, condition
from mlx_dgemma.decoding.predicted import Prediction

# Candidates below this probability are left out, beyond the first few of a position.
_LEAST = 1e-4
_ALWAYS = 8
_MOST = 64
_MIXED = 96  # ids of a position's marginal that the signal is summed over


def constrain(seen: Prediction, state: CanvasState, uniforms: mx.array, temp: float) -> Prediction:
    """The prediction with the rows that have a constraint conditioned on it.

    uniforms: float32 [b, C, 2], the draws of the sample. A row whose logits are not finite stays
    as it is, for the check of the step.
    """
    lines = [n for n, request in enumerate(state.requests) if request.held]
    if not lines:
        return seen
    mx.eval(seen.entropy, seen.draft, seen.sample)
    found = {
        line: one
        for line in lines
        if (one := _condition(seen, state, line, uniforms, temp)) is not None
    }
    if not found:
        return seen
    certainty = {line: one.certainty for line, one in found.items()}
    return replace(
        seen,
        draft=_laid_over(seen.draft, {line: one.draft for line, one in found.items()}),
        sample=_laid_over(seen.sample, {line: one.sample for line, one in found.items()}),
        entropy=_laid_over(seen.entropy, {line: one.entropy for line, one in found.items()}),
        certainty=certainty,
        mixture=_mixture(seen, found),
    )


def _begun(seen: Prediction, state: CanvasState, line: int, opener: int) -> int | None:
    """The position where the draft opens what is held to a language, a call of a tool in free
    text; None where it opens nothing, and the text needs no conditioning yet."""
    constraint = state.requests[line].constraint
    assert constraint is not None
    vocabulary = constraint.language.automaton.vocabulary
    draft = np.array(seen.draft)[line]
    stops = np.flatnonzero(vocabulary.is_stop[draft])
    end = stops[0] if stops.size else draft.size
    opened = np.flatnonzero(draft[:end] == opener)
    return int(opened[0]) if opened.size else None


def _condition(
    seen: Prediction, state: CanvasState, line: int, uniforms: mx.array, temp: float
) -> Conditioned | None:
    """None where the row stays as it is."""
    request = state.requests[line]
    constraint = request.constraint
    if constraint is None:
        return _condition_spans(seen, state, line, uniforms, temp)
    opener, begun = constraint.opener, None
    if opener is not None and (begun := _begun(seen, state, line, opener)) is None:
        return None
    entropy = np.array(seen.entropy)[line]
    if not np.isfinite(entropy).all():
        return None
    automaton = constraint.language.automaton
    length = entropy.size
    known, certain = np.zeros(length, dtype=np.int32), np.zeros(length, dtype=bool)
    if state.pins is not None:
        known, certain = (np.array(part)[line] for part in state.pins)
    if begun is not None and opener is not None:  # what the model has begun, it goes through with
        known[begun], certain[begun] = opener, True
    view = _View(seen, line, (known, certain) if certain.any() else None)
    return condition(
        automaton,
        view.distributions(automaton.vocabulary.size, slice(0, length)),
        start=constraint.state,
        uniforms=np.array(uniforms)[line, :, 0].astype(np.float64),
        ends_by=constraint.ends_by(length),
        room=constraint.left - length,
        temp=temp,
    )


def _condition_spans(
    seen: Prediction, state: CanvasState, line: int, uniforms: mx.array, temp: float
) -> Conditioned | None:
    """Every span by itself; the rest of the row stays the network's."""
    if not np.isfinite(np.array(seen.entropy)[line]).all():
        return None
    view, draws = _View(seen, line, None), np.array(uniforms)[line, :, 0].astype(np.float64)
    found = []
    for span in state.requests[line].spans:
        automaton, places = span.language.automaton, slice(span.start, span.end)
        part = view.distributions(automaton.vocabulary.size, places)
        one = condition(
            automaton, part, start=automaton.start, uniforms=draws[places], temp=temp, whole=True
        )
        found.append((places, one))
    length = seen.draft.shape[1]
    width = max(one.ids.shape[1] for _, one in found)
    row = Conditioned(
        draft=np.array(seen.draft)[line],
        sample=np.array(seen.sample)[line],
        entropy=np.array(seen.entropy)[line],
        certainty=np.full(length, np.nan, dtype=np.float32),
        plain=np.ones(length, dtype=np.float32),
        ids=np.zeros((length, width), dtype=np.int32),
        weights=np.zeros((length, width), dtype=np.float32),
        feasible=all(one.feasible for _, one in found),
        left_out=max(one.left_out for _, one in found),
    )
    for places, one in found:
        for name in ("draft", "sample", "entropy", "certainty", "plain"):
            getattr(row, name)[places] = getattr(one, name)
        row.ids[places, : one.ids.shape[1]] = one.ids
        row.weights[places, : one.ids.shape[1]] = one.weights
    return row


class _View:
    """The distributions of one row, as the host reads them; pinned positions are certain."""

    def __init__(self, seen: Prediction, line: int, pinned: tuple[np.ndarray, ...] | None) -> None:
        length = seen.draft.shape[1]
        self._seen, self._line = seen, line
        self._rows = slice(line * length, (line + 1) * length)
        self._pinned = pinned

    def distributions(self, size: int, places: slice) -> Distributions:
        """Of some canvas positions."""
        ids, probabilities = self.candidates(size)
        entropy, draft, sample = (
            np.array(of)[self._line, places]
            for of in (self._seen.entropy, self._seen.draft, self._seen.sample)
        )
        return Distributions(
            ids[places],
            probabilities[places],
            lambda some: self.probabilities(some)[places],
            entropy,
            draft,
            sample,
            whole=size <= WHOLE,
        )

    def candidates(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [C, K] ids and float64 [C, K] probabilities, ascending."""
        if size <= WHOLE:
            p = self.probabilities(np.arange(size))
            ids = p.argsort(axis=1)
            return ids, np.take_along_axis(p, ids, 1)
        found, raw = self._seen.logits.candidates(self._rows)
        logits = np.array(raw.astype(mx.float32))
        likely = logits.argsort(axis=1)[:, -_MOST:]
        ids = np.take_along_axis(np.array(found, dtype=np.int64), likely, 1)
        p = self._tempered(mx.array(np.take_along_axis(logits, likely, 1)))
        count = min(max(int((p >= _LEAST).sum(axis=1).max()), _ALWAYS), _MOST)
        ids, p = ids[:, -count:], p[:, -count:]
        p[p < _LEAST] = 0
        p[:, -_ALWAYS:] = np.maximum(p[:, -_ALWAYS:], 1e-300)
        return self._with_pins(ids, p)

    def _with_pins(self, ids: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._pinned is not None:
            known, mask = self._pinned
            p[mask] = 0
            ids[mask, -1], p[mask, -1] = known[mask], 1
        return ids, p

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """float64 [C, n] of the same ids everywhere."""
        p = self._tempered(self._seen.logits.columns(self._rows, mx.array(ids)))
        if self._pinned is not None:
            known, mask = self._pinned
            p[mask] = (ids[None] == known[mask][:, None]).astype(float)
        return p

    def _tempered(self, raw: mx.array) -> np.ndarray:
        seen, rows = self._seen, self._rows
        divisor = seen.temperature
        if isinstance(divisor, mx.array):
            divisor = divisor[rows][:, None]
        capped = seen.model.softcap(raw.astype(mx.float32))
        log_p = capped / divisor - seen.stats.log_z[rows][:, None]
        return np.exp(np.array(log_p, dtype=np.float64))


def _laid_over(array: mx.array, lines: dict[int, np.ndarray]) -> mx.array:
    whole = np.array(array)
    for line, values in lines.items():
        whole[line] = values
    return mx.array(whole)


def _mixture(seen: Prediction, found: dict[int, Conditioned]) -> Mixture | None:
    """None where every position keeps the network's distribution."""
    if all((one.plain == 1).all() and not one.weights.any() for one in found.values()):
        return None
    count = min(max(one.ids.shape[1] for one in found.values()), _MIXED)
    batch, length = seen.draft.shape
    plain = np.ones((batch, length), dtype=np.float32)
    ids = np.zeros((batch, length, count), dtype=np.int32)
    weights = np.zeros((batch, length, count), dtype=np.float32)
    for line, one in found.items():
        plain[line], own, own_ids = one.plain, one.weights, one.ids
        if own.shape[1] > count:
            most = np.argpartition(-np.abs(own), count, axis=1)[:, :count]
            own, own_ids = np.take_along_axis(own, most, 1), np.take_along_axis(own_ids, most, 1)
        ids[line, :, : own.shape[1]], weights[line, :, : own.shape[1]] = own_ids, own
    return Mixture(mx.array(plain), mx.array(ids), mx.array(weights))
