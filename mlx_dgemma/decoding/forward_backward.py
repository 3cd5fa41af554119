"""What a lattice's positions tell each other: the best text, a draw of one, the ids' shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mlx_dgemma.constraints.transitions import END
from mlx_dgemma.decoding.lattice import TINY, Lattice, Stretch

_NEVER = 1e-300
_FLOOR = 1e-30  # of a legal move, relative to the most probable one of its position
_SHARE = 1e-10  # of a position's texts; ids of states with less are not listed
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


class _Side:
    """A stretch's edges at each of its positions, for texts that go along states with a weight.

    on: bool [count + 1, s], those states. within: [count, e], whether an edge joins two of them.
    sums: of the listed ids, 0 beyond; top [count]: a power of two near the largest, so that nothing
    is rounded when it divides; listed: divided by it. all: and what no id is listed for, aside
    [count, s], along each state's `typical` edge. logs: of the most probable id of each edge.
    """

    def __init__(self, stretch: Stretch) -> None:
        moves = stretch.moves
        self.begin, self.count = moves.begin, moves.end - moves.begin
        self.stretch, self.states, self.weights = stretch, moves.states, stretch.weights
        self.source, self.first, self.goal = moves.source, moves.first, stretch.goal
        self.bounds = [*moves.first.tolist(), moves.source.size]
        self.end = int(np.searchsorted(moves.states, END))
        self.on = self.weights > 0
        after = np.pad(self.on[1:], ((0, 0), (0, 1)))
        self.within = self.on[:-1].take(self.source, axis=1) & after.take(self.goal, axis=1)
        self.sums = moves.sums * self.within
        top = np.maximum.reduce(self.sums, axis=1, initial=0)
        self.top = np.exp2(np.floor(np.log2(np.maximum(top, _NEVER))))
        self.listed = self.sums / self.top[:, None]
        np.maximum(self.listed, _FLOOR * (self.sums > 0), out=self.listed)
        self.all, self.aside = self.with_rest(self.listed)
        best = moves.best * self.within
        self.logs = np.full(best.shape, -np.inf)
        np.log(best, out=self.logs, where=best > 0)
        self.best = self.behind = self.weights

    def with_rest(self, listed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`all` and `aside`: what no id is listed for goes where some id goes."""
        moves, found = self.stretch.moves, listed.copy()
        order = self.goal.argsort(kind="stable")
        goals = self.goal.take(order)
        begins = np.flatnonzero(np.diff(goals, prepend=-1))
        reached = np.zeros((self.count, self.states.size + 1), dtype=bool)
        reached[:, goals[begins]] = np.logical_or.reduceat(
            (listed > 0).take(order, axis=1), begins, axis=1
        )
        some = np.flatnonzero(moves.typical >= 0)
        edges = moves.typical.take(some)
        goal = self.goal.take(edges)
        going = reached.take(goal, axis=1) & self.within.take(edges, axis=1)
        aside = np.zeros((self.count, self.states.size))
        aside[:, some] = going / self.top[:, None]
        found[:, edges] += moves.rest.take(some, axis=1) * aside.take(some, axis=1)
        return found, aside

    def after(self, values: np.ndarray) -> np.ndarray:
        """[count, e]: of values [count + 1, s + 1], those of each edge's target."""
        return values[1:].take(self.goal, axis=1)

    def backward(
        self,
        edges: np.ndarray,
        last: np.ndarray,
        how: tuple[np.ufunc, np.ufunc],
        by: int | None,
        least: np.ndarray | None,
    ) -> np.ndarray:
        """[count + 1, s + 1] from values [count, e] of the edges and those after the last [s].

        how: what joins an edge to what is after it, and the edges of a state. by: the position from
        which only ended texts count. least: [count + 1, s], below which nothing falls; each
        position is scaled then.
        """
        along, together = how
        nothing = -np.inf if along is np.add else 0.0
        found = np.full((self.count + 1, self.states.size + 1), nothing)
        found[-1, :-1] = last
        goal, first = self.goal, self.first
        for at in range(self.count - 1, -1, -1):
            here = together.reduceat(along(edges[at], found[at + 1].take(goal)), first)
            if by is not None and at + self.begin >= by:
                ended = here[self.end]
                here.fill(nothing)
                here[self.end] = ended
            if least is not None:
                here *= 1 / (np.maximum.reduce(here) or 1.0)
                np.maximum(here, least[at], out=here)
            found[at, :-1] = here
        return found


