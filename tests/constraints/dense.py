"""The obvious sums: every state, every id of the vocabulary, no candidates and no beam."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import DEAD, END


class Sums(NamedTuple):
    """marginals: float64 [C, V]. best: the probability of the most probable text, its end's id
    included. total: the probability of all texts."""

    marginals: np.ndarray
    best: float
    total: float


def closure(automaton: Automaton) -> tuple[np.ndarray, list[int]]:
    """int [s, V]: where each id leads, as places among the states that any id reaches; those."""
    everything = np.arange(automaton.vocabulary.size)
    states, rows, place = [automaton.start], [], {automaton.start: 0}
    for state in states:
        row = automaton.table(np.array([state]), everything)[0].astype(int)
        for target in np.unique(row).tolist():
            if target not in place:
                place[target] = len(states)
                states.append(target)
        rows.append(row)
    return np.array([[place[target] for target in row] for row in rows]), states


def sums(automaton: Automaton, p: np.ndarray) -> Sums:
    """Of distributions p [C, V], the text to end within the canvas."""
    table, states = closure(automaton)
    count, length = len(states), len(p)
    dead = np.array([state == DEAD for state in states])
    end = np.array([state == END for state in states], dtype=float)
    after, best = [end], [end]
    for row in p[::-1]:
        after.append(np.where(dead, 0, (row * after[-1][table]).sum(1)))
        # What stands after the end is no text: all of it counts as one.
        most = (row * best[-1][table]).max(1)
        best.append(np.where(end == 1, best[-1], np.where(dead, 0, most)))
    after, best = after[::-1], best[::-1]
    marginals, forward = np.zeros_like(p), np.zeros(count)
    forward[0] = 1
    for at in range(length):
        flow = forward[:, None] * p[at] * after[at + 1][table]
        marginals[at] = flow.sum(0)
        forward = np.bincount(table.ravel(), (forward[:, None] * p[at]).ravel(), count)
        forward[dead] = 0
    return Sums(marginals / after[0][0], float(best[0][0]), float(after[0][0]))


def text_probability(automaton: Automaton, p: np.ndarray, ids: np.ndarray) -> float:
    """Of a text up to its end's id; 0 for one that is not in the language."""
    state, total = automaton.start, 1.0
    for row, id_ in zip(p, ids.tolist(), strict=True):
        if state == END:
            break
        total *= row[id_]
        state = automaton.after(state, [id_])
    return total if state == END else 0.0
