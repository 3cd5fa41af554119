"""A vocabulary of a few tokens, for tests that count every sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_dgemma.constraints.vocabulary import Vocabulary


class _Tokens:
    def __init__(self, tokens: Sequence[str], stop_ids: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self.stop_ids = frozenset(stop_ids)
        self.control_ids = self.stop_ids
        self.ids: dict[str, int] = {}

    def token(self, id_: int) -> str:
        return self._tokens[id_]

    def is_byte(self, id_: int) -> bool:
        return self._tokens[id_].startswith("<0x")

    def id_of(self, token: str) -> int | None:
        return self._tokens.index(token) if token in self._tokens else None


class TinyVocabulary(Vocabulary):
    def __init__(self, tokens: Sequence[str], stop_ids: Sequence[int]) -> None:
        super().__init__(_Tokens(tokens, stop_ids), len(tokens))


def ascending(ids: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates [C, K] and their probabilities, as `Distributions` wants them."""
    order = p.argsort(axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(p, order, 1)
