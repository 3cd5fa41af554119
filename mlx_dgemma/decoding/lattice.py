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
from mlx_dgemma.decoding.candidates import Candidates, Distributions, KeptMoves, Moves

TINY = 1e-100  # of a state, relative to the most probable one; times `LEAST` it is no zero
_NEAREST = 8  # states kept for being nearest to an end of the text
_TOGETHER = 32  # positions whose states are remembered together
_MOST_EXPECTED = 128  # states whose moves are looked up before they are met
_AT_FIRST = 16  # positions whose moves are looked up together where nothing is remembered
_MOST_MORE = 64  # and those that may be met then


@dataclass(frozen=True)
class Stretch:
    """Positions whose states are listed together.

    moves: of these positions. goal: int [e], the place of each edge's target among the states,
    their number for none of them. weights: float64 [count + 1, s], forward, of each position's
    states and those after the last; the largest is 1, and 0 is a state that is not followed.
    """

    moves: Moves
    goal: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Lattice:
    """stretches: up to the canvas's end, or to where all texts have ended; start: where they begin.
    final: the states after the last, ascending."""

    automaton: Automaton
    candidates: Candidates
    moves: KeptMoves
    start: int
    stretches: list[Stretch]
    final: np.ndarray


def explore(automaton: Automaton, seen: Distributions, start: int, most: int) -> Lattice:
    """Walks forward from a state, following at most so many states."""
    of_automaton = _memories.setdefault(automaton, {})
    memory = of_automaton.get(seen.whole)
    if memory is None:
        memory = of_automaton[seen.whole] = _Memory(automaton, whole=seen.whole)
    walk = _Walk(automaton, seen, memory, most)
    stretches: list[Stretch] = []
    states, weights, at, length = np.array([start]), np.ones(1), 0, len(seen.ids)
    while at < length and (states.size > 1 or states[0] != END):
        stretch = walk.stretch(at, states, weights)
        if stretch.moves.end == at:
            break
        stretches.append(stretch)
        at, last = stretch.moves.end, stretch.weights[-1]
        states, weights = stretch.moves.states[last > 0], last[last > 0]
        if walk.stuck:
            break
    memory.remember(stretches)
    return Lattice(automaton, walk.candidates, memory.moves, start, stretches, states)


