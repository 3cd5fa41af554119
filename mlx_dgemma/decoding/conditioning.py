"""Independent distributions, one per canvas position, conditioned on a regular language.

    forward   a[0](start) = 1,  a[i+1](t) = sum of a[i](s) p[i](v) over s, v with d(s, v) = t
    backward  b[C](s) = 1 where the text may stand so at the canvas's end,
              b[i](s) = sum over v of p[i](v) b[i+1](d(s, v))
    marginal  r[i](v) ~ p[i](v) sum over s of a[i](s) b[i+1](d(s, v))

The draft is the most probable text of the language (the same recursion with max for sum), the
sample one draw of a whole text (forward, each id by p times the backward message after it).

Sums run over candidates per position. What they leave out counts as an ordinary word where the
text is open, so that it keeps its probability; numbers are scaled per position and stay finite.
Source: forward filtering, backward sampling, as for hidden Markov models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.automaton import DEAD, END, Automaton

# States kept per position: the most probable, and those nearest to an end of the text.
MOST_STATES = 32
_NEAREST = 8
_SURELY_ENDED = 1 - 1e-9
_TINY = 1e-280
_FLOOR = 1e-30  # of a legal id, relative to the most probable legal one

# float64 [C, n]: probabilities of some ids at every position.
Gather = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Distributions:
    """What the network says of one canvas.

    ids: int64 [C, K] candidates, in any order. probabilities: float64 [C, K] of them, 0 for none.
    gather: the probabilities of other ids. entropy: float64 [C] of the whole distribution, nats.
    argmax, sample: int [C]. whole: the candidates are the vocabulary.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    gather: Gather
    entropy: np.ndarray
    argmax: np.ndarray
    sample: np.ndarray
    whole: bool


@dataclass(frozen=True)
class Conditioned:
    """The same canvas within the language.

    draft, sample: int32 [C]. entropy: float32 [C], nats. certainty: float32 [C], the marginal of
    the sample, NaN where that is the network's. The marginals themselves: `plain` float32 [C]
    times the network's distribution, plus `weights` float32 [C, n] of `ids` int32 [C, n], which
    may be negative.
    feasible: a text of the language fits; otherwise the draft is the beginning of one.
    left_out: the most probability that a position's candidates lack.
    """

    draft: np.ndarray
    sample: np.ndarray
    entropy: np.ndarray
    certainty: np.ndarray
    plain: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    feasible: bool
    left_out: float


class _Layer(NamedTuple):
    """One position, walked forward.

    states int [s] and their forward weights [s]; ids int [k] and their probabilities [k].
    Its moves, sorted by source: from the state `source` [m] by the id `column` [m] to the next
    position's state `target` [m], where the number of those states stands for none; `weight` [m]
    is the id's probability, scaled. The last move of each state is by no listed id (column k):
    everything from END, and from open text what the ids leave out. first [s]: where each state's
    moves begin. rest: the probability that the ids leave out.
    """

    states: np.ndarray
    forward: np.ndarray
    ids: np.ndarray
    p: np.ndarray
    source: np.ndarray
    column: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    rest: float

    def moves(self, state: int) -> slice:
        """Which moves by a listed id start from a state."""
        last = self.first[state + 1] if state + 1 < self.first.size else self.source.size
        return slice(int(self.first[state]), int(last) - 1)

    def sure(self) -> np.ndarray:
        """The weights without those of moves from open text that no id stands for."""
        weight = self.weight.copy()
        weight[(self.column == self.ids.size) & (self.states[self.source] != END)] = 0
        return weight

    def warmed(self, temp: float) -> _Layer:
        listed = self.column < self.ids.size
        return self._replace(weight=np.where(listed, self.weight ** (1 / temp), self.weight))


Pick = Callable[[int, np.ndarray], int]


def condition(
    automaton: Automaton,
    seen: Distributions,
    *,
    start: int,
    uniforms: np.ndarray,
    ends_by: int | None = None,
    room: int = 0,
    temp: float = 1.0,
    whole: bool = False,
    most_states: int = MOST_STATES,
) -> Conditioned:
    """Conditions one canvas on the texts that lead on from the state `start`.

    uniforms: float64 [C] in [0, 1). ends_by: positions within which the text must end if it can;
        None where another block may follow, with `room` tokens after this canvas. temp: of the
        sample, 0 takes the draft. whole: the positions must hold a text and no end.
    """
    layers, final = _forward(automaton, seen, start, most_states)
    ended = final == END
    goals = [(ended, ends_by)] if ends_by is not None else [(automaton.least[final] <= room, None)]
    if whole:
        goals = [(automaton.accepting[final] & ~ended, None)]
    feasible = True
    sure = [layer.sure() for layer in layers]
    for allowed, by in (*goals, (np.ones(final.size, dtype=bool), None)):
        best = _backward(layers, sure, allowed, by, np.maximum)
        if best[0].max() > 0:
            break
        feasible = False
    messages = _backward(layers, [layer.weight for layer in layers], allowed, by, np.add)
    draft = _trace(layers, best, lambda at, weights: int(weights.argmax()), seen.argmax)
    sample = draft
    if temp > 0:
        warmed, backward = layers, messages
        if temp != 1:
            warmed = [layer.warmed(temp) for layer in layers]
            backward = _backward(warmed, [layer.weight for layer in warmed], allowed, by, np.add)
        reachable = [b * (v > 0) for b, v in zip(backward, best, strict=True)]

        def draw(at: int, weights: np.ndarray) -> int:
            total = np.cumsum(weights)
            chosen = int(np.searchsorted(total, uniforms[at] * total[-1], "right"))
            return min(chosen, int(np.flatnonzero(weights)[-1]))

        sample = _trace(warmed, reachable, draw, seen.sample)
    return _marginals(layers, messages, seen, draft, sample, feasible)


