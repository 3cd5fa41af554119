"""Where ids lead from an automaton's states: walked for many ids at once, and kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_dgemma.constraints.expressions import SYMBOLS
from mlx_dgemma.constraints.groups import MOST_LOOPS, Groups
from mlx_dgemma.constraints.vocabulary import Vocabulary

DEAD, END = 0, 1  # states: nothing can follow; everything may
# Transitions kept, states times ids: two bytes each.
_MOST_KEPT = 4_000_000
_STATES, _IDS = 64, 1024  # room at first
_AT_ONCE = 100_000  # transitions that are walked together
_ODD = np.int64(-0x61C8864680B583EB)  # of hashes: 2**64 by the golden ratio
_OPEN = 8  # symbols that lead back to a state for which the rest of an id is not walked
# UTF-8: first bytes, the byte after them, and how many more follow (Unicode 15, table 3-7).
_CHARACTERS = (
    (0xC2, 0xDF, 0x80, 0xBF, 0),
    (0xE0, 0xE0, 0xA0, 0xBF, 1),
    (0xE1, 0xEC, 0x80, 0xBF, 1),
    (0xED, 0xED, 0x80, 0x9F, 1),
    (0xEE, 0xEF, 0x80, 0xBF, 1),
    (0xF0, 0xF0, 0x90, 0xBF, 2),
    (0xF1, 0xF3, 0x80, 0xBF, 2),
    (0xF4, 0xF4, 0x80, 0x8F, 2),
)


class Transitions:
    """An id's symbols lead from state to state by the states' rows, int32 [SYMBOLS] each.

    build: makes a state's row. accepts: whether a text may end in a state. classes: of symbols that
    no state tells apart. Every group of ids has a column, and so has an id that stands alone.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        build: Callable[[int], np.ndarray],
        accepts: Callable[[int], bool],
        classes: np.ndarray,
    ) -> None:
        self._vocabulary, self._build, self._accepts = vocabulary, build, accepts
        self._classes = classes
        self._rows = np.zeros((_STATES, SYMBOLS), dtype=np.int32)
        self._has_row = np.zeros(_STATES, dtype=bool)
        self._has_row[DEAD] = self._has_row[END] = True
        self._rows[END] = END
        self._open = np.zeros((_STATES, 3), dtype=np.uint64)  # of `Vocabulary.later`
        self._judged = np.zeros(_STATES, dtype=bool)
        self._judged[DEAD] = True
        self._loops: list[np.ndarray] = []  # what leads some state back to itself
        self._loop = np.full(_STATES, -1, dtype=np.int64)
        self._ids = Groups(vocabulary, classes, self._loops)
        self._kept = np.zeros((_STATES, _IDS), dtype=np.int16)
        self._walked = np.zeros(_STATES, dtype=np.int64)  # columns that are known, by state

    @property
    def nbytes(self) -> int:
        arrays = (self._rows, self._has_row, self._open, self._judged, self._kept)
        return sum(array.nbytes for array in (*arrays, self._walked, self._loop)) + self._ids.nbytes

    def row(self, state: int) -> np.ndarray:
        """int32 [SYMBOLS]: where each symbol leads."""
        if not self._has_row[state]:
            row = self._build(state)  # which may make states, and room for them
            self._rows[state], self._has_row[state] = row, True
        found: np.ndarray = self._rows[state]
        return found

    def grow(self, size: int) -> None:
        """Makes room for more states."""
        more = size - len(self._rows)
        self._rows = np.concatenate([self._rows, np.zeros((more, SYMBOLS), dtype=np.int32)])
        self._has_row = np.concatenate([self._has_row, np.zeros(more, dtype=bool)])
        self._open = np.concatenate([self._open, np.zeros((more, 3), dtype=np.uint64)])
        self._judged = np.concatenate([self._judged, np.zeros(more, dtype=bool)])
        self._loop = np.concatenate([self._loop, np.full(more, -1, dtype=np.int64)])
        if size * self._kept.shape[1] > _MOST_KEPT:
            self._forget()
            return
        wider = np.zeros((more, self._kept.shape[1]), dtype=np.int16)
        self._kept = np.concatenate([self._kept, wider])
        self._walked = np.concatenate([self._walked, np.zeros(more, dtype=np.int64)])

    def table(self, states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """int16 [s, n]: where each id leads from each state."""
        columns = self._columns(states, ids)
        found = np.empty((states.size, ids.size), dtype=np.int16)
        for row, state in zip(found, states.tolist(), strict=True):
            self._kept[state].take(columns, out=row, mode="clip")
        return found

    def classes(self, states: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids by where they lead: int [n], each one's class, and int16 [s, classes], where a class
        leads from each state. Class 0 leads nowhere."""
        if not states.size or not ids.size:
            return np.zeros(ids.size, dtype=np.intp), np.zeros((states.size, 1), dtype=np.int16)
        columns = self._columns(states, ids)
        wanted = np.zeros(len(self._ids), dtype=bool)
        wanted[columns] = True
        used = np.flatnonzero(wanted)
        led = np.empty((states.size, used.size), dtype=np.int16)
        for row, state in zip(led, states.tolist(), strict=True):
            self._kept[state].take(used, out=row, mode="clip")
        alive = np.flatnonzero(led.any(axis=0))
        led, used = led.take(alive, axis=1), used.take(alive)
        one, number = _equal_columns(led)
        which = np.zeros(wanted.size, dtype=np.intp)
        which[used] = number + 1
        ways = np.zeros((states.size, one.size + 1), dtype=np.int16)
        ways[:, 1:] = led.take(one, axis=1)
        return which.take(columns), ways

    def each(self, states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """int16 [n, k]: where the ids of a row [n, k] lead from its state [n]."""
        columns = self._columns(np.unique(states), ids.ravel()).reshape(ids.shape)
        found: np.ndarray = self._kept.ravel().take(states[:, None] * self._kept.shape[1] + columns)
        return found

    def _columns(self, states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Of the ids, walked from the states."""
        while True:
            columns = self._ids.of(ids)
            if columns.min(initial=0) < 0:
                self.prepare(ids)
                continue
            unknown = states[self._walked.take(states) < len(self._ids)]
            if not unknown.size:
                return columns.astype(np.intp)
            self._fill(unknown)

    def prepare(self, ids: np.ndarray) -> None:
        """Makes room for ids, so that they are walked together."""
        fresh = ids[self._ids.of(ids) < 0]
        if fresh.size:
            wanted = np.zeros(self._vocabulary.size, dtype=bool)
            wanted[fresh] = True
            self._ids.add(np.flatnonzero(wanted))
            self._make_room(ids)

    def _make_room(self, ids: np.ndarray) -> None:
        """For all columns; where there is too little, for those of some ids alone."""
        count = len(self._ids)
        if count <= self._kept.shape[1]:
            return
        if count * len(self._kept) > _MOST_KEPT and self._kept.any():
            self._forget()
            self.prepare(ids)
            return
        room = max(count, min(2 * count, _MOST_KEPT // len(self._kept)))
        wider = np.zeros((len(self._kept), room), dtype=np.int16)
        wider[:, : self._kept.shape[1]] = self._kept
        self._kept = wider

    def _forget(self) -> None:
        """Drops the walked transitions; they are walked again by need."""
        self._ids = Groups(self._vocabulary, self._classes, self._loops)
        self._kept = np.zeros((len(self._rows), _IDS), dtype=np.int16)
        self._walked = np.zeros(len(self._rows), dtype=np.int64)

    def _fill(self, states: np.ndarray) -> None:
        """Walks every column from some states, as far as none was forgotten on the way."""
        groups, count = self._ids, len(self._ids)
        self._kept[END], self._walked[:2] = END, count
        states = states[(states != DEAD) & (states != END)]
        self._make_rows(states)
        vocabulary = self._vocabulary
        first = vocabulary.symbols.take(vocabulary.offsets.take(groups.one))
        stop = vocabulary.is_stop.take(groups.one)
        walked = self._walked.take(states)
        for since in np.unique(walked).tolist():
            same, most = states[walked == since], max(1, _AT_ONCE // (count - since))
            for start in range(0, same.size, most):
                if self._ids is not groups:
                    return
                each = same[start : start + most]
                begins = self._rows.ravel().take(each[:, None] * SYMBOLS + first[since:]) != DEAD
                place, column = (begins | stop[since:]).nonzero()
                source = each.take(place)
                column += since
                led = self._walk(source, column)
                if len(self._loops) > groups.loops:
                    self._forget()
                if self._ids is not groups:
                    return
                self._kept[source, column] = led
                self._walked[each] = count

    def _walk(self, source: np.ndarray, column: np.ndarray) -> np.ndarray:
        """int64 [n]: where each column leads its state. Groups that a state tells apart are split:
        what is found then is true of the id that was walked."""
        vocabulary, groups = self._vocabulary, self._ids
        one = groups.one.take(column)
        led = source.copy()
        going = np.arange(one.size)
        at, end = vocabulary.offsets.take(one), vocabulary.later_from.take(one)
        while going.size:
            here = self._step(led[going], vocabulary.symbols.take(at[going]))
            led[going] = here
            at[going] += 1
            going = going[(here != DEAD) & (at[going] < end[going])]
        longer = np.flatnonzero((end < vocabulary.offsets.take(one + 1)) & (led != DEAD))
        self._judge_all(led)
        loop = self._loop.take(led[longer])
        held = groups.held.take(column[longer]) >> np.maximum(loop, 0) & 1
        parting = longer[(loop < 0) | (held == 0)]
        if parting.size:
            led[parting] = self._go_on(led[parting], one[parting])
            parted = np.unique(column[parting])
            parted = parted[~groups.single.take(parted)]
            if parted.size:
                groups.split(parted)
                self._make_room(one)
        stops = np.flatnonzero(vocabulary.is_stop.take(one))
        led[stops] = [END if self._accepts(state) else DEAD for state in source[stops].tolist()]
        return led

    def _go_on(self, here: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Where the later symbols of each id lead its state."""
        vocabulary = self._vocabulary
        at, end = vocabulary.later_from.take(ids), vocabulary.offsets.take(ids + 1)
        found, going = here.copy(), np.flatnonzero(~self._back(here, ids))
        while going.size:
            here = self._step(found[going], vocabulary.symbols.take(at[going]))
            found[going] = here
            at[going] += 1
            going = going[(here != DEAD) & (at[going] < end[going])]
        return found

    def _step(self, states: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        self._make_rows(states)
        found: np.ndarray = self._rows.ravel().take(states * SYMBOLS + symbols)
        return found

    def _make_rows(self, states: np.ndarray) -> None:
        if not self._has_row.take(states).all():
            for state in np.unique(states).tolist():
                self.row(state)

    def _back(self, states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """bool [n]: whether all later symbols of each id lead its state back to itself."""
        closed = ~self._open
        later = self._vocabulary.later
        found = np.ones(ids.size, dtype=bool)
        for part in range(3):
            found &= (later[part].take(ids) & closed[:, part].take(states)) == 0
        return found

    def _judge_all(self, states: np.ndarray) -> None:
        if not self._judged.take(states).all():
            for state in np.unique(states).tolist():
                if not self._judged[state]:
                    self._judge(state)

    def _judge(self, state: int) -> None:
        row = self.row(state)
        back = row[:128] == state
        if back.sum() >= _OPEN:
            whole = row[_CHARACTERS[0][0] : _CHARACTERS[-1][1] + 1].all() and self._returns(state)
            self._open[state] = [*np.packbits(back, bitorder="little").view("<u8"), whole]
            same = [n for n, loop in enumerate(self._loops) if (loop == self._open[state]).all()]
            if same or len(self._loops) < MOST_LOOPS:
                self._loop[state] = same[0] if same else len(self._loops)
                self._loops += [] if same else [self._open[state].copy()]
        self._judged[state] = True

    def _returns(self, state: int) -> bool:
        """Whether every character beyond ASCII leads a state back to itself."""
        for first, last, low, high, more in _CHARACTERS:
            ways = np.unique(self.row(state)[first : last + 1])
            for way in ways.tolist():
                after = np.unique(self.row(way)[low : high + 1])
                for _ in range(more):
                    each = [self.row(one)[0x80:0xC0] for one in after.tolist()]
                    after = np.unique(np.concatenate(each))
                if after.size != 1 or after[0] != state:
                    return False
        return True


def _equal_columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One of each kind of columns of int16 [s, n], and each column's kind."""
    hashed = np.zeros(table.shape[1], dtype=np.int64)
    for row in table:
        hashed = (hashed ^ hashed >> 29) * _ODD + row
    _, one, number = np.unique(hashed, return_index=True, return_inverse=True)
    if (table != table.take(one.take(number), axis=1)).any():  # two kinds with one hash
        _, one, number = np.unique(table, axis=1, return_index=True, return_inverse=True)
    return one, number
