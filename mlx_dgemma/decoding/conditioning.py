"""Independent distributions, one per canvas position, conditioned on a regular language.

    forward   a[0](start) = 1,  a[i+1](t) = sum of a[i](s) p[i](v) over s, v with d(s, v) = t
    backward  b[C](s) = 1 where the text may stand so at the canvas's end,
              b[i](s) = sum over v of p[i](v) b[i+1](d(s, v))
    marginal  r[i](v) ~ p[i](v) sum over s of a[i](s) b[i+1](d(s, v))

The draft is the most probable text of the language (the same recursion with max for sum), the
sample one draw of a whole text (forward, each id by p times the backward message behind it).

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

# float64 [n]: probabilities of some ids at a position.
Gather = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Distributions:
    """What the network says of one canvas.

    ids: int64 [C, K] candidates, most probable first or in any order. probabilities: float64 [C, K]
    of them. gather: the probabilities of other ids. entropy: float64 [C] of the whole distribution,
    nats. argmax, sample: int [C]. whole: the candidates are the vocabulary.
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

    states int [s] and their forward weights [s]; ids int [k] and their probabilities, scaled
    (p [k]) and as they are (plain [k]).
    Its moves, sorted by source: from the state `source` [m] by the id `column` [m] to the next
    position's state `target` [m]; first [s]: where each state's moves begin.
    side [s]: scaled probability that goes to side_target [s] without a listed id: everything from
    END, and from open text what the ids leave out; the target behind the last state is dead.
    rest: that of the network, unscaled.
    """

    states: np.ndarray
    forward: np.ndarray
    ids: np.ndarray
    p: np.ndarray
    plain: np.ndarray
    source: np.ndarray
    column: np.ndarray
    target: np.ndarray
    first: np.ndarray
    side: np.ndarray
    side_target: np.ndarray
    rest: float

    def moves(self, state: int) -> slice:
        """Which moves start from a state."""
        last = self.first[state + 1] if state + 1 < self.first.size else self.source.size
        return slice(int(self.first[state]), int(last))


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
    most_states: int = MOST_STATES,
) -> Conditioned:
    """Conditions one canvas on the texts that lead on from the state `start`.

    uniforms: float64 [C] in [0, 1). ends_by: positions within which the text must end if it can;
        None where another block may follow, with `room` tokens after this canvas. temp: of the
        sample, 0 takes the draft.
    """
    layers, final = _forward(automaton, seen, start, most_states)
    ended = final == END
    goals = [(ended, ends_by)] if ends_by is not None else [(automaton.least[final] <= room, None)]
    feasible = True
    for allowed, by in (*goals, (np.ones(final.size, dtype=bool), None)):
        best = _backward(layers, allowed, by, most_probable=True)
        if best[0].max() > 0:
            break
        feasible = False
    messages = _backward(layers, allowed, by)
    draft = _trace(layers, best, lambda at, weights: int(weights.argmax()), seen.argmax)
    sample = draft
    if temp > 0:
        warmed, behind = layers, messages
        if temp != 1:
            warmed = [one._replace(p=one.p ** (1 / temp)) for one in layers]
            behind = _backward(warmed, allowed, by)
        reachable = [b * (v > 0) for b, v in zip(behind, best, strict=True)]

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
    if not seen.whole:
        automaton.prepare(seen.ids[seen.probabilities > 0])
    for at in range(len(seen.ids)):
        if states.size == 1 and states[0] == END:
            break
        ids, plain = _candidates(automaton, seen, at, states)
        is_end = states == END
        targets = automaton.table(states, ids)
        targets[is_end] = DEAD  # everything at once, by the side
        source, column = np.nonzero(targets)
        goals = targets[source, column]
        top = float(plain[column].max(initial=0))
        scale = 1 / max(top, _TINY)
        p = np.maximum(plain * scale, _FLOOR)
        rest = 0.0 if seen.whole else max(1.0 - float(plain.sum()), 0.0)
        side, goes = is_end * scale, np.where(is_end, END, DEAD)
        if rest > 0:
            open_text = np.array([automaton.typical(state) for state in states.tolist()])
            goes = np.where(is_end, END, open_text)
            side = np.where(is_end, scale, rest * scale * (open_text != DEAD))
        reached = np.zeros(len(automaton), dtype=bool)
        reached[goals] = True
        reached[END] |= bool(is_end.any())
        reached[DEAD] = False
        side = side * reached[goes]
        goes = np.where(reached[goes], goes, DEAD)
        mass = np.bincount(goals, weights[source] * p[column], len(automaton))
        mass += np.bincount(goes, weights * side, len(automaton))
        kept = _beam(automaton, np.flatnonzero(reached), mass, most)
        index = np.full(len(automaton), kept.size)
        index[kept] = np.arange(kept.size)
        going = index[goals] < kept.size
        source, column, goals = source[going], column[going], goals[going]
        layers.append(
            _Layer(
                *(states, weights, ids, p, plain, source, column, index[goals]),
                np.searchsorted(source, np.arange(states.size)),
                *(side, index[goes], rest),
            )
        )
        states, mass = kept, mass[kept]
        weights = np.maximum(mass / max(float(mass.max()), _TINY), _TINY)
    return layers, states


def _candidates(
    automaton: Automaton, seen: Distributions, at: int, states: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a position and their probabilities, those that keep its states alive included."""
    ids, p = seen.ids[at], seen.probabilities[at]
    if seen.whole:
        return ids, p
    ids, p = ids[p > 0], p[p > 0]
    alive = np.zeros(automaton.vocabulary.size, dtype=bool)
    for state in states.tolist():
        alive[automaton.alive(state)] = True
    alive[ids] = False
    extra = np.flatnonzero(alive)
    return np.concatenate([ids, extra]), np.concatenate([p, seen.gather(at, extra)])


