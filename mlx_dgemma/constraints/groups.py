"""Ids in groups that the states of an automaton hardly tell apart: one is walked for all."""

from __future__ import annotations

import numpy as np

from mlx_dgemma.constraints.expressions import SYMBOLS, Node
from mlx_dgemma.constraints.vocabulary import Vocabulary

MOST_LOOPS = 8  # sets of symbols that groups are told apart by
_HEAD = 5  # symbols at most before an id's later ones


class Groups:
    """Some ids by their head, the symbols before their later ones (see `Vocabulary`): class by
    class the same within a group, as is whether later ones follow, and which of the loops hold all
    of them.

    ids int [n]; group [n], of each. one [g]: an id of each group. held: uint8 [g], the loops that
    hold its later symbols, a bit each. loops: how many were known.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        ids: np.ndarray,
        classes: np.ndarray,
        loops: list[np.ndarray],
    ) -> None:
        """classes: int [SYMBOLS], from 1 on. loops: uint64 [3] each, sets as in `Vocabulary`."""
        self.ids, self.loops = ids, len(loops)
        begin, later = vocabulary.offsets.take(ids), vocabulary.later_from.take(ids)
        held = np.zeros(ids.size, dtype=np.uint8)
        tail = vocabulary.later[:, ids]
        for number, loop in enumerate(loops):
            within = (tail & ~loop[:, None]).any(axis=0)
            held |= np.where(within, 0, 1 << number).astype(np.uint8)
        key = held * 2 + (later < begin + vocabulary.lengths.take(ids)).astype(np.int64)
        base, head = int(classes.max()) + 1, later - begin
        last = vocabulary.symbols.size - 1
        for place in range(_HEAD):
            symbol = vocabulary.symbols.take(np.minimum(begin + place, last))
            key = key * base + np.where(place < head, classes.take(symbol), 0)
        _, first, self.group = np.unique(key, return_index=True, return_inverse=True)
        self.one, self.held = ids[first], held[first]
        self.stops = np.flatnonzero(vocabulary.is_stop.take(ids))


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
            masks |= {1 << symbol for symbol in range(ord("0"), ord("9") + 1)}
        for child in node.children:
            if child.number not in known:
                known.add(child.number)
                stack.append(child)
    for mask in masks:
        data = np.frombuffer(mask.to_bytes(SYMBOLS // 8, "little"), dtype=np.uint8)
        inside = np.unpackbits(data, bitorder="little")
        found = np.unique(found * 2 + inside, return_inverse=True)[1]
    return found + 1