def _forward(
    automaton: Automaton, seen: Distributions, start: int, most: int
) -> tuple[list[_Layer], np.ndarray]:
    """The positions up to the canvas's end, or to where all texts have ended; the last states."""
    states, weights = np.array([start]), np.ones(1)
    layers: list[_Layer] = []
    listed = _Listed(automaton, seen)
    for at in range(len(seen.ids)):
        if states.size == 1 and states[0] == END:
            break
        ids, p = listed.at(at, states)
        rest = 0.0 if seen.whole else max(1.0 - float(p.sum()), 0.0)
        is_end = states == END
        targets = automaton.table(states, ids)
        alive = np.ones((states.size, ids.size + 1), dtype=bool)
        np.not_equal(targets, DEAD, out=alive[:, :-1])
        alive[is_end, :-1] = False  # everything at once, by the last move
        flat = np.flatnonzero(alive)
        source = flat // (ids.size + 1)
        column = flat - source * (ids.size + 1)
        last = np.flatnonzero(column == ids.size)
        goals = targets.ravel().take(flat - source, mode="clip").astype(np.intp)
        goals[last] = DEAD
        reached = np.zeros(len(automaton), dtype=bool)
        reached[goals] = True
        reached[END] |= bool(is_end.any())
        reached[DEAD] = False
        # What no id stands for goes where some id goes.
        aside = np.where(is_end, END, automaton.typical(states) if rest > 0 else DEAD)
        goals[last] = aside = np.where(reached[aside], aside, DEAD)
        weight = np.append(p, 0).take(column)
        scale = 1 / max(float(weight.max()), _TINY)
        weight = np.maximum(weight * scale, _FLOOR)
        weight[last] = np.where(is_end, scale, rest * scale) * (aside != DEAD)
        mass = np.bincount(goals, weights.take(source) * weight, len(automaton))
        kept = _beam(automaton, np.flatnonzero(reached), mass, most)
        index = np.full(len(automaton), kept.size)
        index[kept] = np.arange(kept.size)
        first = np.append(0, last[:-1] + 1)
        layers.append(
            _Layer(states, weights, ids, p, source, column, index[goals], weight, first, rest)
        )
        states, mass = kept, mass[kept]
        weights = np.maximum(mass / max(float(mass.max()), _TINY), _TINY)
    return layers, states


