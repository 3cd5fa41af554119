"""Independent distributions, one per canvas position, conditioned on a regular language.

    forward   a[0](start) = 1,  a[i+1](t) = sum of a[i](s) p[i](v) over s, v with d(s, v) = t
    backward  b[C](s) = 1 where the text may stand so at the canvas's end,
              b[i](s) = sum over v of p[i](v) b[i+1](d(s, v))
    marginal  r[i](v) ~ p[i](v) sum over s of a[i](s) b[i+1](d(s, v))

The draft is the most probable text of the language (the same recursion with max for sum), the
sample one draw of a whole text (forward, each state by the moves to it times the backward message
after it, then an id among those that lead there).

Sums run over candidates per position. What they leave out counts as an ordinary word where the
text is open, so that it keeps its probability; numbers are scaled per position and stay finite.
Source: forward filtering, backward sampling, as for hidden Markov models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import END
from mlx_dgemma.decoding.candidates import Distributions
from mlx_dgemma.decoding.forward_backward import Messages
from mlx_dgemma.decoding.lattice import explore

# States followed per position: the most probable, and those nearest to an end of the text.
MOST_STATES = 32
_SURELY_ENDED = 1 - 1e-9
_TINY = 1e-280


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
    found = Messages(explore(automaton, seen, start, most_states))
    final = found.final
    ended = final == END
    goals = [(ended, ends_by)] if ends_by is not None else [(automaton.least[final] <= room, None)]
    if whole:
        goals = [(automaton.accepting[final] & ~ended, None)]
    feasible = True
    for allowed, by in (*goals, (np.ones(final.size, dtype=bool), None)):
        if found.aim(allowed, by):
            break
        feasible = False
    draft = found.draft(seen.argmax)
    sample = draft if temp == 0 else found.sample(seen.sample, uniforms, temp)
    return _marginals(found, seen, draft, sample, feasible)


def _marginals(
    found: Messages, seen: Distributions, draft: np.ndarray, sample: np.ndarray, feasible: bool
) -> Conditioned:
    length, count = len(seen.ids), found.count
    entropy = np.array(seen.entropy, dtype=np.float32)
    certainty = np.full(length, np.nan, dtype=np.float32)
    plain = np.ones(length, dtype=np.float32)
    if not count:
        nothing = np.zeros((length, 0))
        ids, weights = nothing.astype(np.int32), nothing.astype(np.float32)
        return Conditioned(draft, sample, entropy, certainty, plain, ids, weights, feasible, 0.0)
    shares = found.shares()
    p, ended = shares.p, shares.ended
    ids = np.zeros((length, p.shape[1]), dtype=np.int32)
    weights = np.zeros(ids.shape, dtype=np.float32)
    marginal = shares.own + ended[:, None] * p
    amount = -_xlogx(marginal).sum(axis=1)
    unlisted = np.maximum(seen.entropy[:count] + _xlogx(p).sum(axis=1), 0)
    kept = ended + shares.other
    logs = np.log(np.maximum(kept, _TINY))
    amount += np.where(kept * shares.rest > 0, kept * (unlisted - shares.rest * logs), 0)
    surely = (marginal * (shares.ids == sample[:count, None])).sum(axis=1)
    at = np.flatnonzero(ended <= _SURELY_ENDED)
    plain[at], entropy[at] = kept[at], np.maximum(amount, 0)[at]
    certainty[at] = surely[at]
    ids[at] = shares.ids[at]
    weights[at] = (shares.own - shares.other[:, None] * p)[at]
    left = shares.left_out
    return Conditioned(draft, sample, entropy, certainty, plain, ids, weights, feasible, left)


def _xlogx(p: np.ndarray) -> np.ndarray:
    amount: np.ndarray = p * np.log(np.maximum(p, _TINY))
    return amount
