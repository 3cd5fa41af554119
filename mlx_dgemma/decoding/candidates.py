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
_MOST_CELLS = 1_000_000  # numbers of one array of moves, positions times edges

# float64 [C, n]: probabilities of some ids at every position.
Gather = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Distributions:
    """What the network says of one canvas.

    ids: int64 [C, K] candidates, each position's ascending by probability. probabilities: float64
    [C, K] of them, 0 for none. gather: the probabilities of other ids. entropy: float64 [C] of the
    whole distribution, nats. argmax, sample: int [C]. whole: the candidates are the vocabulary.
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

    places [m]: the ids' in their list; state [m]: the place of the state that each is kept for. An
    edge joins a state to another by all its ids that lead there: those from `first` [e] on; source
    [e], a state's place; target [e], a state. sizes [s]: each state's ids. typical [s]: where an
    ordinary word leads each state, DEAD for nowhere.
    """

    places: np.ndarray
    state: np.ndarray
    first: np.ndarray
    source: np.ndarray
    target: np.ndarray
    sizes: np.ndarray
    typical: np.ndarray


class KeptMoves:
    """Of one automaton, state by state and set by set. It spares work and changes nothing."""

    def __init__(self, automaton: Automaton, *, whole: bool) -> None:
        """whole: every id is a candidate everywhere, and none needs to be kept."""
        self._automaton, self._whole = automaton, whole
        self._ways: dict[int, tuple[np.ndarray, ...]] = {}
        self._sets: dict[bytes, Kept] = {}
        self._moves = 0

    @property
    def names(self) -> np.ndarray:
        """int64 [n]: the ids that may be listed."""
        return self._automaton.alive_ids

    def of(self, states: np.ndarray) -> Kept:
        """Of states, ascending, END among them with no id."""
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
        if state == END or self._whole:
            return (np.zeros(0, dtype=np.intp),) * 3
        here = np.array([state])
        places = self._automaton.keep_alive(here)
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
        typical = np.full(states.size, DEAD, dtype=np.intp)
        if not self._whole:
            going = states != END  # all that follows an end is counted at once
            typical[going] = self._automaton.typical(states[going])
        each = np.arange(states.size)
        return Kept(
            np.concatenate([places for places, _, _ in ways]),
            np.repeat(each, sizes),
            first,
            np.repeat(each, edges),
            led[first],
            sizes,
            typical,
        )


class _Part(NamedTuple):
    """What the sums over some states' edges are made of.

    edges: how many. kept: the ids that keep the states alive; of_kept: their edges. of_end: those
    of END to itself. slot [m]: each candidate that leads anywhere, by its place among all of the
    positions; cell [m]: its position and class. Candidates that lead from every state to the same
    one are of one class, and are summed together; classes: how many. Classes whose ids lead along
    the same edge, `of_pairs`, are from `begins` on in `pairs`.
    """

    edges: int
    kept: Kept
    of_kept: np.ndarray
    of_end: np.ndarray
    slot: np.ndarray
    cell: np.ndarray
    classes: int
    pairs: np.ndarray
    begins: np.ndarray
    of_pairs: np.ndarray