class _Listed:
    """The ids of each position: its candidates and those that keep its states alive."""

    def __init__(self, automaton: Automaton, seen: Distributions) -> None:
        self._automaton, self._seen = automaton, seen
        self._extra = np.zeros((len(seen.ids), 0))
        self._chosen: dict[bytes, np.ndarray] = {}
        if not seen.whole:
            automaton.prepare(seen.ids[seen.probabilities > 0])

    def at(self, at: int, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids [k] of a position and their probabilities [k]."""
        ids, p = self._seen.ids[at], self._seen.probabilities[at]
        if self._seen.whole:
            return ids, p
        automaton = self._automaton
        key = states.tobytes()
        if key not in self._chosen:
            self._chosen[key] = automaton.keep_alive(states)
            known = self._extra.shape[1]
            if automaton.alive_ids.size > known:
                fresh = self._seen.gather(automaton.alive_ids[known:])
                self._extra = np.concatenate([self._extra, fresh], axis=1)
        chosen = self._chosen[key]
        extra = automaton.alive_ids[chosen]
        automaton.marked[extra] = True
        own = (p > 0) & ~automaton.marked[ids]
        automaton.marked[extra] = False
        return (
            np.concatenate([ids[own], extra]),
            np.concatenate([p[own], self._extra[at, chosen]]),
        )


def _beam(automaton: Automaton, found: np.ndarray, mass: np.ndarray, most: int) -> np.ndarray:
    """Those of the states found, ascending, to go on with."""
    if found.size <= most:
        return found
    kept = np.zeros(found.size, dtype=bool)
    kept[np.argsort(automaton.least[found], kind="stable")[:_NEAREST]] = True
    kept[np.argsort(-mass[found], kind="stable")[: most - _NEAREST]] = True
    return found[kept]


def _backward(
    layers: list[_Layer],
    weights: list[np.ndarray],
    allowed: np.ndarray,
    ends_by: int | None,
    join: np.ufunc,
) -> list[np.ndarray]:
    """What lies after each state of each position [s + 1], scaled; 0 for the dead one.

    allowed: bool [s] of the last states. ends_by: the position by which END must be reached.
    join: np.add for all texts, np.maximum for the best.
    """
    backward = np.append(allowed, False).astype(float)
    messages = [backward]
    for at in range(len(layers) - 1, -1, -1):
        layer = layers[at]
        backward = np.zeros(layer.states.size + 1)
        found = backward[:-1]
        join.reduceat(weights[at] * messages[-1][layer.target], layer.first, out=found)
        if ends_by is not None and at >= ends_by:
            found *= layer.states == END
        top = found.max()
        if top > 0:
            alive = found > 0
            found /= top
            np.maximum(found, _TINY, out=found, where=alive)
        messages.append(backward)
    return messages[::-1]


def _trace(
    layers: list[_Layer], messages: list[np.ndarray], pick: Pick, ended: np.ndarray
) -> np.ndarray:
    """int32 [C]: one text, id by id; what stands after its end is taken from `ended`."""
    text = np.array(ended, dtype=np.int32)
    state = 0
    for at, layer in enumerate(layers):
        if layer.states[state] == END:
            break
        moves = layer.moves(state)
        targets = layer.target[moves]
        chosen = pick(at, layer.weight[moves] * messages[at + 1][targets])
        text[at] = layer.ids[layer.column[moves][chosen]]
        state = int(targets[chosen])
    return text


def _marginals(
    layers: list[_Layer],
    messages: list[np.ndarray],
    seen: Distributions,
    draft: np.ndarray,
    sample: np.ndarray,
    feasible: bool,
) -> Conditioned:
    length = len(seen.ids)
    entropy = np.array(seen.entropy, dtype=np.float32)
    certainty = np.full(length, np.nan, dtype=np.float32)
    plain = np.ones(length, dtype=np.float32)
    sizes = [layer.ids.size for layer in layers]
    ids = np.zeros((length, max(sizes, default=1)), dtype=np.int32)
    weights = np.zeros(ids.shape, dtype=np.float32)
    if not layers:
        return Conditioned(draft, sample, entropy, certainty, plain, ids, weights, feasible, 0.0)
    # All positions in one: `slot` numbers every listed id of every position, and its last move's.
    slots = np.array(sizes) + 1
    begin = np.cumsum(slots) - slots
    place = np.repeat(np.arange(len(layers)), [layer.source.size for layer in layers])
    flow = np.concatenate(
        [
            (layer.forward * (messages[at][:-1] > 0))[layer.source]
            * layer.weight
            * messages[at + 1][layer.target]
            for at, layer in enumerate(layers)
        ]
    )
    column = np.concatenate([layer.column for layer in layers])
    from_end = np.concatenate([(layer.states == END)[layer.source] for layer in layers])
    at_end = np.bincount(place, flow * from_end, len(layers))
    each = np.bincount(column + begin[place], flow * ~from_end, int(slots.sum()))
    total = np.add.reduceat(each, begin) + at_end
    other = each[begin + slots - 1] / total
    ended = at_end / total
    row = np.repeat(np.arange(len(layers)), sizes)
    listed = np.ones(each.size, dtype=bool)
    listed[begin + slots - 1] = False
    own = each[listed] / total[row]
    p = np.concatenate([layer.p for layer in layers])
    which = np.concatenate([layer.ids for layer in layers])
    rest = np.array([layer.rest for layer in layers])
    share = np.divide(other, rest, out=np.zeros(len(layers)), where=rest > 0)
    marginal = own + ended[row] * p
    amount = -np.bincount(row, _xlogx(marginal), len(layers))
    unlisted = np.maximum(seen.entropy[: len(layers)] + np.bincount(row, _xlogx(p), len(layers)), 0)
    kept = ended + share
    outside = kept * rest > 0
    logs = np.log(np.maximum(kept, _TINY))
    amount += np.where(outside, kept * (unlisted - rest * logs), 0)
    surely = np.bincount(row, marginal * (which == sample[row]), len(layers))
    going = ended <= _SURELY_ENDED
    at = np.flatnonzero(going)
    plain[at], entropy[at] = kept[going], np.maximum(amount, 0)[going]
    certainty[at] = surely[going]
    within = np.arange(row.size) - (begin - np.arange(len(layers)))[row]
    some = going[row]
    ids[row[some], within[some]] = which[some]
    weights[row[some], within[some]] = (own - share[row] * p)[some]
    return Conditioned(
        draft, sample, entropy, certainty, plain, ids, weights, feasible, float(rest.max())
    )


def _xlogx(p: np.ndarray) -> np.ndarray:
    amount: np.ndarray = p * np.log(np.maximum(p, _TINY))
    return amount
