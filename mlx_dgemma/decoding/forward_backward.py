"""What a lattice's positions tell each other: the best text, a draw of one, the ids' shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.transitions import DEAD, END
from mlx_dgemma.decoding.candidates import Window
from mlx_dgemma.decoding.lattice import TINY, Lattice

_NEVER = 1e-300
_FLOOR = 1e-30  # of a legal move, relative to the most probable one of its position
_SHARE = 1e-10  # of a position's texts; ids of states with less are not listed
_AT_ONCE = 100_000  # ids of states that are looked at together
_TOGETHER = 32  # positions that list the same ids


class Shares(NamedTuple):
    """Of all texts: own [count, n] those where each listed id stands, beyond `other`; ended [count]
    those that have ended; other [count], relative to an id's probability, those where it stands
    because it is listed nowhere. left_out: the most probability that some state has no id for.

    ids int [count, n], p [count, n]: what the positions list, with probability 0 where it is
    nothing; `rest` [count], what they do not list.
    """

    ids: np.ndarray
    p: np.ndarray
    rest: np.ndarray
    own: np.ndarray
    ended: np.ndarray
    other: np.ndarray
    left_out: float


class _Cells(NamedTuple):
    """Where a window's edges lie in the matrices: of those `within`, bool [count, e], the places in
    the flat matrices, `cell`; `rest` and `rest_cell` likewise, of what no id is listed for. state
    [count, s]: the place of each of its states, -1 where it is none."""

    within: np.ndarray
    cell: np.ndarray
    rest: np.ndarray
    rest_cell: np.ndarray
    state: np.ndarray


class Messages:
    """The moves of a lattice as matrices [count, s, s], of the places of the states of a position
    and of the one after it, and what follows from them once `aim` has said where a text may stand.

    count: positions. final: the states after the last.
    """

    def __init__(self, lattice: Lattice) -> None:
        self._lattice, self.final = lattice, lattice.states[-1]
        self.count = count = len(lattice.states) - 1
        sizes = np.array([states.size for states in lattice.states])
        self._width = width = int(sizes.max())
        at = np.repeat(np.arange(count + 1), sizes)
        place = np.arange(at.size) - (np.cumsum(sizes) - sizes)[at]
        every = np.concatenate(lattice.states)
        self._where = np.full((count + 1, len(lattice.automaton)), -1, dtype=np.int16)
        self._where[at, every] = place
        self._states = np.full((count + 1, width), DEAD)
        self._states[at, place] = every
        self._is_end = self._states == END
        forward = np.zeros((count + 1, width))
        forward[at, place] = np.concatenate(lattice.weights)
        self._forward = forward[:-1]
        self._cells = [self._find(window) for window in lattice.windows]
        self._sums = self._matrix([window.sums for window in lattice.windows])
        # Rounded to a power of two, so that nothing is rounded when it divides.
        top = (self._sums * (self._forward > 0)[..., None]).max(axis=(1, 2), initial=0)
        self._top = np.exp2(np.floor(np.log2(np.maximum(top, _NEVER))))
        self._listed = self._scaled(self._sums, self._top)
        self._all = self._with_rest(self._listed)
        self._moves = self._logs()

    def _find(self, window: Window) -> _Cells:
        rows = np.arange(window.begin, window.end)[:, None]
        source = self._where[rows, window.kept.states]
        within, cell = self._cells_of(rows, source.take(window.source, axis=1), window.target)
        rest, rest_cell = self._cells_of(rows, source, window.kept.typical)
        return _Cells(within, cell, rest, rest_cell, source)

    def _cells_of(
        self, rows: np.ndarray, place: np.ndarray, state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of moves at positions from a place among the states to a state."""
        goal = self._where[rows + 1, state]
        within = (place >= 0) & (goal >= 0)
        at, which = np.nonzero(within)
        place, goal = place[at, which].astype(np.int64), goal[at, which]
        return within, ((at + rows[0, 0]) * self._width + place) * self._width + goal

    def _matrix(self, sums: list[np.ndarray]) -> np.ndarray:
        """By window, given values of its edges."""
        found = np.zeros(self.count * self._width * self._width)
        for part, cells in zip(sums, self._cells, strict=True):
            found[cells.cell] = part[cells.within]
        return found.reshape(self.count, self._width, self._width)

    def _scaled(self, sums: np.ndarray, top: np.ndarray) -> np.ndarray:
        found: np.ndarray = sums / top[:, None, None]
        np.maximum(found, _FLOOR * (sums > 0), out=found)
        return found

    def _with_rest(self, listed: np.ndarray) -> np.ndarray:
        """And what no id is listed for, which goes where some id goes."""
        found = listed.copy()
        reached = ((listed > 0) & (self._forward > 0)[..., None]).any(axis=1).ravel()
        self._aside = []
        for window, cells in zip(self._lattice.windows, self._cells, strict=True):
            at, which = np.nonzero(cells.rest)
            goal = cells.rest_cell % self._width
            going = reached.take((at + window.begin) * self._width + goal)
            at, which, cell = at[going], which[going], cells.rest_cell[going]
            found.ravel()[cell] += window.rest[at, which] / self._top[at + window.begin]
            self._aside.append((at, which, cell))
        return found

    def _logs(self) -> np.ndarray:
        """The logarithm of the most probable id of each move."""
        found = self._matrix([window.best for window in self._lattice.windows]).ravel()
        some = np.flatnonzero(found)
        logs = np.full(found.size, -np.inf)
        logs[some] = np.log(found[some])
        return logs.reshape(self._sums.shape)

    def aim(self, allowed: np.ndarray, ends_by: int | None) -> bool:
        """Says where a text may stand: in `allowed`, bool, of the last states, and ended from the
        position `ends_by` on. False where no text does."""
        self._allowed, self._by = allowed, ends_by
        logs = self._moves
        best = np.full((self.count + 1, self._width), -np.inf)
        best[-1, : allowed.size][allowed] = 0
        for at in range(self.count - 1, -1, -1):
            here = np.maximum.reduce(logs[at] + best[at + 1], axis=1)
            if ends_by is not None and at >= ends_by:
                here[~self._is_end[at]] = -np.inf
            best[at] = here
        self._best = best
        self._alive = best > -np.inf
        if not self._alive[0].any():
            return False
        self._behind = self._backward(self._all)
        return True

    def _backward(self, moves: np.ndarray) -> np.ndarray:
        """[count + 1, s]: all texts after each state, scaled by position."""
        behind = np.zeros((self.count + 1, self._width))
        behind[-1, : self._allowed.size] = self._allowed
        least = self._alive * TINY
        for at in range(self.count - 1, -1, -1):
            here = moves[at] @ behind[at + 1]
            if self._by is not None and at >= self._by:
                here *= self._is_end[at]
            here *= 1 / (np.maximum.reduce(here) or 1.0)
            np.maximum(here, least[at], out=behind[at])
        return behind

    def draft(self, ended: np.ndarray) -> np.ndarray:
        """int32 [C]: the best text; what stands after its end is taken from `ended`."""

        def pick(at: int, place: int) -> int:
            return int((self._moves[at, place] + self._best[at + 1]).argmax())

        text = np.array(ended, dtype=np.int32)
        path = self._path(pick)
        ids, weights = self._leading(path)
        count = len(path) - 1
        if count:
            text[:count] = ids[np.arange(count), weights.argmax(axis=1)]
        return text

    def sample(self, ended: np.ndarray, uniforms: np.ndarray, temp: float) -> np.ndarray:
        """int32 [C]: a draw of a text; what stands after its end is taken from `ended`."""
        listed, behind = self._listed, self._behind
        if temp != 1:
            listed = self._raised(1 / temp)
            behind = self._backward(self._with_rest(listed))
        behind = behind * self._alive
        left = np.array(uniforms)

        def pick(at: int, place: int) -> int:
            weights = listed[at, place] * behind[at + 1]
            total = weights.cumsum()
            drawn = uniforms[at] * total[-1]
            chosen = min(int(total.searchsorted(drawn, "right")), int(weights.nonzero()[0][-1]))
            left[at] = (drawn - total[chosen] + weights[chosen]) / weights[chosen]
            return chosen

        text = np.array(ended, dtype=np.int32)
        path = self._path(pick)
        count = len(path) - 1
        if not count:
            return text
        ids, weights = self._leading(path)
        weights = (weights / weights.max(axis=1, keepdims=True)) ** (1 / temp)
        total = weights.cumsum(axis=1)
        drawn = np.clip(left[:count], 0, 1) * total[:, -1]
        last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1)
        chosen = np.minimum((total <= drawn[:, None]).sum(axis=1), last)
        text[:count] = ids[np.arange(count), chosen]
        return text

    def _path(self, pick: Callable[[int, int], int]) -> list[int]:
        """The states of a text, from its first to its last, given their places one by one."""
        place, path = 0, [int(self._states[0, 0])]
        for at in range(self.count):
            if self._is_end[at, place]:
                break
            place = pick(at, place)
            path.append(int(self._states[at + 1, place]))
        return path

    def _leading(self, path: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """ids, probabilities [m, n]: of a path of m moves, with 0 for those that lead elsewhere."""
        states, count = np.array(path), len(path) - 1
        candidates, moves = self._lattice.candidates, self._lattice.moves
        ways = [moves.way(state) for state in path[:-1]]
        most = max((places.size for places, _, _ in ways), default=0)
        places, led = np.zeros((2, count, most), dtype=np.intp)
        for at, (some, _, targets) in enumerate(ways):
            places[at, : some.size], led[at, : some.size] = some, targets
        ids = np.concatenate([candidates.ids[:count], moves.names.take(places)], axis=1)
        listed = np.take_along_axis(candidates.listed[:count], places, axis=1)
        p = np.concatenate([candidates.p[:count], listed], axis=1)
        own = self._lattice.automaton.transitions.each(states[:-1], candidates.ids[:count])
        return ids, p * (np.concatenate([own, led], axis=1) == states[1:, None])

    def _raised(self, power: float) -> np.ndarray:
        """The moves by listed ids, each id's probability, relative to its position's top, to a
        power."""
        candidates, top = self._lattice.candidates, self._top[:, None]

        def raised(p: np.ndarray) -> np.ndarray:
            return np.where(p[: self.count] > 0, np.maximum(p[: self.count] / top, _FLOOR), 0)

        p, listed = raised(candidates.p) ** power, raised(candidates.listed) ** power
        sums = [candidates.sums(window, p, listed)[0] for window in self._lattice.windows]
        found = self._matrix(sums)
        highest: np.ndarray = (found * (self._forward > 0)[..., None]).max(axis=(1, 2), initial=0)
        found /= np.maximum(highest, _NEVER)[:, None, None]
        return found

    def shares(self) -> Shares:
        """Of what the positions list, and of what they do not."""
        behind = self._behind
        forward = self._forward * (behind[:-1] > 0)
        through = forward * (self._all @ behind[1:, :, None])[..., 0]
        total = np.maximum(through.sum(axis=1, keepdims=True), _NEVER)
        aside = np.zeros((self.count, self._width))
        for window, (at, _, cell) in zip(self._lattice.windows, self._aside, strict=True):
            at = at + window.begin
            goal = behind[at + 1, cell % self._width]
            aside.ravel()[cell // self._width] = goal / self._top[at]
        flow = forward * aside / total
        other = flow.sum(axis=1)
        is_end = self._is_end[:-1]
        ended = (through * is_end).sum(axis=1) / total[:, 0]
        some = (through > _SHARE * total) & ~is_end
        left_out = 0.0
        for window, cells in zip(self._lattice.windows, self._cells, strict=True):
            rows = np.arange(window.begin, window.end)[:, None]
            mine = (cells.state >= 0) & some[rows, cells.state]
            left_out = max(left_out, float(window.rest[mine].max(initial=0)))
        ids, p, own = self._each(some, forward / total, flow, other)
        return Shares(ids, p, np.maximum(1 - p.sum(axis=1), 0), own, ended, other, left_out)

    def _each(
        self, some: np.ndarray, forward: np.ndarray, flow: np.ndarray, other: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, p and own [count, n] of `Shares`: the candidates, and what `some` states list.

        some: bool [count, s]. forward: their weights, relative to all texts. flow: of the texts
        through each, those by an id that is not listed, relative to its probability.
        """
        candidates, moves = self._lattice.candidates, self._lattice.moves
        at, place = np.nonzero(some)
        states = self._states[at, place]
        spot, places, there = self._lists(at, states)
        chunk = np.arange(self.count) // _TOGETHER
        listed = np.take_along_axis(candidates.listed[: self.count], places[chunk], 1)
        listed *= there[chunk]
        ids = np.concatenate(
            [candidates.ids[: self.count], moves.names.take(places)[chunk]], axis=1
        )
        p = np.concatenate([candidates.p[: self.count], listed], axis=1)
        width = candidates.ids.shape[1]
        own = p * other[:, None]
        own[:, :width] = 0
        ends = np.cumsum([width + moves.way(state)[0].size for state in states.tolist()])
        for part in np.unique(ends // _AT_ONCE).tolist():
            mine = ends // _AT_ONCE == part
            here, where, state = at[mine], place[mine], states[mine]
            sums = self._sums[here, where]
            share = np.divide(self._listed[here, where], sums, out=sums.copy(), where=sums > 0)
            carried = np.zeros((here.size, self._width + 1))  # by each move; no move is the last
            carried[:, :-1] = share * self._behind[here + 1] * forward[here, where, None]
            if width:
                self._add_candidates(own, here, state, carried)
            self._add_listed(own, spot, here, state, carried, flow[here, where])
        return ids, p, own

    def _lists(
        self, at: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is listed for states, by so many positions together: each id's place among them,
        [chunks, names]; the ids' places among all [chunks, n]; and which are there, bool."""
        moves = self._lattice.moves
        mine = np.zeros((-(-self.count // _TOGETHER), moves.names.size), dtype=bool)
        for chunk, state in set(zip((at // _TOGETHER).tolist(), states.tolist(), strict=True)):
            mine[chunk, moves.way(state)[0]] = True
        spot, sizes = mine.cumsum(axis=1) - 1, mine.sum(axis=1)
        chunk, place = np.nonzero(mine)
        places = np.zeros((len(mine), sizes.max(initial=0)), dtype=np.intp)
        places[chunk, spot[chunk, place]] = place
        return spot, places, np.arange(places.shape[1]) < sizes[:, None]

    def _add_candidates(
        self, own: np.ndarray, at: np.ndarray, states: np.ndarray, carried: np.ndarray
    ) -> None:
        candidates = self._lattice.candidates
        led = self._lattice.automaton.transitions.each(states, candidates.ids[at])
        goal = self._where[at[:, None] + 1, led]
        value = carried[np.arange(at.size)[:, None], goal] * candidates.p[at]
        first = np.flatnonzero(np.diff(at, prepend=-1))
        own[at[first], : value.shape[1]] += np.add.reduceat(value, first, axis=0)

    def _add_listed(
        self,
        own: np.ndarray,
        spot: np.ndarray,
        at: np.ndarray,
        states: np.ndarray,
        carried: np.ndarray,
        flow: np.ndarray,
    ) -> None:
        candidates = self._lattice.candidates
        kept, which = np.unique(states, return_inverse=True)
        ways = [self._lattice.moves.way(state) for state in kept.tolist()]
        sizes = np.array([places.size for places, _, _ in ways])
        length = sizes[which]
        row = np.repeat(np.arange(at.size), length)
        begin = (sizes.cumsum() - sizes)[which] - (length.cumsum() - length)
        each = np.arange(row.size) + np.repeat(begin, length)
        place = np.concatenate([places for places, _, _ in ways]).take(each)
        led = np.concatenate([led for _, _, led in ways]).take(each)
        here = at.take(row)
        value = carried[row, self._where[here + 1, led]] - flow.take(row)
        value *= candidates.listed[here, place]
        width = candidates.ids.shape[1]
        cell = here * own.shape[1] + width + spot[here // _TOGETHER, place]
        own += np.bincount(cell, value, own.size).reshape(own.shape)