class _Walk:
    """One canvas, position by position. stuck: no id leads on."""

    def __init__(
        self, automaton: Automaton, seen: Distributions, memory: _Memory, most: int
    ) -> None:
        self._automaton, self._memory, self._most = automaton, memory, most
        self._length, self._width = seen.ids.shape
        self.candidates = Candidates(automaton, seen, memory.moves)
        self.stuck = False
        # Positions whose moves are looked up together: fewer where states keep coming.
        self._ahead = self._length if memory.begun else _AT_FIRST

    def stretch(self, begin: int, states: np.ndarray, weights: np.ndarray) -> Stretch:
        """The positions from `begin` on, up to where other states than these begin to matter."""
        expected, end = self._memory.expected(begin, self._length)
        end = min(end, begin + self._ahead)
        moves = self.candidates.moves(np.union1d(expected, [*states.tolist(), END]), begin, end)
        room = max(_MOST_EXPECTED, moves.states.size) + _MOST_MORE
        weight = np.zeros(moves.states.size)
        weight[np.searchsorted(moves.states, states)] = weights
        rows, at, end, goal = [weight], begin, moves.end, self._goals(moves)
        typical, least, ended = self._of_states(moves, goal)
        while at < end:
            sums, rest = moves.sums[at - begin], moves.rest[at - begin]
            flow, size = weight.take(moves.source) * sums, weight.size
            mass = np.bincount(goal, flow, size + 1)
            if mass[size]:  # some lead to states that were not expected
                fresh = np.unique(moves.target[(goal == size) & (flow > 0)])
                more = self.candidates.moves(fresh, begin, end)
                if more.end <= at:
                    break
                moves, rows = _joined(moves.cut(more.end, self._width), more, rows)
                weight, end, goal = rows[-1], moves.end, self._goals(moves)
                typical, least, ended = self._of_states(moves, goal)
                continue
            # What no id stands for goes where some id goes.
            there = mass > 0
            mass += np.bincount(typical, weight * rest, size + 1) * there
            mass, there = mass[:size], there[:size]
            found = np.count_nonzero(there)
            if not found:
                self.stuck = True
                break
            if found > self._most:
                there = self._beam(mass, least)
            mass *= 1 / np.maximum.reduce(mass)
            weight = np.maximum(mass, TINY) * there
            rows.append(weight)
            at += 1
            if size > room or (weight[ended] and found == 1):
                break
        self._ahead = 2 * self._ahead if at == end else max(at - begin, _AT_FIRST // 2)
        moves = moves.cut(at, self._width)
        return Stretch(moves, goal, np.array(rows))

    def _goals(self, moves: Moves) -> np.ndarray:
        place = np.full(len(self._automaton), moves.states.size, dtype=np.intp)
        place[moves.states] = np.arange(moves.states.size)
        found: np.ndarray = place.take(moves.target)
        return found

    def _of_states(self, moves: Moves, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Where an ordinary word leads each, how far its texts' ends are, and the place of END."""
        typical = np.where(moves.typical < 0, moves.states.size, goal.take(moves.typical))
        least = self._automaton.least.take(moves.states)
        return typical, least, int(np.searchsorted(moves.states, END))

    def _beam(self, mass: np.ndarray, least: np.ndarray) -> np.ndarray:
        """bool: the states to go on with."""
        found = mass.nonzero()[0]
        kept = np.zeros(mass.size, dtype=bool)
        kept[found[least.take(found).argsort(kind="stable")[:_NEAREST]]] = True
        kept[found[(-mass.take(found)).argsort(kind="stable")[: self._most - _NEAREST]]] = True
        return kept


class _Memory:
    """Of one automaton, from canvas to canvas: what follows from its states, and where they stood
    last. It spares work and changes nothing."""

    def __init__(self, automaton: Automaton, *, whole: bool) -> None:
        """whole: every id is a candidate everywhere."""
        self.moves = KeptMoves(automaton, whole=whole)
        self._stood: dict[int, np.ndarray] = {}  # by `_TOGETHER` positions

    @property
    def begun(self) -> bool:
        """Whether there was a canvas before."""
        return bool(self._stood)

    def expected(self, begin: int, length: int) -> tuple[np.ndarray, int]:
        """States from a position on, and up to where."""
        found = np.zeros(0, dtype=np.int64)
        for chunk in range(begin // _TOGETHER, -(-length // _TOGETHER)):
            more = np.union1d(found, self._stood.get(chunk, found))
            if found.size and more.size > _MOST_EXPECTED:
                return found, chunk * _TOGETHER
            found = more
        return found, length

    def remember(self, stretches: list[Stretch]) -> None:
        fresh: dict[int, np.ndarray] = {}
        for stretch in stretches:
            moves = stretch.moves
            for chunk in range(moves.begin // _TOGETHER, -(-moves.end // _TOGETHER)):
                first, last = (place * _TOGETHER - moves.begin for place in (chunk, chunk + 1))
                there = stretch.weights[:-1][max(first, 0) : last].any(axis=0)
                some = moves.states[there]
                fresh[chunk] = np.union1d(fresh.get(chunk, some), some)
        for chunk, some in fresh.items():
            every = np.union1d(self._stood.get(chunk, some), some)
            self._stood[chunk] = some if every.size > _MOST_EXPECTED else every


def _joined(moves: Moves, more: Moves, rows: list[np.ndarray]) -> tuple[Moves, list[np.ndarray]]:
    """The moves of more states, and the weights by their places."""
    joined = moves.joined(more)
    weights = np.zeros((len(rows), joined.states.size))
    weights[:, np.searchsorted(joined.states, moves.states)] = rows
    return joined, [*weights]


_memories: WeakKeyDictionary[Automaton, dict[bool, _Memory]] = WeakKeyDictionary()