class Messages:
    """The edges of a lattice, and what follows once `aim` has said where a text may stand.

    count: positions. final: the states after the last.
    """

    def __init__(self, lattice: Lattice) -> None:
        self._lattice, self.final = lattice, lattice.final
        self._sides = [_Side(stretch) for stretch in lattice.stretches]
        self.count = sum(side.count for side in self._sides)

    def aim(self, allowed: np.ndarray, ends_by: int | None) -> bool:
        """Says where a text may stand: in `allowed`, bool, of the last states, and ended from the
        position `ends_by` on. False where no text does."""
        self._by = ends_by
        if not self._sides:
            return bool(allowed.all())
        last = self._sides[-1]
        self._allowed = np.zeros(last.states.size, dtype=bool)
        self._allowed[np.searchsorted(last.states, self.final[allowed])] = True
        where = np.where(self._allowed, 0, -np.inf)
        for side, found in self._each(
            [side.logs for side in self._sides], where, (np.add, np.maximum), scaled=False
        ):
            side.best = found
        first = self._sides[0]
        if first.best[0, np.searchsorted(first.states, self._lattice.start)] == -np.inf:
            return False
        for side, found in self._backward([side.all for side in self._sides]):
            side.behind = found
        return True

    def _backward(self, every: Sequence[np.ndarray]) -> list[tuple[_Side, np.ndarray]]:
        """All texts after each state, scaled by position, from values of the edges."""
        return self._each(every, self._allowed.astype(float), (np.multiply, np.add), scaled=True)

    def _each(
        self,
        every: Sequence[np.ndarray],
        last: np.ndarray,
        how: tuple[np.ufunc, np.ufunc],
        *,
        scaled: bool,
    ) -> list[tuple[_Side, np.ndarray]]:
        """Backwards through the stretches, the last one first."""
        found: list[tuple[_Side, np.ndarray]] = []
        for side, edges in zip(reversed(self._sides), reversed(every), strict=True):
            if found:  # the same states, by their places in this stretch
                after, values = found[-1]
                some = np.flatnonzero(after.on[0])
                last = np.full(side.states.size, 0.0 if scaled else -np.inf)
                last[np.searchsorted(side.states, after.states[some])] = values[0].take(some)
            least = (side.best[:, :-1] > -np.inf) * TINY if scaled else None
            found.append((side, side.backward(edges, last, how, self._by, least)))
        return found

    def draft(self, ended: np.ndarray) -> np.ndarray:
        """int32 [C]: the best text; what stands after its end is taken from `ended`."""

        def pick(side: _Side, at: int, edges: slice) -> int:
            best = side.best[at + 1].take(side.goal[edges])
            return int((side.logs[at, edges] + best).argmax())

        text = np.array(ended, dtype=np.int32)
        path = self._path(pick)
        count = len(path) - 1
        if count:
            ids, weights = self._leading(path)
            text[:count] = ids[np.arange(count), weights.argmax(axis=1)]
        return text

    def sample(self, ended: np.ndarray, uniforms: np.ndarray, temp: float) -> np.ndarray:
        """int32 [C]: a draw of a text; what stands after its end is taken from `ended`."""
        listed = {id(side): side.listed for side in self._sides}
        behind = {id(side): side.behind for side in self._sides}
        if temp != 1:
            listed = {id(side): self._raised(side, 1 / temp) for side in self._sides}
            every = [side.with_rest(listed[id(side)])[0] for side in self._sides]
            behind = {id(side): found for side, found in self._backward(every)}
        left = np.array(uniforms)

        def pick(side: _Side, at: int, edges: slice) -> int:
            goal, place = side.goal[edges], at + side.begin
            weights = listed[id(side)][at, edges] * behind[id(side)][at + 1].take(goal)
            weights *= side.best[at + 1].take(goal) > -np.inf
            total = weights.cumsum()
            drawn = uniforms[place] * total[-1]
            chosen = min(int(total.searchsorted(drawn, "right")), int(weights.nonzero()[0][-1]))
            left[place] = (drawn - total[chosen] + weights[chosen]) / weights[chosen]
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

    def _path(self, pick: Callable[[_Side, int, slice], int]) -> list[int]:
        """The states of a text, from its first to its last, given their edges one by one."""
        path = [self._lattice.start]
        for side in self._sides:
            place = int(np.searchsorted(side.states, path[-1]))
            for at in range(side.count):
                if place == side.end:
                    return path
                edges = slice(side.bounds[place], side.bounds[place + 1])
                place = int(side.goal[edges.start + pick(side, at, edges)])
                path.append(int(side.states[place]))
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
        own = self._lattice.automaton.transitions.each(states[:-1], candidates.ids[:count])
        if not most:
            return candidates.ids[:count], candidates.p[:count] * (own == states[1:, None])
        ids = np.concatenate([candidates.ids[:count], moves.names.take(places)], axis=1)
        listed = np.take_along_axis(candidates.listed[:count], places, axis=1)
        p = np.concatenate([candidates.p[:count], listed], axis=1)
        return ids, p * (np.concatenate([own, led], axis=1) == states[1:, None])

    def _raised(self, side: _Side, power: float) -> np.ndarray:
        """The edges by listed ids, each id's probability, relative to its position's top, to a
        power."""
        candidates = self._lattice.candidates
        rows = slice(side.begin, side.begin + side.count)

        def raised(p: np.ndarray) -> np.ndarray:
            relative = np.zeros(p.shape)
            relative[rows] = np.maximum(p[rows] / side.top[:, None], _FLOOR) * (p[rows] > 0)
            return relative**power

        p, listed = raised(candidates.p), raised(candidates.listed)
        found = candidates.sums(side.stretch.moves, p, listed) * side.within
        highest = np.maximum.reduce(found, axis=1, initial=0)
        scaled: np.ndarray = found / np.maximum(highest, _NEVER)[:, None]
        return scaled

    def shares(self) -> Shares:
        """Of what the positions list, and of what they do not."""
        found = [part for side in self._sides for part in self._shares(side)]
        width = max(part.ids.shape[1] for part in found)

        def wide(part: np.ndarray) -> np.ndarray:
            return np.pad(part, ((0, 0), (0, width - part.shape[1])))

        return Shares(
            np.concatenate([wide(part.ids) for part in found]),
            np.concatenate([wide(part.p) for part in found]),
            np.concatenate([part.rest for part in found]),
            np.concatenate([wide(part.own) for part in found]),
            np.concatenate([part.ended for part in found]),
            np.concatenate([part.other for part in found]),
            max(part.left_out for part in found),
        )

    def _shares(self, side: _Side) -> list[Shares]:
        """Of one stretch, `_TOGETHER` positions after the other."""
        goals, behind = side.after(side.behind), side.behind[:-1, :-1]
        forward = side.weights[:-1] * (behind > 0)
        through = forward * np.add.reduceat(side.all * goals, side.first, axis=1)
        total = np.maximum(through.sum(axis=1, keepdims=True), _NEVER)
        forward /= total
        typical = side.stretch.moves.typical
        flow = forward * side.aside * goals.take(np.maximum(typical, 0), axis=1)
        other, ended = flow.sum(axis=1), through[:, side.end] / total[:, 0]
        some = through > _SHARE * total
        some[:, side.end] = False
        rest = float(side.stretch.moves.rest[some].max(initial=0))
        # By each edge, relative to the probabilities of its ids.
        carried = np.divide(side.listed, side.sums, out=np.zeros_like(goals), where=side.sums > 0)
        carried *= goals
        carried *= (forward * some).take(side.source, axis=1)
        flow *= some
        own = self._of_candidates(side, carried)
        candidates, rows = self._lattice.candidates, slice(side.begin, side.begin + side.count)
        ids, p = candidates.ids[rows], candidates.p[rows]
        entries = _entries(side)
        found = []
        for start in range(0, side.count, _TOGETHER):
            part = slice(start, start + _TOGETHER)
            at = slice(side.begin + start, side.begin + min(start + _TOGETHER, side.count))
            places, lists = _listed(entries, carried[part], flow[part], some[part].any(axis=0))
            listed = candidates.listed[at].take(places, axis=1)
            lists += other[part, None]
            lists *= listed
            names = np.broadcast_to(self._lattice.moves.names.take(places), lists.shape)
            every = np.concatenate([p[part], listed], axis=1)
            found.append(
                Shares(
                    np.concatenate([ids[part], names], axis=1),
                    every,
                    np.maximum(1 - every.sum(axis=1), 0),
                    np.concatenate([own[part], lists], axis=1),
                    ended[part],
                    other[part],
                    rest,
                )
            )
        return found

    def _of_candidates(self, side: _Side, carried: np.ndarray) -> np.ndarray:
        """[count, K]: the texts in which each candidate stands."""
        moves, candidates = side.stretch.moves, self._lattice.candidates
        p = candidates.p[side.begin : side.begin + side.count]
        own, before = np.zeros(p.size), 0
        for part in moves.parts:
            if part.slot.size:
                sizes = np.diff(part.begins, append=part.pairs.size)
                edges = moves.places[before + np.repeat(part.of_pairs, sizes)]
                order = part.pairs.argsort(kind="stable")
                pairs = part.pairs.take(order)
                begins = np.flatnonzero(np.diff(pairs, prepend=-1))
                classes = np.zeros((side.count, part.classes))
                classes[:, pairs[begins]] = np.add.reduceat(
                    carried.take(edges.take(order), axis=1), begins, axis=1
                )
                own[part.slot] += classes.ravel().take(part.cell) * p.ravel().take(part.slot)
            before += part.edges
        return own.reshape(p.shape)


