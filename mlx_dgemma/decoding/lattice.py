"""The states in which the texts of a language may stand at each position of a canvas.

Walked forward once: at every position the likely states and the sums over the ids that lead from
one to the next. Ids are a position's own candidates, and those that keep a state alive. They are
summed for many positions and states at once, those where texts stood on the canvas before.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import END
from mlx_dgemma.decoding.candidates import Candidates, Distributions, KeptMoves, Window

TINY = 1e-100  # of a state, relative to the most probable one; times `LEAST` it is no zero
_NEAREST = 8  # states kept for being nearest to an end of the text
_TOGETHER = 32  # positions whose states are remembered together
_MOST_EXPECTED = 128  # states whose moves are looked up before they are met


@dataclass(frozen=True)
class Lattice:
    """states: of each position up to the canvas's end, or to where all texts have ended, and those
    after the last. weights: their forward weights, the largest 1. windows: the moves, one window
    after the other."""

    automaton: Automaton
    candidates: Candidates
    moves: KeptMoves
    states: list[np.ndarray]
    weights: list[np.ndarray]
    windows: list[Window]


def explore(automaton: Automaton, seen: Distributions, start: int, most: int) -> Lattice:
    """Walks forward from a state, following at most so many states."""
    of_automaton = _memories.setdefault(automaton, {})
    memory = of_automaton.get(seen.whole)
    if memory is None:
        memory = of_automaton[seen.whole] = _Memory(automaton, whole=seen.whole)
    walk = _Walk(automaton, seen, memory)
    every, each = [np.array([start])], [np.ones(1)]
    for at in range(len(seen.ids)):
        states = every[-1]
        if states.size == 1 and states[0] == END:
            break
        mass = walk.step(at, states, each[-1])
        found = np.flatnonzero(mass)
        if not found.size:
            break
        if found.size > most:
            found = _beam(automaton, found, mass, most)
        weights = mass.take(found)
        every.append(found)
        each.append(np.maximum(weights / np.maximum.reduce(weights), TINY))
    windows = walk.windows(len(every) - 1)
    memory.remember(every[:-1])
    return Lattice(automaton, walk.candidates, memory.moves, every, each, windows)


class _Walk:
    """One canvas, position by position."""

    def __init__(self, automaton: Automaton, seen: Distributions, memory: _Memory) -> None:
        self._automaton, self._memory = automaton, memory
        self._length = len(seen.ids)
        self.candidates = Candidates(automaton, seen, memory.moves)
        self._windows: list[Window] = []
        self._ahead = 2  # positions of a window where nothing is remembered
        self._spread = np.zeros(len(automaton))
        if memory.stood:
            stood = np.unique(np.concatenate([*memory.stood.values()]))
            self.candidates.gather(memory.moves.of(stood).places)

    def step(self, at: int, states: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float64 [states]: the mass of each state after a position."""
        window = self._window(at, states)
        row, count = at - window.begin, len(self._automaton)
        if self._spread.size < count:
            self._spread = np.zeros(count)
        self._spread[states] = weights
        mine = self._spread.take(window.kept.states)
        self._spread[states] = 0
        mass = np.bincount(window.target, mine.take(window.source) * window.sums[row], count)
        # What no id stands for goes where some id goes.
        other = np.bincount(window.kept.typical, mine * window.rest[row], count)
        other *= mass > 0
        mass += other
        return mass

    def windows(self, count: int) -> list[Window]:
        """Up to a position."""
        found = [window for window in self._windows if window.begin < count]
        return [window.cut(count) if window.end > count else window for window in found]

    def _window(self, at: int, states: np.ndarray) -> Window:
        """The moves at a position, of its states and those expected after it."""
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
        window = self.candidates.window(union, at, end)
        self._windows.append(window)
        return window


class _Memory:
    """Of one automaton, from canvas to canvas: what follows from its states, and where they stood
    last. It spares work and changes nothing."""

    def __init__(self, automaton: Automaton, *, whole: bool) -> None:
        """whole: all ids of the vocabulary are listed everywhere."""
        self.moves = KeptMoves(automaton, whole=whole)
        self.stood: dict[int, np.ndarray] = {}  # by `_TOGETHER` positions

    def remember(self, states: list[np.ndarray]) -> None:
        for chunk in range(-(-len(states) // _TOGETHER)):
            fresh = states[chunk * _TOGETHER : (chunk + 1) * _TOGETHER]
            known = self.stood.get(chunk, fresh[0])
            every = np.unique(np.concatenate([known, *fresh]))
            if every.size > _MOST_EXPECTED:
                every = np.unique(np.concatenate(fresh))
            self.stood[chunk] = every


_memories: WeakKeyDictionary[Automaton, dict[bool, _Memory]] = WeakKeyDictionary()


def _beam(automaton: Automaton, found: np.ndarray, mass: np.ndarray, most: int) -> np.ndarray:
    """Those of the states found, ascending, to go on with."""
    kept = np.zeros(found.size, dtype=bool)
    kept[automaton.least.take(found).argsort(kind="stable")[:_NEAREST]] = True
    kept[(-mass.take(found)).argsort(kind="stable")[: most - _NEAREST]] = True
    return found[kept]