class Moves(NamedTuple):
    """Where the ids of the positions [begin, end) lead from some states.

    states [s], ascending. An edge joins a state to another by all ids that lead there: source [e],
    the state's place; target [e], a state, or DEAD where nothing leads on. They are ordered by
    both, and each state's begin at first [s]. sums, best [count, e]: of the probabilities of the
    ids. rest [count, s]: what no id is listed for, and typical [s], the edge that an ordinary word
    goes along, -1 for none. parts, places: what the sums are made of, and where the edges of one
    part after the other are.
    """

    begin: int
    end: int
    states: np.ndarray
    source: np.ndarray
    target: np.ndarray
    first: np.ndarray
    sums: np.ndarray
    best: np.ndarray
    rest: np.ndarray
    typical: np.ndarray
    parts: tuple[_Part, ...]
    members: tuple[np.ndarray, ...]  # of each part's states, the places
    places: np.ndarray

    def cut(self, end: int, width: int) -> Moves:
        """The moves up to another end. width: of the candidates of a position."""
        count = end - self.begin
        if end == self.end:
            return self
        parts = []
        for part in self.parts:
            mine = part.slot < count * width
            parts.append(part._replace(slot=part.slot[mine], cell=part.cell[mine]))
        return self._replace(
            end=end,
            sums=self.sums[:count],
            best=self.best[:count],
            rest=self.rest[:count],
            parts=tuple(parts),
        )

    def joined(self, other: Moves) -> Moves:
        """With those of other states, at the same positions."""
        states = np.concatenate([self.states, other.states])
        place = np.empty(states.size, dtype=np.intp)
        place[states.argsort()] = np.arange(states.size)
        mine, others = place[: self.states.size], place[self.states.size :]
        source = np.concatenate([mine.take(self.source), others.take(other.source)])
        target = np.concatenate([self.target, other.target])
        order = np.lexsort((target, source))
        where = np.empty(order.size, dtype=np.intp)
        where[order] = np.arange(order.size)
        source = source[order]
        of_mine, of_others = where[: self.source.size], where[self.source.size :]
        typical = np.concatenate([_place(of_mine, self.typical), _place(of_others, other.typical)])
        by_place = place.argsort()
        return Moves(
            self.begin,
            self.end,
            states[by_place],
            source,
            target[order],
            np.searchsorted(source, np.arange(states.size)),
            _merged(self.sums, of_mine, other.sums, of_others),
            _merged(self.best, of_mine, other.best, of_others),
            _merged(self.rest, mine, other.rest, others),
            typical[by_place],
            self.parts + other.parts,
            (
                *(mine.take(part) for part in self.members),
                *(others.take(part) for part in other.members),
            ),
            np.concatenate([of_mine.take(self.places), of_others.take(other.places)]),
        )


def _merged(
    one: np.ndarray, of_one: np.ndarray, other: np.ndarray, of_other: np.ndarray
) -> np.ndarray:
    """[count, n] of the columns of two, by their places."""
    found = np.empty((len(one), of_one.size + of_other.size))
    found[:, of_one], found[:, of_other] = one, other
    return found


