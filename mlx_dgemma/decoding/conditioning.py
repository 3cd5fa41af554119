"""Independent distributions, one per canvas position, conditioned on a regular language.

    forward   a[0](start) = 1,  a[i+1](t) = sum of a[i](s) p[i](v) over s, v with d(s, v) = t
    backward  b[C](s) = 1 where the text may stand so at the canvas's end,
              b[i](s) = sum over v of p[i](v) b[i+1](d(s, v))
    marginal  r[i](v) ~ p[i](v) sum over s of a[i](s) b[i+1](d(s, v))

The draft is the most probable text of the language (the same recursion with max for sum), the
sample one draw of a whole text (forward, each id by p times the backward message behind it).

Sums run over candidates per position. What they leave out counts as an ordinary word where the text
is open, so that it keeps its probability; numbers are scaled per position, so that they stay finite.
Source: forward filtering, backward sampling, as for hidden Markov models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.automaton import DEAD, END, Automaton

# States kept per position: the most probable, and those nearest to an end of the text.
MOST_STATES = 48
_NEAREST = 12
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
    the sample. The marginals themselves: `plain` float32 [C] times the network's distribution, plus
    `weights` float32 [C, n] of `ids` int32 [C, n], which may be negative.
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

    states int [s] and their forward weights [s]; ids int [k] and their probabilities p [k], scaled;
    next int [s, k], indices into the next position's states, of which the one behind the last is
    dead. side [s]: scaled probability that goes to side_next [s] without a listed id: everything
    from END, and from open text what the ids leave out. rest: that of the network, unscaled.
    """

    states: np.ndarray
    forward: np.ndarray
    ids: np.ndarray
    p: np.ndarray
    scale: float
    next: np.ndarray
    side: np.ndarray
    side_next: np.ndarray
    rest: float


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
        automaton.prepare(np.unique(seen.ids))
    for at in range(len(seen.ids)):
        if states.size == 1 and states[0] == END:
            break
        ids, plain = _candidates(automaton, seen, at, states)
        is_end = states == END
        targets = automaton.table(states, ids)
        targets[is_end] = DEAD  # everything at once, by the side
        legal = (targets != DEAD).any(axis=0)
        scale = 1 / max(float(plain[legal].max(initial=0)), _TINY)
        p = np.maximum(plain * scale, _FLOOR) * legal
        rest = 0.0 if seen.whole else max(1.0 - float(plain.sum()), 0.0)
        side, goes = is_end * scale, np.where(is_end, END, DEAD)
        if rest > 0:
            open_text = np.array([automaton.typical(state) for state in states.tolist()])
            goes = np.where(is_end, END, open_text)
            side = np.where(is_end, scale, rest * scale * (open_text != DEAD))
        found, where = np.unique(np.append(targets.ravel(), END), return_inverse=True)
        mass = np.bincount(where[:-1], (weights[:, None] * p).ravel(), found.size)
        reached = np.bincount(where[:-1], minlength=found.size) > 0
        if is_end.any():
            reached[np.searchsorted(found, END)] = True
        aside = np.minimum(np.searchsorted(found, goes), found.size - 1)
        known = (found[aside] == goes) & (goes != DEAD) & reached[aside]
        side = side * known
        mass += np.bincount(aside, weights * side, found.size)
        keep = _beam(automaton, found, mass, reached & (found != DEAD), most)
        index = np.full(found.size, keep.size)
        index[keep] = np.arange(keep.size)
        layers.append(
            _Layer(
                states, weights, ids, p, scale,
                index[where[:-1]].reshape(targets.shape),
                side, np.where(known, index[aside], keep.size), rest,
            )
        )  # fmt: skip
        states = found[keep]
        weights = np.maximum(mass[keep] / max(float(mass[keep].max()), _TINY), _TINY)
    return layers, states


def _candidates(
    automaton: Automaton, seen: Distributions, at: int, states: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a position and their probabilities, those that keep its states alive included."""
    ids, p = seen.ids[at], seen.probabilities[at]
    if seen.whole:
        return ids, p
    alive = np.concatenate([automaton.alive(state) for state in states.tolist() if state != END])
    extra = np.setdiff1d(alive, ids)
    if not extra.size:
        return ids, p
    return np.concatenate([ids, extra]), np.concatenate([p, seen.gather(at, extra)])


def _beam(
    automaton: Automaton, found: np.ndarray, mass: np.ndarray, live: np.ndarray, most: int
) -> np.ndarray:
    """Indices, ascending, of the states to go on with."""
    keep = np.flatnonzero(live)
    if keep.size <= most:
        return keep
    nearest = keep[np.argsort(automaton.least[found[keep]], kind="stable")[:_NEAREST]]
    likeliest = keep[np.argsort(-mass[keep], kind="stable")[: most - _NEAREST]]
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
        each = layer.p * behind[layer.next]
        aside = layer.side * behind[layer.side_next]
        if most_probable:
            found = np.maximum(each.max(axis=1), aside * (layer.states == END))
        else:
            found = each.sum(axis=1) + aside
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
            state = int(layer.side_next[state])
            continue
        chosen = pick(at, layer.p * messages[at + 1][layer.next[state]])
        text[at] = layer.ids[chosen]
        state = int(layer.next[state, chosen])
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
    certainty = np.ones(length, dtype=np.float32)
    left_out = 0.0
    for at, layer in enumerate(layers):
        behind = messages[at + 1]
        forward = layer.forward * (messages[at][:-1] > 0)
        own = layer.p * (forward @ behind[layer.next])
        aside = forward * layer.side * behind[layer.side_next]
        is_end = layer.states == END
        ended, other = float(aside[is_end].sum()), float(aside[~is_end].sum())
        total = own.sum() + ended + other
        own, ended, other = own / total, ended / total, other / total
        left_out = max(left_out, layer.rest)
        if ended > _SURELY_ENDED:
            continue
        p = np.minimum(layer.p / layer.scale, 1.0)
        if seen.whole:
            p = seen.probabilities[at]
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
    return p * np.log(np.maximum(p, _TINY))
