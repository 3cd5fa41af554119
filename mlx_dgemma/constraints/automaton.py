"""The automaton of a language over a vocabulary's ids, walked and kept by need."""

from __future__ import annotations

import numpy as np

from mlx_dgemma.constraints.expressions import SYMBOLS, Node, Space
from mlx_dgemma.constraints.groups import symbol_classes
from mlx_dgemma.constraints.shortest import NEVER, shortest_length
from mlx_dgemma.constraints.transitions import DEAD, END, Transitions
from mlx_dgemma.constraints.vocabulary import OTHER_CONTROL, Vocabulary
from mlx_dgemma.errors import LanguageError

_MOST_STATES = 20_000
# A vocabulary of at most so many ids is looked at whole.
WHOLE = 2048
_MOST_TRACED = 256  # states that lengths are counted through
_WORD = 16  # symbols of a literal that are looked at together
_FEW = 16  # symbols that a kept-alive move may have
_MOST_ALIVE = 96  # ids that keep one state alive
_TYPICAL = b" word"  # what an id outside the candidates is taken for inside open text
_PRINTABLE = ((1 << 95) - 1) << 32


class Automaton:
    """States are numbers. DEAD leads nowhere; END is reached by a stop id and takes every id.

    vocabulary: of the ids. start: the number of the language's own start state.
    alive_ids: int64, those that `keep_alive` has returned places of; it only grows.
    spots: int32 [vocabulary], -1; for a caller's use between two calls.
    """

    def __init__(self, space: Space, language: Node, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._space = space
        self._nodes: list[Node] = [space.none, space.anything]
        self._numbers = {space.none.number: DEAD, space.anything.number: END}
        classes = symbol_classes(language)
        self.transitions = Transitions(
            vocabulary, self._row, lambda state: bool(self.accepting[state]), classes
        )
        self.accepting = np.zeros(64, dtype=bool)
        self.accepting[END] = True
        self.least = np.full(64, NEVER, dtype=np.int64)
        self.least[END] = 0
        self._alive: dict[int, np.ndarray] = {}
        self._typical = np.full(64, -1, dtype=np.int32)
        self.alive_ids = np.zeros(0, dtype=np.int64)
        self._place = np.full(vocabulary.size, -1, dtype=np.int32)  # in alive_ids
        self._alive_places: dict[int, np.ndarray] = {}
        self.spots = np.full(vocabulary.size, -1, dtype=np.int32)
        self.start = self._number(language)

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def nbytes(self) -> int:
        """Of the tables; the vocabulary is shared and counted there."""
        arrays = (self.accepting, self.least, self.alive_ids, self._place, self.spots)
        return sum(array.nbytes for array in arrays) + self.transitions.nbytes

    def after(self, state: int, ids: list[int]) -> int:
        """The state after some ids."""
        self.transitions.prepare(np.array(ids, dtype=np.int64))
        for id_ in ids:
            state = int(self.table(np.array([state]), np.array([id_]))[0, 0])
        return state

    def lengths(self, most: int) -> list[int]:
        """Numbers of ids, 1 to `most`, in which a text of the language can surely be written."""
        states, found, last = np.array([self.start]), [], self.vocabulary.size <= WHOLE
        ids = np.flatnonzero(~self.vocabulary.is_stop) if last else np.zeros(0, dtype=np.int64)
        for count in range(1, most + 1):
            if not last:
                ids = self.alive_ids[self.keep_alive(states)]
                ids = ids[~self.vocabulary.is_stop[ids]]
            states = np.unique(self.table(states, ids))[:_MOST_TRACED].astype(np.int64)
            states = states[states != DEAD]
            if self.accepting[states].any():
                found.append(count)
            if not states.size:
                break
        return found

    def table(self, states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """int16 [s, n]: where each id leads from each state."""
        return self.transitions.table(states, ids)

    def alive(self, state: int) -> np.ndarray:
        """int64: ids that keep the language reachable from a state, and write its literals."""
        if state not in self._alive:
            found: list[int] = []
            for word in self._words(self._nodes[state]):
                found += self.vocabulary.beginnings(word)
            if self.accepting[state]:
                found += self.vocabulary.stop_ids.tolist()
            ids = np.array(list(dict.fromkeys(found))[:_MOST_ALIVE], dtype=np.int64)
            self._alive[state] = np.unique(ids)
        return self._alive[state]

    def keep_alive(self, states: np.ndarray) -> np.ndarray:
        """int64: places in `alive_ids` of the ids that keep any of the states alive."""
        for state in states.tolist():
            if state not in self._alive_places:
                ids = self.alive(state)
                fresh = ids[self._place[ids] < 0]
                count = self.alive_ids.size
                self._place[fresh] = np.arange(count, count + fresh.size)
                self.alive_ids = np.concatenate([self.alive_ids, fresh])
                self._alive_places[state] = self._place[ids]
        wanted = np.zeros(self.alive_ids.size, dtype=bool)
        wanted[np.concatenate([self._alive_places[state] for state in states.tolist()])] = True
        return np.flatnonzero(wanted)

    def typical(self, states: np.ndarray) -> np.ndarray:
        """int32: where an ordinary word leads from states inside open text; DEAD elsewhere."""
        found = self._typical.take(states)
        if found.min(initial=0) < 0:
            for state in states[found < 0].tolist():
                node, target = self._nodes[state], DEAD
                if state == END or (node.mask & _PRINTABLE).bit_count() >= 80:
                    target = state
                    for byte in _TYPICAL:
                        target = int(self.transitions.row(target)[byte])
                self._typical[state] = target
            found = self._typical.take(states)
        return found

    def _words(self, node: Node) -> list[list[int]]:
        """Beginnings of the words that follow, the shortest's first."""
        words = [self._follow(node, shortest=True)] if node.least else []
        for mask, target in self._space.moves(node):
            if mask.bit_count() <= _FEW and shortest_length(self._space, target) < NEVER:
                tail = self._follow(target, shortest=False)
                words += [[symbol, *tail] for symbol in _bits(mask)]
            if len(words) > _MOST_ALIVE:
                break
        return [word for word in words if word]

    def _follow(self, node: Node, *, shortest: bool) -> list[int]:
        """Symbols along the only way, or along a shortest."""
        word: list[int] = []
        while len(word) < _WORD:
            moves = [
                m for m in self._space.moves(node) if shortest_length(self._space, m.target) < NEVER
            ]
            if not shortest and (len(moves) != 1 or moves[0].mask.bit_count() != 1):
                break
            if not moves or (shortest and not shortest_length(self._space, node)):
                break
            mask, node = min(moves, key=lambda m: shortest_length(self._space, m.target))
            printable = mask & _PRINTABLE or mask
            word.append(_bits(printable & -printable)[0])
        return word

    def _number(self, node: Node) -> int:
        known = self._numbers.get(node.number)
        if known is not None:
            return known
        least = shortest_length(self._space, node)
        if least >= NEVER:
            self._numbers[node.number] = DEAD
            return DEAD
        number = len(self._nodes)
        if number >= _MOST_STATES:
            raise LanguageError(
                f"The constraint was in more than {_MOST_STATES} states: make it simpler."
            )
        if number >= self.accepting.size:
            self._grow()
        self._nodes.append(node)
        self._numbers[node.number] = number
        self.accepting[number], self.least[number] = node.nullable, least
        return number

    def _grow(self) -> None:
        size = self.accepting.size
        self.transitions.grow(2 * size)
        self.accepting = np.concatenate([self.accepting, np.zeros(size, dtype=bool)])
        self.least = np.concatenate([self.least, np.full(size, NEVER, dtype=np.int64)])
        self._typical = np.concatenate([self._typical, np.full(size, -1, dtype=np.int32)])

    def _row(self, state: int) -> np.ndarray:
        """int32 [SYMBOLS]: where each symbol leads."""
        row = np.zeros(SYMBOLS, dtype=np.int32)
        for mask, target in self._space.moves(self._nodes[state]):
            row[_members(mask)] = self._number(target)
        return row


def _bits(mask: int) -> list[int]:
    return [symbol for symbol in range(OTHER_CONTROL + 16) if mask >> symbol & 1]


def _members(mask: int) -> np.ndarray:
    """bool [SYMBOLS]: which symbols a mask holds."""
    data = np.frombuffer(mask.to_bytes(SYMBOLS // 8, "little"), dtype=np.uint8)
    return np.unpackbits(data, bitorder="little").astype(bool)
