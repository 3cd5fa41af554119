"""The states in which the texts of a language may stand at each position of a canvas.

Walked forward once: at every position the likely states and the sums over the ids that lead from
one to the next. Ids are a position's own candidates, whose moves are summed for many positions at
once, and those that keep its states alive, whose moves are the same wherever the same states stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import DEAD, END
from mlx_dgemma.decoding.candidates import Candidates, Distributions, Window

TINY = 1e-250  # of a state, relative to the most probable one
_FLOOR = 1e-30  # of a legal id, relative to the most probable legal one
_NEAREST = 8  # states kept for being nearest to an end of the text
_TOGETHER = 32  # positions whose states are remembered together
_MOST_EXPECTED = 128  # states whose moves are looked up before they are met
_MOST_MOVES = 1_000_000  # of all skeletons that are kept


class Skeleton(NamedTuple):
    """What is the same wherever some states stand: their moves by the ids that keep them alive.

    places: int [x], of the ids in their list. An edge joins a state to another by all ids that
    lead there: source [e], its place among the states; target [e], a state. pairs [m]: the place of
    each edge's ids, edge by edge from `first` [e] on. by_id [m]: the edges of each id, id by id
    from `id_first` on, for the ids at `id_at` of `places`.
    typical [s]: where an ordinary word leads each state, DEAD for nowhere.
    """

    places: np.ndarray
    source: np.ndarray
    target: np.ndarray
    pairs: np.ndarray
    first: np.ndarray
    by_id: np.ndarray
    id_first: np.ndarray
    id_at: np.ndarray
    typical: np.ndarray


class Layer(NamedTuple):
    """One position: its states and their forward weights [s]; `sums` and `best` [e] of the edges of
    its skeleton; `top`, the most probable legal id; `floor`, what a legal id counts for at least;
    `rest`, what no id is listed for, and `aside` [s], where that leads, DEAD for nowhere."""

    states: np.ndarray
    weights: np.ndarray
    skeleton: Skeleton
    sums: np.ndarray
    best: np.ndarray
    top: float
    floor: float
    rest: float
    aside: np.ndarray


@dataclass(frozen=True)
class Lattice:
    """layers: of the positions up to the canvas's end, or to where all texts have ended.
    windows: the candidates' moves, one window behind the other. final: the states after the last
    layer."""

    automaton: Automaton
    candidates: Candidates
    layers: list[Layer]
    windows: list[Window]
    final: np.ndarray


def explore(automaton: Automaton, seen: Distributions, start: int, most: int) -> Lattice:
    """Walks forward from a state, following at most so many states."""
    of_automaton = _memories.setdefault(automaton, {})
    memory = of_automaton.get(seen.whole)
    if memory is None:
        memory = of_automaton[seen.whole] = _Memory(automaton, whole=seen.whole)
    walk = _Walk(automaton, seen, memory)
    states, weights = np.array([start]), np.ones(1)
    for at in range(len(seen.ids)):
        if states.size == 1 and states[0] == END:
            break
        mass = walk.step(at, states, weights)
        found = np.flatnonzero(mass)
        if not found.size:
            break
        states = _beam(automaton, found, mass, most)
        weights = mass.take(states)
        weights = np.maximum(weights / weights.max(), TINY)
    return walk.lattice(states)


class _Walk:
    """One canvas, position by position."""

    def __init__(self, automaton: Automaton, seen: Distributions, memory: _Memory) -> None:
        self._automaton, self._memory, self._whole = automaton, memory, seen.whole
        self._length = len(seen.ids)
        self._candidates = Candidates(automaton, seen)
        self._layers: list[Layer] = []
        self._windows: list[Window] = []
        self._gathered: set[int] = set()  # skeletons whose ids' probabilities are there
        self._ahead = 2  # positions of a window where nothing is remembered
        if memory.stood and not seen.whole:
            stood = np.unique(np.concatenate([*memory.stood.values()]))
            self._candidates.gather(automaton.keep_alive(stood))

    def step(self, at: int, states: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Adds a layer; float64 [states]: the mass of each state after it."""
        candidates, skeleton = self._candidates, self._memory.skeleton(states)
        if id(skeleton) not in self._gathered:
            candidates.gather(skeleton.places)
            self._gathered.add(id(skeleton))
        window = None if self._whole else self._window(at, states)
        count = len(self._automaton)
        row = candidates.listed[at]
        listed = row.take(skeleton.pairs)
        came = own = np.zeros(0)
        if window is not None:
            spread = np.zeros(count)
            spread[states] = weights
            came, own = spread.take(window.source), window.sums[at - window.begin]
        top, floor, rest = 1.0, 0.0, 0.0
        if min(candidates.least[at], np.minimum.reduce(listed, initial=1)) < _FLOOR:
            best = 0 if window is None else window.best[at - window.begin] * (came > 0)
            top = max(listed.max(initial=0), np.max(best, initial=0)) or 1.0
            floor = top * _FLOOR
            listed = np.where(listed > 0, np.maximum(listed, floor), 0)
            if window is not None and candidates.least[at] < floor:
                window.raised(at, floor)
            weights_here, came = weights / top, came / top
        else:
            weights_here = weights
        sums = best = np.zeros(0)
        if listed.size:
            sums = np.add.reduceat(listed, skeleton.first)
            best = np.maximum.reduceat(listed, skeleton.first)
        mass = np.bincount(skeleton.target, weights_here.take(skeleton.source) * sums, count)
        if window is not None:
            mass += np.bincount(window.target, came * own, count)
            rest = max(1 - candidates.total[at] - np.add.reduce(row.take(skeleton.places)), 0.0)
        mass[END] += weights_here[states == END].sum()
        aside = skeleton.typical
        if rest > 0:  # what no id stands for goes where some id goes
            aside = np.where(mass.take(aside) > 0, aside, DEAD)
            mass += np.bincount(aside, weights_here * rest, count)
            mass[DEAD] = 0
        self._layers.append(Layer(states, weights, skeleton, sums, best, top, floor, rest, aside))
        return mass

    def lattice(self, final: np.ndarray) -> Lattice:
        self._memory.remember([layer.states for layer in self._layers])
        return Lattice(self._automaton, self._candidates, self._layers, self._windows, final)

    def _window(self, at: int, states: np.ndarray) -> Window:
        """The candidates' moves at a position, of its states and those expected behind it."""
        last = self._windows[-1] if self._windows else None
        if last is not None and at < last.end:
            if states[-1] < last.known.size and last.known.take(states).all():
                return last
            self._windows[-1] = last.cut(at)
            self._ahead = 1
        chunk = at // _TOGETHER
        end = min((chunk + 1) * _TOGETHER, self._length)
        stood = self._memory.stood.get(chunk)
        expected = [states] if stood is None else [states, stood]
        if last is not None:
            expected.append(np.flatnonzero(last.known))
        if stood is None:
            self._ahead *= 2
            end = min(end, at + self._ahead)
        union = np.unique(np.concatenate(expected))
        if union.size > _MOST_EXPECTED:
            union = np.unique(np.concatenate(expected[:2]))
        window = self._candidates.window(union, at, end)
        self._windows.append(window)
        return window


