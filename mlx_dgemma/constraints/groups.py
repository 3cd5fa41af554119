"""Ids in groups that the states of an automaton hardly tell apart: one is walked for all."""

from __future__ import annotations

import numpy as np

from mlx_dgemma.constraints.expressions import SYMBOLS, Node
from mlx_dgemma.constraints.vocabulary import Vocabulary

MOST_LOOPS = 8  # sets of symbols that groups are told apart by
_HEAD = 5  # symbols at most before an id's later ones


class Groups:
    """Ids by their head, the symbols before their later ones (see `Vocabulary`): class by class the
    same within a group, as is whether later ones follow, and which of the loops hold all of them.

    A group whose later symbols a state tells apart is split: each of its ids stands alone from then
    on. Groups and single ids are numbered as they come.
    """

    def __init__(
        self, vocabulary: Vocabulary, classes: np.ndarray, loops: list[np.ndarray]
    ) -> None:
        """classes: int [SYMBOLS], from 1 on. loops: uint64 [3] each, sets as in `Vocabulary`."""
        self._vocabulary, self._classes, self._loops = vocabulary, classes, list(loops)
        self._base = int(classes.max()) + 1
        self._heads = self._base**_HEAD
        self._of = np.full(vocabulary.size, -1, dtype=np.int32)
        self._keys = np.zeros(0, dtype=np.int64)  # ascending
        self._number = np.zeros(0, dtype=np.int32)  # of each key, -1 for one that was split
        self._key = np.zeros(0, dtype=np.int64)  # of each group, and of each single id
        self.one = np.zeros(0, dtype=np.int64)
        self.single = np.zeros(0, dtype=bool)
        self.held = np.zeros(0, dtype=np.uint8)

    def __len__(self) -> int:
        return self.one.size

    @property
    def loops(self) -> int:
        """How many were known."""
        return len(self._loops)

    @property
    def nbytes(self) -> int:
        every = (self._of, self._keys, self._number, self._key, self.one, self.single, self.held)
        return sum(array.nbytes for array in every)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """int32: each id's group, -1 where it has none yet."""
        found: np.ndarray = self._of.take(ids)
        return found

    def add(self, ids: np.ndarray) -> None:
        """Sorts ids that have no group, each once, into theirs."""
        key = self._key_of(ids)
        if self._keys.size:
            at = np.minimum(np.searchsorted(self._keys, key), self._keys.size - 1)
            known = self._keys.take(at) == key
            number = np.where(known, self._number.take(at), -1)
        else:
            known, number = np.zeros(ids.size, dtype=bool), np.full(ids.size, -1, dtype=np.int32)
        joins = number >= 0
        self._of[ids[joins]] = number[joins]
        alone = known & ~joins
        if alone.any():
            self._append(ids[alone], key[alone], single=True)
        if not known.all():
            fresh, key = ids[~known], key[~known]
            keys, first, which = np.unique(key, return_index=True, return_inverse=True)
            count = len(self)
            self._append(fresh[first], keys, single=False)
            self._of[fresh] = count + which
            spots = np.searchsorted(self._keys, keys)
            self._keys = np.insert(self._keys, spots, keys)
            self._number = np.insert(self._number, spots, np.arange(count, count + keys.size))

    def split(self, groups: np.ndarray) -> None:
        """Each id of some groups stands alone; the one walked for them keeps the number."""
        parted = np.zeros(len(self), dtype=bool)
        parted[groups] = True
        self._number[np.searchsorted(self._keys, self._key[groups])] = -1
        self.single[groups] = True
        members = np.flatnonzero(self._of >= 0)
        members = members[parted[self._of[members]]]
        members = members[self.one[self._of[members]] != members]
        self._append(members, self._key[self._of[members]], single=True)

    def _append(self, ones: np.ndarray, keys: np.ndarray, *, single: bool) -> None:
        count = len(self)
        self._of[ones] = np.arange(count, count + ones.size)
        self.one = np.concatenate([self.one, ones])
        self._key = np.concatenate([self._key, keys])
        self.single = np.concatenate([self.single, np.full(ones.size, single)])
        held = (keys // self._heads // 4).astype(np.uint8)  # the key begins with them
        self.held = np.concatenate([self.held, held])

    def _held(self, ids: np.ndarray) -> np.ndarray:
        """uint8: the loops that hold each id's later symbols, a bit each."""
        held = np.zeros(ids.size, dtype=np.uint8)
        tail = self._vocabulary.later[:, ids]
        for number, loop in enumerate(self._loops):
            beyond = (tail & ~loop[:, None]).any(axis=0)
            held |= np.where(beyond, 0, 1 << number).astype(np.uint8)
        return held

    def _key_of(self, ids: np.ndarray) -> np.ndarray:
        vocabulary = self._vocabulary
        begin, later = vocabulary.offsets.take(ids), vocabulary.later_from.take(ids)
        longer = later < begin + vocabulary.lengths.take(ids)
        key = self._held(ids) * np.int64(2) + longer
        key = key * 2 + vocabulary.is_stop.take(ids)
        head = later - begin
        last = vocabulary.symbols.size - 1
        for place in range(_HEAD):
            symbol = vocabulary.symbols.take(np.minimum(begin + place, last))
            key = key * self._base + np.where(place < head, self._classes.take(symbol), 0)
        return key


def symbol_classes(language: Node) -> np.ndarray:
    """int64 [SYMBOLS], from 1 on: symbols that no expression of a language, and none that follows
    from them, tells apart. Derivatives join and cut the sets of the expression alone."""
    found = np.zeros(SYMBOLS, dtype=np.int64)
    masks: set[int] = set()
    known, stack = {language.number}, [language]
    while stack:
        node = stack.pop()
        if node.kind == "set":
            masks.add(node.mask)
        elif node.kind == "multiple":
            masks |= {1 << symbol for symbol in b".0123456789"}
        for child in node.children:
            if child.number not in known:
                known.add(child.number)
                stack.append(child)
    for mask in masks:
        data = np.frombuffer(mask.to_bytes(SYMBOLS // 8, "little"), dtype=np.uint8)
        inside = np.unpackbits(data, bitorder="little")
        found = np.unique(found * 2 + inside, return_inverse=True)[1]
    return found + 1
