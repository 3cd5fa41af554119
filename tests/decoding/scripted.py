"""A network that says what it is told, so that tests of the loop need no weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from mlx_dgemma.kernels.matrix import Matrix

VOCAB = 12
STOP = 1
SURE = 25.0  # a raw logit that leaves next to no entropy after the softcap


class ScriptedCache:
    """A context that only counts."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.ids: list[int] = []
        self.arrays: list[mx.array] = []

    def expect(self, count: int) -> None:
        pass


class ScriptedModel:
    """Logits come from `script(block, step, canvas) -> float [C, V]`; embeddings are one-hot.

    Blocks are counted by the prefills between them, steps by the calls since.
    """

    def __init__(
        self,
        script: Callable[[int, int, np.ndarray], np.ndarray],
        canvas_length: int = 4,
        limit: int = 1000,
    ) -> None:
        text = SimpleNamespace(
            vocab_size=VOCAB, final_logit_softcapping=30.0, max_position_embeddings=limit
        )
        self.team = None
        self.config = SimpleNamespace(text=text, canvas_length=canvas_length)
        self.script = script
        self.embed_scale = 1.0
        self.embedding_matrix = Matrix(mx.eye(VOCAB))
        self.block = -1
        self.step = 0
        self.canvases: list[np.ndarray] = []
        self.signals: list[np.ndarray | None] = []

    def prefill(
        self, ids: mx.array, cache: ScriptedCache, images: object = None, cancelled: object = None
    ) -> None:
        cache.offset += ids.shape[1]
        cache.ids += ids[0].tolist()
        self.block += 1
        self.step = 0

    def hidden(
        self,
        canvas: mx.array,
        cache: ScriptedCache,
        soft: mx.array | None = None,
        held: None = None,
        begun: None = None,
        dispatch: bool = False,
    ) -> mx.array:
        self.step += 1
        self.canvases.append(np.array(canvas))
        self.signals.append(None if soft is None else np.array(soft))
        rows = [self.script(self.block, self.step, row) for row in np.array(canvas)]
        return mx.array(np.stack(rows).astype(np.float32))

    def begin(
        self,
        canvas: mx.array,
        cache: ScriptedCache,
        soft: mx.array | None = None,
        held: None = None,
    ) -> None:
        mx.async_eval(canvas, soft)

    def await_context(self, cache: ScriptedCache, length: int) -> None:
        pass

    def raw_logits(self, hidden: mx.array) -> mx.array:
        return hidden

    def softcap(self, raw_logits: mx.array) -> mx.array:
        return mx.tanh(raw_logits / 30.0) * 30.0

    def embedding_rows(self, ids: mx.array) -> mx.array:
        return mx.eye(VOCAB)[ids]


def certain(*ids: int) -> np.ndarray:
    """Logits [C, V] that leave no doubt about `ids`."""
    logits = np.full((len(ids), VOCAB), -SURE, dtype=np.float32)
    logits[np.arange(len(ids)), list(ids)] = SURE
    return logits


def undecided(length: int) -> np.ndarray:
    """Uniform logits [C, V]."""
    return np.zeros((length, VOCAB), dtype=np.float32)
