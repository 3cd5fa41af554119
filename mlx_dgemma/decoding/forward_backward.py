"""What a lattice's positions tell each other: the best text, a draw of one, the ids' shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.transitions import DEAD, END
from mlx_dgemma.decoding.lattice import TINY, Lattice

_NEVER = 1e-300


class _Cells(NamedTuple):
    """Where edges lie in the matrices: of those `within`, bool [...], the places in the flat
    matrices `cell`, in the flat forward weights `before` and in the flat messages `behind`."""

    within: np.ndarray
    cell: np.ndarray
    before: np.ndarray
    behind: np.ndarray


class Messages:
    """The moves of a lattice as matrices [count, s, s], of the places of the states of a layer and
    of the one after it, and what follows from them once `aim` has said where a text may stand.

    count: positions. final: the states after the last. ids int [count, n], p [count, n]: what the
    positions list, with probability 0 where it is nothing. rest [count]: what they do not list.
    """

    def __init__(self, lattice: Lattice) -> None:
        layers = self._layers = lattice.layers
        self._lattice, self.final = lattice, lattice.final
        self.count = count = len(layers)
        stood = [*(layer.states for layer in layers), lattice.final]
        sizes = np.array([states.size for states in stood])
        self._width = width = int(sizes.max())
        at = np.repeat(np.arange(count + 1), sizes)
        place = np.arange(at.size) - (np.cumsum(sizes) - sizes)[at]
        every = np.concatenate(stood)
        self._where = np.full((count + 1, len(lattice.automaton)), -1, dtype=np.int16)
        self._where[at, every] = place
        self._states = np.full((count + 1, width), DEAD)
        self._states[at, place] = every
        self._is_end = self._states == END
        self._forward = np.zeros((count, width))
        self._forward.ravel()[(at * width + place)[: at.size - sizes[-1]]] = np.concatenate(
            [np.zeros(0), *(layer.weights for layer in layers)]
        )
        self._top = np.array([layer.top for layer in layers])
        self._floor = np.array([layer.floor for layer in layers])
        self.rest = np.array([layer.rest for layer in layers])
        self._windows = [
            window.cut(count) if window.end > count else window
            for window in lattice.windows
            if window.begin < count
        ]
        self._place_edges()
        self._list()
        listed = [layer.sums for layer in layers]
        self._listed = self._matrix(listed, [window.sums for window in self._windows])
        self._all = self._with_rest(self._listed)
        self._moves = self._logs()

    def _place_edges(self) -> None:
        kept = [layer.skeleton for layer in self._layers]
        self._sizes = sizes = np.array([one.source.size for one in kept], dtype=np.int64)
        at = self._at = np.repeat(np.arange(self.count), sizes)
        source = np.concatenate([np.zeros(0, dtype=np.int64), *(one.source for one in kept)])
        target = np.concatenate([np.zeros(0, dtype=np.int64), *(one.target for one in kept)])
        self._kept = self._cells(at, source, target)
        self._seen = []
        for window in self._windows:
            rows = np.arange(window.begin, window.end)[:, None]
            source = self._where[rows, window.source].astype(np.int64)
            self._seen.append(self._cells(rows, source, window.target))
        at, place = np.nonzero(self._is_end[:-1])
        self._ended_at, self._ended = at, self._cells(at, place, np.full(at.size, END))
        each = [layer.aside.size for layer in self._layers]
        at = self._rest_at = np.repeat(np.arange(self.count), each)
        place = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(n) for n in each)])
        aside = np.concatenate(
            [np.zeros(0, dtype=np.int64), *(layer.aside for layer in self._layers)]
        )
        self._aside = self._cells(at, place, aside)

    def _cells(self, at: np.ndarray, place: np.ndarray, state: np.ndarray) -> _Cells:
        """Of moves at positions from a place among the states to a state."""
        goal = self._where[at + 1, state].astype(np.int64)
        within = (place >= 0) & (goal >= 0)
        before = (at * self._width + place)[within]
        goal = goal[within]
        behind = np.broadcast_to((at + 1) * self._width, within.shape)[within] + goal
        return _Cells(within, before * self._width + goal, before, behind)

    def _list(self) -> None:
        candidates, count = self._lattice.candidates, self.count
        places = [layer.skeleton.places for layer in self._layers]
        most = max((one.size for one in places), default=0)
        spot = np.zeros((count, most), dtype=np.int64)
        listed = np.zeros((count, most))
        for at, one in enumerate(places):
            spot[at, : one.size] = one
            listed[at, : one.size] = candidates.listed[at].take(one)
        names = candidates.names.take(spot) if most else spot
        self.ids = np.concatenate([candidates.ids[:count], names], axis=1)
        self.p = np.concatenate([candidates.p[:count], listed], axis=1)
        self._counted = np.maximum(self.p, self._floor[:, None]) * (self.p > 0)

    def _matrix(self, kept: list[np.ndarray], seen: list[np.ndarray]) -> np.ndarray:
        """The moves by listed ids, given sums over each edge's: of the skeletons' edges by layer,
        and of the candidates' by window."""
        found = np.zeros(self.count * self._width * self._width)
        sums = np.concatenate([np.zeros(0), *kept]) / self._top[self._at]
        found[self._kept.cell] = sums[self._kept.within]
        for window, part, cells in zip(self._windows, seen, self._seen, strict=True):
            scaled = part / self._top[window.begin : window.end, None]
            found[cells.cell] += scaled[cells.within]
        found[self._ended.cell] = (1 / self._top[self._ended_at])[self._ended.within]
        return found.reshape(self.count, self._width, self._width)

    def _with_rest(self, listed: np.ndarray) -> np.ndarray:
        found = listed.copy()
        rest = (self.rest / self._top)[self._rest_at][self._aside.within]
        found.ravel()[self._aside.cell] += rest
        return found

    def _logs(self) -> np.ndarray:
        """The logarithm of the most probable id of each move."""
        found = np.zeros(self.count * self._width * self._width)
        best = np.concatenate([np.zeros(0), *(layer.best for layer in self._layers)])
        found[self._kept.cell] = best[self._kept.within]
        for window, cells in zip(self._windows, self._seen, strict=True):
            own = window.best[cells.within]
            found[cells.cell] = np.maximum(found[cells.cell], own)
        found[self._ended.cell] = 1
        found = np.log(found, out=np.full_like(found, -np.inf), where=found > 0)
        return found.reshape(self.count, self._width, self._width)

    def aim(self, allowed: np.ndarray, ends_by: int | None) -> bool:
        """Says where a text may stand: in `allowed`, bool, of the last states, and ended from the
        position `ends_by` on. False where no text does."""
        self._allowed, self._by = allowed, ends_by
        logs = self._moves
        best = np.full((self.count + 1, self._width), -np.inf)
        best[-1, : allowed.size][allowed] = 0
        for at in range(self.count - 1, -1, -1):
            here = (logs[at] + best[at + 1]).max(axis=1)
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
        """[count + 1, s]: all texts behind each state, scaled by position."""
        behind = np.zeros((self.count + 1, self._width))
        behind[-1, : self._allowed.size] = self._allowed
        least = self._alive * TINY
        for at in range(self.count - 1, -1, -1):
            here = moves[at] @ behind[at + 1]
            if self._by is not None and at >= self._by:
                here *= self._is_end[at]
            here *= 1 / (here.max() or 1.0)
            np.maximum(here, least[at], out=behind[at])
        return behind

    def draft(self, ended: np.ndarray) -> np.ndarray:
        """int32 [C]: the best text; what stands behind its end is taken from `ended`."""

        def pick(at: int, place: int) -> int:
            return int((self._moves[at, place] + self._best[at + 1]).argmax())

        text = np.array(ended, dtype=np.int32)
        path = self._path(pick)
        if len(path) == 1:
            return text
        weights = self._leading(path)
        best = weights.argmax(axis=1)
        count = len(path) - 1
        text[:count] = self.ids[np.arange(count), best]
        return text

    def sample(self, ended: np.ndarray, uniforms: np.ndarray, temp: float) -> np.ndarray:
        """int32 [C]: a draw of a text; what stands behind its end is taken from `ended`."""
        listed, behind, power = self._listed, self._behind, 1 / temp
        if temp != 1:
            listed = self._matrix(*self._raised(power))
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
        if len(path) == 1:
            return text
        weights = self._leading(path) ** power
        total = weights.cumsum(axis=1)
        count = len(path) - 1
        drawn = np.clip(left[:count], 0, 1) * total[:, -1]
        last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1)
        chosen = np.minimum((total <= drawn[:, None]).sum(axis=1), last)
        text[:count] = self.ids[np.arange(count), chosen]
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

    def _leading(self, path: list[int]) -> np.ndarray:
        """[m, n]: what the listed ids count for, of those that lead along a path of m moves."""
        states, count = np.array(path), len(path) - 1
        transitions = self._lattice.automaton.transitions
        targets = transitions.each(states[:-1], self.ids[:count])
        found: np.ndarray = self._counted[:count] * (targets == states[1:, None])
        return found

    def _raised(self, power: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each edge's sum of its ids' probabilities to a power, relative to the position's top."""
        kept, seen = [], []
        for at, layer in enumerate(self._layers):
            row = self._lattice.candidates.listed[at]
            p = np.maximum(row, layer.floor) * (row > 0) / layer.top
            listed = p.take(layer.skeleton.pairs) ** power * layer.top
            kept.append(np.add.reduceat(listed, layer.skeleton.first) if listed.size else listed)
        for window in self._windows:
            top = self._top[window.begin : window.end].take(window.place)
            cell = window.place * window.source.size + window.edge
            p = (window.p / top) ** power * top
            seen.append(np.bincount(cell, p, window.sums.size).reshape(window.sums.shape))
        return kept, seen

    def shares(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all texts: float64 [count, n] those where each listed id stands, [count] those that
        have ended, and [count] those where an id stands that is not listed."""
        behind = self._behind
        forward = self._forward * (behind[:-1] > 0)
        through = (self._all @ behind[1:, :, None])[..., 0]
        total = np.maximum((forward * through).sum(axis=1), _NEVER)
        before, after = forward.ravel(), behind.ravel()

        def flow(cells: _Cells) -> np.ndarray:
            found = np.zeros(cells.within.shape)
            found[cells.within] = before.take(cells.before) * after.take(cells.behind)
            return found

        scale = 1 / (self._top * total)
        ended = np.bincount(self._ended_at, flow(self._ended), self.count) * scale
        other = np.bincount(self._rest_at, flow(self._aside), self.count) * self.rest * scale
        width = self._lattice.candidates.ids.shape[1]
        own = np.zeros((self.count, self.ids.shape[1]))
        for window, cells in zip(self._windows, self._seen, strict=True):
            count = window.end - window.begin
            carried = flow(cells)[window.place, window.edge] * window.p
            places = window.place * width + window.slot
            own[window.begin : window.end, :width] = np.bincount(
                places, carried, count * width
            ).reshape(count, width)
        edges, begin = flow(self._kept), np.cumsum(self._sizes) - self._sizes
        for at, layer in enumerate(self._layers):
            kept = layer.skeleton
            if not kept.by_id.size:
                continue
            mine = edges[begin[at] : begin[at] + self._sizes[at]]
            each = np.add.reduceat(mine.take(kept.by_id), kept.id_first)
            own[at, width + kept.id_at] = each * self._counted[at, width + kept.id_at]
        return own * scale[:, None], ended, other