def _place(places: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Some places by a table, -1 for -1."""
    return np.where(some < 0, -1, places.take(some))


class Candidates:
    """A canvas's own candidates, and ids that are listed for keeping a state alive.

    ids, p: [C, K] its own, ascending by probability, 0 for none; total: float64 [C], their sum.
    listed: float64 [C, n], of the ids that may be listed, 0 for a candidate.
    """

    def __init__(self, automaton: Automaton, seen: Distributions, moves: KeptMoves) -> None:
        self._automaton, self._seen, self._moves = automaton, seen, moves
        p = seen.probabilities
        some = np.ones(p.shape, dtype=bool) if seen.whole else p > 0
        self.p = np.maximum(p, LEAST) * some
        self.ids = np.where(some, seen.ids, automaton.vocabulary.stop_ids.min(initial=0))
        self.listed = np.zeros((len(p), automaton.alive_ids.size))
        self.total = self.p.sum(axis=1)
        self._gathered = np.zeros(self.listed.shape[1], dtype=bool)
        automaton.transitions.prepare(self.ids.ravel())

    def gather(self, places: np.ndarray) -> None:
        """Sees to it that some listed ids' probabilities are there."""
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

    def moves(self, states: np.ndarray, begin: int, end: int) -> Moves:
        """Of states, ascending; of fewer positions where so many would take too much memory."""
        kept = self._moves.of(states)
        self.gather(kept.places)
        going = np.flatnonzero(states != END)
        which, ways = self._automaton.transitions.classes(
            states[going], self.ids[begin:end].ravel()
        )
        count = len(self._automaton)
        state, pairs = np.nonzero(ways)
        keys = going[state] * count + ways[state, pairs]
        order = keys.argsort(kind="stable")
        keys, pairs = keys[order], pairs[order]
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        keys = keys[begins]
        kept_keys = kept.source * count + kept.target
        end_keys = np.flatnonzero(states == END) * count + END
        some = np.flatnonzero(kept.typical)
        typical_keys = some * count + kept.typical[some]
        every = np.concatenate([keys, kept_keys, end_keys, typical_keys])
        lonely = np.ones(states.size, dtype=bool)
        lonely[every // count] = False
        every = np.unique(np.concatenate([every, np.flatnonzero(lonely) * count + DEAD]))
        source = every // count
        typical = np.full(states.size, -1, dtype=np.intp)
        typical[some] = np.searchsorted(every, typical_keys)
        most = max(every.size, kept.places.size, pairs.size)
        end = min(end, begin + max(1, _MOST_CELLS // most))
        width = self.ids.shape[1]
        slot = np.flatnonzero(
            (which[: (end - begin) * width] > 0) & (self.p[begin:end].ravel() > 0)
        )
        part = _Part(
            every.size,
            kept,
            np.searchsorted(every, kept_keys),
            np.searchsorted(every, end_keys),
            slot,
            slot // max(width, 1) * ways.shape[1] + which.take(slot),
            ways.shape[1],
            pairs,
            begins,
            np.searchsorted(every, keys),
        )
        sums, best, rest = self._values(part, begin, end)
        return Moves(
            begin, end, states, source, every - source * count,
            np.searchsorted(source, np.arange(states.size)),
            sums, best, rest, typical, (part,), (np.arange(states.size),), np.arange(every.size),
        )  # fmt: skip

    def sums(self, moves: Moves, p: np.ndarray, listed: np.ndarray) -> np.ndarray:
        """[count, e]: over each edge, of values [C, K] of the candidates and [C, n] of the listed
        ids; 1 for END's own."""
        found = np.empty((moves.end - moves.begin, moves.source.size))
        rows = slice(moves.begin, moves.end)
        parts = []
        for part in moves.parts:
            each = listed[rows].take(part.kept.places, axis=1)
            parts.append(_over(part, np.add, p[rows], each))
        found[:, moves.places] = np.concatenate(parts, axis=1)
        return found

    def _values(self, part: _Part, begin: int, end: int) -> tuple[np.ndarray, ...]:
        """Sums and best of a part's edges, and what each state's ids leave."""
        kept, shape = part.kept, (end - begin, part.kept.sizes.size)
        p, each = self.p[begin:end], self.listed[begin:end].take(kept.places, axis=1)
        sums, best = _over(part, np.add, p, each), _over(part, np.maximum, p, each)
        if self._seen.whole:
            return sums, best, np.zeros(shape)
        rest = np.repeat(1 - self.total[begin:end, None], shape[1], axis=1)
        some = np.flatnonzero(kept.sizes)
        if some.size:
            first = (kept.sizes.cumsum() - kept.sizes)[some]
            rest[:, some] -= np.add.reduceat(each, first, axis=1)
        return sums, best, np.maximum(rest, 0, out=rest)


def _over(part: _Part, how: np.ufunc, p: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """[count, edges]: sums (np.add) or maxima (np.maximum) over a part's edges.

    p: [count, K] of the candidates. listed: [count, m] of the ids that are kept.
    """
    count = len(p)
    found = np.zeros((count, part.edges))
    if part.slot.size:
        values = p.ravel().take(part.slot)
        classes = np.zeros(count * part.classes)
        if how is np.add:
            classes[:] = np.bincount(part.cell, values, classes.size)
        else:
            classes[part.cell] = values  # ascending: the last one stays
        each = classes.reshape(count, -1).take(part.pairs, axis=1)
        found[:, part.of_pairs] = how.reduceat(each, part.begins, axis=1)
    if part.of_kept.size:
        own = how.reduceat(listed, part.kept.first, axis=1)
        found[:, part.of_kept] = how(found.take(part.of_kept, axis=1), own)
    found[:, part.of_end] = 1
    return found