class _Entries(NamedTuple):
    """Ids kept for a stretch's states, ordered by id: places [m] of the ids among all, each one's
    edge, and the place of its state."""

    places: np.ndarray
    edge: np.ndarray
    state: np.ndarray


def _entries(side: _Side) -> _Entries:
    moves, before = side.stretch.moves, 0
    places, edges, states = [], [], []
    for part, members in zip(moves.parts, moves.members, strict=True):
        kept = part.kept
        sizes = np.diff(kept.first, append=kept.places.size)
        places.append(kept.places)
        edges.append(moves.places[before + np.repeat(part.of_kept, sizes)])
        states.append(members.take(kept.state))
        before += part.edges
    every = np.concatenate(places)
    order = every.argsort(kind="stable")
    return _Entries(every[order], np.concatenate(edges)[order], np.concatenate(states)[order])


def _listed(
    entries: _Entries, carried: np.ndarray, flow: np.ndarray, some: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the ids that some states keep, and [count, n] the texts in which each stands by
    them, less those in which it stands unlisted; relative to its probability."""
    mine = some.take(entries.state).nonzero()[0]
    places = entries.places.take(mine)
    begins = np.flatnonzero(np.diff(places, prepend=-1))
    if not mine.size:
        return places, np.zeros((len(carried), 0))
    each = carried.take(entries.edge.take(mine), axis=1)
    each -= flow.take(entries.state.take(mine), axis=1)
    return places[begins], np.add.reduceat(each, begins, axis=1)