class _Memory:
    """Of one automaton, from canvas to canvas: what follows from its states, and where they stood
    last. It spares work and changes nothing."""

    def __init__(self, automaton: Automaton, *, whole: bool) -> None:
        """whole: all ids of the vocabulary are listed everywhere."""
        self._automaton, self._whole = automaton, whole
        self._skeletons: dict[bytes, Skeleton] = {}
        self._moves = 0
        self._ways: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        self.stood: dict[int, np.ndarray] = {}  # by `_TOGETHER` positions

    def remember(self, states: list[np.ndarray]) -> None:
        for chunk in range(-(-len(states) // _TOGETHER)):
            fresh = states[chunk * _TOGETHER : (chunk + 1) * _TOGETHER]
            known = self.stood.get(chunk, fresh[0])
            every = np.unique(np.concatenate([known, *fresh]))
            if every.size > _MOST_EXPECTED:
                every = np.unique(np.concatenate(fresh))
            self.stood[chunk] = every

    def skeleton(self, states: np.ndarray) -> Skeleton:
        key = states.tobytes()
        found = self._skeletons.get(key)
        if found is None:
            if self._moves > _MOST_MOVES:
                self._skeletons, self._moves = {}, 0
            found = self._skeletons[key] = self._make(states)
            self._moves += found.pairs.size
        return found

    def _make(self, states: np.ndarray) -> Skeleton:
        automaton = self._automaton
        if self._whole:
            places = listed = np.arange(automaton.vocabulary.size)
        else:
            places = automaton.keep_alive(states)
            listed = automaton.alive_ids
        ways = [self._way(state, listed) for state in states.tolist()]
        source = np.repeat(np.arange(states.size), [pairs.size for pairs, _ in ways])
        pairs = np.concatenate([pairs for pairs, _ in ways])
        target = np.concatenate([target for _, target in ways])
        if not self._whole:
            mine = np.zeros(listed.size, dtype=bool)
            mine[places] = True
            chosen = mine.take(pairs)
            source, pairs, target = source[chosen], pairs[chosen], target[chosen]
        fresh = _changes(source) | _changes(target)
        order = np.argsort(pairs, kind="stable")
        id_first = np.flatnonzero(_changes(pairs[order]))
        first = np.flatnonzero(fresh)
        typical = automaton.typical(states).astype(np.intp)
        typical[states == END] = DEAD  # all that follows is counted at once
        return Skeleton(
            places,
            source[first],
            target[first],
            pairs,
            first,
            (np.cumsum(fresh) - 1)[order],
            id_first,
            np.searchsorted(places, pairs[order[id_first]]),
            typical,
        )

    def _way(self, state: int, listed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the listed ids that lead anywhere from a state, by target, and the targets."""
        known = self._ways.get(state)
        if known is None or known[0] < listed.size:
            pairs, target = np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp)
            if state != END:
                row = self._automaton.table(np.array([state]), listed)[0]
                pairs = np.flatnonzero(row)
                pairs = pairs[np.argsort(row[pairs], kind="stable")]
                target = row[pairs].astype(np.intp)
            known = self._ways[state] = (listed.size, pairs, target)
        return known[1], known[2]


_memories: WeakKeyDictionary[Automaton, dict[bool, _Memory]] = WeakKeyDictionary()


def _changes(values: np.ndarray) -> np.ndarray:
    """bool [n]: where a value differs from the one before; true for the first."""
    found = np.ones(values.size, dtype=bool)
    np.not_equal(values[1:], values[:-1], out=found[1:])
    return found


def _beam(automaton: Automaton, found: np.ndarray, mass: np.ndarray, most: int) -> np.ndarray:
    """Those of the states found, ascending, to go on with."""
    if found.size <= most:
        return found
    kept = np.zeros(found.size, dtype=bool)
    kept[np.argsort(automaton.least[found], kind="stable")[:_NEAREST]] = True
    kept[np.argsort(-mass[found], kind="stable")[: most - _NEAREST]] = True
    return found[kept]
