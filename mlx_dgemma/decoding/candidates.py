"""The ids that a canvas's positions are conditioned over, and where they lead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import DEAD, END

LEAST = 1e-200  # a probability; 0 stands for an id that is not listed
_MOST_MOVES = 1_000_000  # of all sets of states that are kept

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


class Kept(NamedTuple):
    """Where the ids that keep some states alive lead from them, state by state.

    states [s], END among them with no id. places [m]: the ids' in their list. An edge joins a state
    to another by all its ids that lead there: those from `first` [e] on; source [e], a state's
    place; target [e], a state. sizes [s]: each state's ids. typical [s]: where an ordinary word
    leads each state, DEAD for nowhere.
    """

    states: np.ndarray
    places: np.ndarray
    first: np.ndarray
    source: np.ndarray
    target: np.ndarray
    sizes: np.ndarray
    typical: np.ndarray


class KeptMoves:
    """Of one automaton, state by state and set by set. It spares work and changes nothing."""

    def __init__(self, automaton: Automaton, *, whole: bool) -> None:
        """whole: all ids of the vocabulary are listed everywhere."""
        self._automaton, self._whole = automaton, whole
        self._ways: dict[int, tuple[np.ndarray, ...]] = {}
        self._sets: dict[bytes, Kept] = {}
        self._moves = 0

    @property
    def names(self) -> np.ndarray:
        """int64 [n]: the ids that may be listed."""
        if self._whole:
            return np.arange(self._automaton.vocabulary.size)
        return self._automaton.alive_ids

    def of(self, states: np.ndarray) -> Kept:
        """Of states, ascending."""
        key = states.tobytes()
        found = self._sets.get(key)
        if found is None:
            if self._moves > _MOST_MOVES:
                self._sets, self._moves = {}, 0
            found = self._sets[key] = self._join(states)
            self._moves += found.places.size
        return found

    def way(self, state: int) -> tuple[np.ndarray, ...]:
        """Places of the ids that lead on from a state, by target; where each target's begin; and
        the targets of all."""
        known = self._ways.get(state)
        if known is None:
            known = self._ways[state] = self._walk(state)
        return known

    def _walk(self, state: int) -> tuple[np.ndarray, ...]:
        if state == END:
            return (np.zeros(0, dtype=np.intp),) * 3
        here = np.array([state])
        places = np.arange(self.names.size) if self._whole else self._automaton.keep_alive(here)
        led = self._automaton.table(here, self.names[places])[0].astype(np.intp)
        order = np.argsort(led, kind="stable")
        order = order[np.count_nonzero(led == DEAD) :]
        led = led[order]
        return places[order], np.flatnonzero(np.diff(led, prepend=-1)), led

    def _join(self, states: np.ndarray) -> Kept:
        ways = [self.way(state) for state in states.tolist()]
        sizes = np.array([places.size for places, _, _ in ways])
        edges = np.array([first.size for _, first, _ in ways])
        first = np.concatenate([first for _, first, _ in ways])
        first = first + np.repeat(sizes.cumsum() - sizes, edges)
        led = np.concatenate([led for _, _, led in ways])
        typical = self._automaton.typical(states).astype(np.intp)
        typical[states == END] = DEAD  # all that follows is counted at once
        return Kept(
            states,
            np.concatenate([places for places, _, _ in ways]),
            first,
            np.repeat(np.arange(states.size), edges),
            led[first],
            sizes,
            np.full(states.size, DEAD, dtype=np.intp) if self._whole else typical,
        )


class Window(NamedTuple):
    """Where the ids of the positions [begin, end) lead from some states.

    An edge joins a state to another: source [e], its place among `kept.states`; target [e], a
    state. known [states]: whether a state is one of those. sums, best [end - begin, e]: of the
    probabilities of the ids that lead there. rest [end - begin, s]: of each state, what no id is
    listed for. of_kept [k]: the edges of `kept`'s own. slot, cell [m]: each candidate that leads
    anywhere, by its place among all of the window, and where it is summed.
    """

    begin: int
    end: int
    known: np.ndarray
    kept: Kept
    source: np.ndarray
    target: np.ndarray
    sums: np.ndarray
    best: np.ndarray
    rest: np.ndarray
    of_kept: np.ndarray
    slot: np.ndarray
    cell: np.ndarray

    def cut(self, end: int) -> Window:
        """The window up to another end."""
        count = end - self.begin
        mine = self.cell < count * self.source.size
        return self._replace(
            end=end,
            sums=self.sums[:count],
            best=self.best[:count],
            rest=self.rest[:count],
            slot=self.slot[mine],
            cell=self.cell[mine],
        )


class Candidates:
    """A canvas's own candidates, and ids that are listed for keeping a state alive.

    ids, p: [C, K] its own, ascending by probability, 0 for none; total: float64 [C], their sum.
    listed: float64 [C, n], of the ids that may be listed, 0 for a candidate.
    """

    def __init__(self, automaton: Automaton, seen: Distributions, moves: KeptMoves) -> None:
        self._automaton, self._seen, self._moves = automaton, seen, moves
        length = len(seen.ids)
        if seen.whole:
            self.ids, self.p = np.zeros((length, 0), dtype=np.int64), np.zeros((length, 0))
            self.listed = np.zeros((length, automaton.vocabulary.size))
            np.put_along_axis(self.listed, seen.ids, np.maximum(seen.probabilities, LEAST), 1)
        else:
            order = np.argsort(seen.probabilities, axis=1)
            self.ids = np.take_along_axis(seen.ids, order, 1)
            p = np.take_along_axis(seen.probabilities, order, 1)
            self.p = np.where(p > 0, np.maximum(p, LEAST), 0)
            self.ids[self.p <= 0] = automaton.vocabulary.stop_ids.min(initial=0)
            self.listed = np.zeros((length, automaton.alive_ids.size))
            automaton.transitions.prepare(self.ids[self.p > 0])
        self.total = self.p.sum(axis=1)
        self._gathered = np.zeros(self.listed.shape[1], dtype=bool)

    def gather(self, places: np.ndarray) -> None:
        """Sees to it that some listed ids' probabilities are there."""
        if self._seen.whole:
            return
        fresh = self._moves.names.size - self._gathered.size
        if fresh:
            self.listed = np.pad(self.listed, ((0, 0), (0, fresh)))
            self._gathered = np.pad(self._gathered, (0, fresh))
        wanted = np.zeros(self._gathered.size, dtype=bool)
        wanted[places] = True
        missing = np.flatnonzero(wanted & ~self._gathered)
        if not missing.size:
            return
        ids = self._moves.names[missing]
        p = np.maximum(self._seen.gather(ids), LEAST)
        spots = self._automaton.spots
        spots[ids] = np.arange(ids.size)
        spot = spots.take(self.ids)
        spots[ids] = -1
        at, slot = np.nonzero((spot >= 0) & (self.p > 0))
        p[at, spot[at, slot]] = 0
        self.listed[:, missing] = p
        self._gathered[missing] = True

    def window(self, states: np.ndarray, begin: int, end: int) -> Window:
        """Of states, ascending."""
        kept = self._moves.of(states)
        self.gather(kept.places)
        slot, which, led = self._candidates(states, begin, end)
        count, width = len(self._automaton), self.ids.shape[1]
        known = np.zeros(count, dtype=bool)
        known[states] = True
        where_end = np.flatnonzero(states == END)  # whose only edge leads to itself
        kept_keys = np.append(kept.source * count + kept.target, where_end * count + END)
        keys = which * count + led
        number = np.zeros(states.size * count, dtype=np.int32)
        number[keys] = 1
        number[kept_keys] = 1
        edges = number.nonzero()[0]
        number[edges] = np.arange(edges.size)
        cell = np.repeat(np.arange(end - begin) * edges.size, width).take(slot)
        cell += number.take(keys)
        of_kept = number.take(kept_keys)
        source = edges // count
        target = edges - source * count
        best = np.zeros((end - begin, edges.size))
        best.ravel()[cell] = self.p[begin:end].ravel().take(slot)  # ascending: the last one stays
        found = Window(
            begin, end, known, kept, source, target,
            best, best, np.zeros((end - begin, states.size)), of_kept, slot, cell,
        )  # fmt: skip
        sums, listed = self.sums(found, self.p, self.listed)
        own = of_kept[: kept.first.size]
        if kept.first.size:
            most = np.maximum.reduceat(listed, kept.first, axis=1)
            best[:, own] = np.maximum(best[:, own], most)
        best[:, of_kept[kept.first.size :]] = 1
        return found._replace(sums=sums, rest=self._rest(kept, listed, begin, end))

    def _candidates(self, states: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, ...]:
        """Those of a window that lead anywhere, state by state: the place among all, the state's
        place, and the state that they lead to."""
        size = (end - begin) * self.ids.shape[1]
        going = np.flatnonzero(states != END)
        if not size or not going.size:
            return (np.zeros(0, dtype=np.intp),) * 3
        table = self._automaton.table(states[going], self.ids[begin:end].ravel())
        if not (self.p[begin:end, 0] > 0).all():
            table[:, self.p[begin:end].ravel() <= 0] = DEAD
        each, slot = np.count_nonzero(table, axis=1), table.ravel().nonzero()[0]
        led = table.ravel().take(slot)
        slot -= np.repeat(np.arange(0, table.size, size), each)
        return slot, np.repeat(going, each), led

    def sums(
        self, window: Window, p: np.ndarray, listed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of values [C, K] of the candidates and [C, n] of the listed ids: over each edge of a
        window, [count, e], and those that its states keep, [count, m]."""
        kept, rows = window.kept, slice(window.begin, window.end)
        shape = (window.end - window.begin, window.source.size)
        found = np.zeros(shape)
        if window.slot.size:
            values = p[rows].ravel().take(window.slot)
            found.ravel()[:] = np.bincount(window.cell, values, found.size)
        each = listed[rows].take(kept.places, axis=1)
        count = kept.first.size
        if count:
            found[:, window.of_kept[:count]] += np.add.reduceat(each, kept.first, axis=1)
        found[:, window.of_kept[count:]] = 1
        return found, each

    def _rest(self, kept: Kept, listed: np.ndarray, begin: int, end: int) -> np.ndarray:
        """What each state's ids leave."""
        found = np.zeros((end - begin, kept.states.size))
        if self._seen.whole:
            return found
        found[:] = 1 - self.total[begin:end, None]
        some = np.flatnonzero(kept.sizes)
        if some.size:
            first = (kept.sizes.cumsum() - kept.sizes)[some]
            found[:, some] -= np.add.reduceat(listed, first, axis=1)
        return np.maximum(found, 0, out=found)
