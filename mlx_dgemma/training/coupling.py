"""Randomness that a noise token carries: the scores by which it decides between tokens.

A network that is to answer in few steps must be sure of a token where several are right, and yet
not always choose the same. The noise of a fresh canvas is random already: when every choice of a
position is made by a fixed rule from its noise token, the answer is a function of the noise, and a
network can learn to be sure of it. The rule is the Gumbel-max trick, so that over all noise each
token is drawn with nearly the probability that the network gives it.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_dgemma.model import Model

_BLOCK = 16384  # rows of the embedding table at a time
_LIKELY = 64  # tokens of a position that noise is tried on
_TAIL = 1e-6  # of the normal distribution, on both sides


class Coupling:
    """Gumbel-distributed scores of every token, by noise token.

    score(z, v) is the inner product of both tokens' embeddings, whitened over the vocabulary: over
    all z close to normal, and for different v nearly independent. Its quantile becomes that of a
    Gumbel distribution. It is linear in the embedding of z, so that a network learns it easily.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        vocabulary, hidden = model.config.text.vocab_size, model.config.text.hidden_size
        total, squares = mx.zeros((hidden,)), mx.zeros((hidden, hidden))
        for start in range(0, vocabulary, _BLOCK):
            rows = self._rows(mx.arange(start, min(start + _BLOCK, vocabulary)))
            total, squares = total + rows.sum(axis=0), squares + rows.T @ rows
            mx.eval(total, squares)
        self._mean = total / vocabulary
        covariance = np.array(squares, np.float64) / vocabulary
        covariance -= np.outer(np.array(self._mean), np.array(self._mean))
        values, vectors = np.linalg.eigh(covariance)
        roots = np.sqrt(np.maximum(values, 1e-6 * values.max()))
        self._whiten = mx.array((vectors / roots).astype(np.float32))
        norms = []
        for start in range(0, vocabulary, _BLOCK):
            rows = self._white(mx.arange(start, min(start + _BLOCK, vocabulary)))
            norms.append(mx.linalg.norm(rows, axis=-1))
            mx.eval(norms)
        self._norms = mx.maximum(mx.concatenate(norms), 1e-6)

    def scores(self, noise: mx.array) -> mx.array:
        """float32 [R, V] for noise ids int [R]."""
        direction = self._white(noise) @ self._whiten.T
        products = self._model.raw_logits(direction.astype(self._model.dtype)).astype(mx.float32)
        return _gumbel((products - (direction @ self._mean)[:, None]) / self._norms)

    def equivalent(self, logits: mx.array, token: mx.array, candidates: mx.array) -> mx.array:
        """bool [R, M]: which noise ids of candidates int [M] decide for token int [R] too, where
        rows have logits float32 [R, V]; tokens beyond the `_LIKELY` likeliest do not count."""
        likely = mx.argpartition(-logits, _LIKELY, axis=-1)[:, :_LIKELY]
        ids = mx.concatenate([token[:, None], likely], axis=1)
        rows = self._white(ids) / self._norms[ids][..., None]
        scores = _gumbel(rows @ self._white(candidates).T)
        total = mx.take_along_axis(logits, ids, axis=-1)[..., None] + scores
        return total[:, 0] >= total.max(axis=1)

    def _rows(self, ids: mx.array) -> mx.array:
        return self._model.embedding_rows(ids).astype(mx.float32)

    def _white(self, ids: mx.array) -> mx.array:
        return (self._rows(ids) - self._mean) @ self._whiten


def _gumbel(normal: mx.array) -> mx.array:
    quantile = mx.clip(0.5 * (1 + mx.erf(normal / 2**0.5)), _TAIL, 1 - _TAIL)
    return -mx.log(-mx.log(quantile))
