"""The ids that a canvas's positions are conditioned over, and where they lead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import END

_LEAST = 1e-200  # a probability; 0 stands for an id that is not listed

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


class Window(NamedTuple):
    """Where the candidates of the positions [begin, end) lead from some states.

    An edge joins a state to another: source, target [e]; known [states]: whether a state is one of
    those. sums, best [end - begin, e]: of the probabilities of the candidates that lead there.
    Of each such candidate [m], its edge, its position's place in the window, its slot among the
    position's candidates, and its probability.
    """

    begin: int
    end: int
    known: np.ndarray
    source: np.ndarray
    target: np.ndarray
    sums: np.ndarray
    best: np.ndarray
    edge: np.ndarray
    place: np.ndarray
    slot: np.ndarray
    p: np.ndarray

    def cut(self, end: int) -> Window:
        """The window up to another end."""
        count = end - self.begin
        mine = self.place < count
        return self._replace(
            end=end,
            sums=self.sums[:count],
            best=self.best[:count],
            edge=self.edge[mine],
            place=self.place[mine],
            slot=self.slot[mine],
            p=self.p[mine],
        )

    def raised(self, at: int, floor: float) -> None:
        """Counts every candidate of a position for at least `floor`."""
        mine, place = self.place == at - self.begin, at - self.begin
        self.p[mine] = p = np.maximum(self.p[mine], floor)
        edge = self.edge[mine]
        self.sums[place] = np.bincount(edge, p, self.source.size)
        self.best[place, edge] = p  # in ascending order: the last one stays


class Candidates:
    """A canvas's own candidates, and ids that are listed for keeping a state alive.

    ids, p: [C, K] its own, ascending by probability, 0 for none; total: float64 [C], their sum.
    listed: float64 [C, n], of the ids that may be listed, 0 for a candidate; `doubled`
    [C]: where one is.
    """

    def __init__(self, automaton: Automaton, seen: Distributions) -> None:
        self._automaton, self._seen = automaton, seen
        length = len(seen.ids)
        self.doubled = np.zeros(length, dtype=bool)
        if seen.whole:
            self.ids, self.p = np.zeros((length, 0), dtype=np.int64), np.zeros((length, 0))
            self.listed = np.zeros((length, automaton.vocabulary.size))
            np.put_along_axis(self.listed, seen.ids, np.maximum(seen.probabilities, _LEAST), 1)
        else:
            order = np.argsort(seen.probabilities, axis=1)
            self.ids = np.take_along_axis(seen.ids, order, 1)
            self.p = np.take_along_axis(seen.probabilities, order, 1)
            self.ids[self.p <= 0] = automaton.vocabulary.stop_ids.min(initial=0)
            self.listed = np.zeros((length, automaton.alive_ids.size))
            automaton.transitions.prepare(self.ids[self.p > 0])
        self.total = self.p.sum(axis=1)
        self.least = np.where(self.p > 0, self.p, 1.0).min(axis=1, initial=1.0)
        self._gathered = np.zeros(self.listed.shape[1], dtype=bool)

    @property
    def names(self) -> np.ndarray:
        """int64 [n]: the ids that may be listed."""
        if self._seen.whole:
            return np.arange(self.listed.shape[1])
        return self._automaton.alive_ids

    def gather(self, places: np.ndarray) -> None:
        """Sees to it that some ids' probabilities are there."""
        if self._seen.whole:
            return
        fresh = self.names.size - self._gathered.size
        if fresh:
            self.listed = np.pad(self.listed, ((0, 0), (0, fresh)))
            self._gathered = np.pad(self._gathered, (0, fresh))
        missing = places[~self._gathered[places]]
        if not missing.size:
            return
        ids = self.names[missing]
        p = np.maximum(self._seen.gather(ids), _LEAST)
        spots = self._automaton.spots
        spots[ids] = np.arange(ids.size)
        spot = spots.take(self.ids)
        spots[ids] = -1
        at, slot = np.nonzero((spot >= 0) & (self.p > 0))
        p[at, spot[at, slot]] = 0
        self.doubled[at] = True
        self.listed[:, missing] = p
        self._gathered[missing] = True

    def window(self, states: np.ndarray, begin: int, end: int) -> Window:
        automaton, width = self._automaton, self.ids.shape[1]
        known = np.zeros(len(automaton), dtype=bool)
        known[states] = True
        states = states[states != END]
        size = (end - begin) * width
        table = automaton.table(states, self.ids[begin:end].ravel()).ravel()
        p = self.p[begin:end].ravel()
        flat = np.flatnonzero(table)
        which = flat // max(size, 1)
        slot = flat - which * size
        p = p.take(slot)
        if not (self.p[begin:end, 0] > 0).all():
            some = np.flatnonzero(p)
            flat, which, slot, p = flat[some], which[some], slot[some], p[some]
        count = len(automaton)
        keys = which * count + table.take(flat)
        number = np.zeros(states.size * count, dtype=np.int32)
        number[keys] = 1
        edges = np.flatnonzero(number)
        number[edges] = np.arange(edges.size)
        edge = number.take(keys)
        place = slot // max(width, 1)
        cell = place * edges.size + edge
        best = np.zeros((end - begin) * edges.size)
        best[cell] = p  # in ascending order: the last one stays
        sums = np.bincount(cell, p, best.size)
        source = edges // count
        shape = (end - begin, edges.size)
        return Window(
            begin,
            end,
            known,
            states[source],
            edges - source * count,
            sums.reshape(shape),
            best.reshape(shape),
            edge,
            place,
            slot - place * width,
            p,
        )