def _beam(automaton: Automaton, found: np.ndarray, mass: np.ndarray, most: int) -> np.ndarray:
    """Those of the states found, ascending, to go on with."""
    if found.size <= most:
        return found
    nearest = found[np.argsort(automaton.least[found], kind="stable")[:_NEAREST]]
    likeliest = found[np.argsort(-mass[found], kind="stable")[: most - _NEAREST]]
    return np.union1d(nearest, likeliest)


def _backward(
    layers: list[_Layer],
    allowed: np.ndarray,
    ends_by: int | None,
    *,
    most_probable: bool = False,
) -> list[np.ndarray]:
    """What lies behind each state of each position [s + 1], scaled; 0 for the dead one.

    allowed: bool [s] of the last states. ends_by: the position by which END must be reached.
    most_probable: of the best text instead of all.
    """
    behind = np.append(allowed, False).astype(float)
    messages = [behind]
    for at in range(len(layers) - 1, -1, -1):
        layer = layers[at]
        each = layer.p[layer.column] * behind[layer.target]
        aside = layer.side * behind[layer.side_target]
        if most_probable:
            found = aside * (layer.states == END)
            some = np.append(layer.first[1:], each.size) > layer.first
            if some.any():
                best = np.maximum.reduceat(each, layer.first[some])
                found[some] = np.maximum(found[some], best)
        else:
            found = np.bincount(layer.source, each, layer.states.size) + aside
        if ends_by is not None and at >= ends_by:
            found = found * (layer.states == END)
        top = found.max()
        if top > 0:
            found = np.where(found > 0, np.maximum(found / top, _TINY), 0)
        behind = np.append(found, 0.0)
        messages.append(behind)
    return messages[::-1]


def _trace(
    layers: list[_Layer], messages: list[np.ndarray], pick: Pick, ended: np.ndarray
) -> np.ndarray:
    """int32 [C]: one text, id by id; what stands behind its end is taken from `ended`."""
    text = np.array(ended, dtype=np.int32)
    state = 0
    for at, layer in enumerate(layers):
        if layer.states[state] == END:
            state = int(layer.side_target[state])
            continue
        moves = layer.moves(state)
        targets, columns = layer.target[moves], layer.column[moves]
        chosen = pick(at, layer.p[columns] * messages[at + 1][targets])
        text[at] = layer.ids[columns[chosen]]
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
    width = max((layer.ids.size for layer in layers), default=1)
    ids = np.zeros((length, width), dtype=np.int32)
    weights = np.zeros((length, width), dtype=np.float32)
    plain = np.ones(length, dtype=np.float32)
    entropy = np.array(seen.entropy, dtype=np.float32)
    certainty = np.full(length, np.nan, dtype=np.float32)
    left_out = 0.0
    for at, layer in enumerate(layers):
        behind = messages[at + 1]
        forward = layer.forward * (messages[at][:-1] > 0)
        flow = forward[layer.source] * behind[layer.target]
        own = layer.p * np.bincount(layer.column, flow, layer.ids.size)
        aside = forward * layer.side * behind[layer.side_target]
        is_end = layer.states == END
        ended, other = float(aside[is_end].sum()), float(aside[~is_end].sum())
        total = own.sum() + ended + other
        own, ended, other = own / total, ended / total, other / total
        left_out = max(left_out, layer.rest)
        if ended > _SURELY_ENDED:
            continue
        p = layer.plain
        share = other / layer.rest if layer.rest > 0 else 0.0
        plain[at] = ended + share
        count = layer.ids.size
        ids[at, :count], weights[at, :count] = layer.ids, own - share * p
        marginal = own + ended * p
        outside = (ended + share) * layer.rest
        amount = -_xlogx(marginal).sum()
        if outside > 0:
            unlisted = max(float(seen.entropy[at]) + float(_xlogx(p).sum()), 0.0)
            amount += (ended + share) * (unlisted - layer.rest * np.log(ended + share))
        entropy[at] = max(amount, 0.0)
        certainty[at] = marginal[layer.ids == sample[at]].sum()
    return Conditioned(
        draft, sample, entropy, certainty, plain, ids, weights, feasible, float(left_out)
    )


def _xlogx(p: np.ndarray) -> np.ndarray:
    amount: np.ndarray = p * np.log(np.maximum(p, _TINY))
    return amount
