"""Candidates and a beam, one id after the other: what the lattice must give, written plainly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import DEAD, END
from mlx_dgemma.decoding.candidates import Distributions

NEAREST = 8


class Plain(NamedTuple):
    """marginals: float64 [C, V]. best: the logarithm of the best text's probability, its end's id
    included. total: the positions before which all texts have ended."""

    marginals: np.ndarray
    best: float
    total: int


def plain(automaton: Automaton, seen: Distributions, p: np.ndarray, most: int) -> Plain:
    """Of distributions p [C, V], the text to end within the canvas."""
    length, size = p.shape
    stood = [{automaton.start: 1.0}]
    listed: list[dict[int, np.ndarray]] = []  # of each state
    moves: list[list[tuple[int, int, int]]] = []  # from a state by an id, or by none (-1), to one
    for at in range(length):
        here = stood[-1]
        if list(here) == [END]:
            break
        own = seen.ids[at][seen.probabilities[at] > 0]
        ids = {state: np.union1d(own, automaton.alive(state)) for state in here if state != END}
        mine, flow = [], {}
        for state, weight in here.items():
            targets = {-1: END} if state == END else dict(
                zip(
                    ids[state].tolist(),
                    automaton.table(np.array([state]), ids[state])[0].tolist(),
                    strict=True,
                )
            )  # fmt: skip
            for id_, target in targets.items():
                if target != DEAD:
                    mine.append((state, id_, target))
                    share = p[at, id_] if id_ >= 0 else 1.0
                    flow[target] = flow.get(target, 0.0) + weight * share
        reached = set(flow)
        for state, weight in here.items():
            target = int(automaton.typical(np.array([state]))[0])
            if state != END and target in reached:
                mine.append((state, -1, target))
                flow[target] += weight * (1 - p[at, ids[state]].sum())
        nearest = sorted(flow, key=lambda state: (automaton.least[state], state))[:NEAREST]
        likely = sorted(flow, key=lambda state: (-flow[state], state))[: most - NEAREST]
        chosen = sorted(flow) if len(flow) <= most else sorted({*nearest, *likely})
        top = max(flow[state] for state in chosen)
        stood.append({state: flow[state] / top for state in chosen})
        listed.append(ids)
        moves.append(mine)
    return _backward(stood, listed, moves, p, size)


def _backward(
    stood: list[dict[int, float]],
    listed: list[dict[int, np.ndarray]],
    moves: list[list[tuple[int, int, int]]],
    p: np.ndarray,
    size: int,
) -> Plain:
    behind = {state: float(state == END) for state in stood[-1]}
    best = {state: 0.0 if state == END else -np.inf for state in stood[-1]}
    marginals = p.copy()
    for at in range(len(moves) - 1, -1, -1):
        sums, most = dict.fromkeys(stood[at], 0.0), dict.fromkeys(stood[at], -np.inf)
        row = np.zeros(size)
        for state, id_, target in moves[at]:
            if target not in behind:
                continue
            unlisted = np.ones(size, dtype=bool)
            unlisted[listed[at].get(state, [])] = False
            share = p[at, id_] if id_ >= 0 else 1.0 if state == END else p[at, unlisted].sum()
            sums[state] += share * behind[target]
            if id_ >= 0 or state == END:
                most[state] = max(most[state], float(np.log(share)) + best[target])
            flow = stood[at][state] * behind[target]
            if id_ >= 0:
                row[id_] += flow * share
            else:
                row += flow * p[at] * (1.0 if state == END else unlisted)
        marginals[at] = row / row.sum()
        top = max(sums.values())
        behind = {state: value / top for state, value in sums.items()}
        best = most
    return Plain(marginals, best[next(iter(stood[0]))], len(moves))
