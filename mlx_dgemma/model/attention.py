"""Attention of both passes: grouped queries, no score scaling, keys read where they lie.

Encoder pass: causal, its keys are appended to the context. Decoder pass: the canvas sees the
context and itself; the context is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma import kernels
from mlx_dgemma.kernels.attention import CHUNK, Pair, Segment, count_keys, fold, unfold
from mlx_dgemma.model.config import TextConfig
from mlx_dgemma.model.layer_context import LayerContext
from mlx_dgemma.model.layers import Linear, fuse
from mlx_dgemma.model.masks import encoder_mask
from mlx_dgemma.model.rope import Table

# Queries of one encoder chunk that attend at a time, so that a sliding layer reads only the keys
# near them.
QUERY_BLOCK = 256
# Keys attended to at once; the results of longer contexts are merged. Both keep the scores small,
# of which a few arrays are held at a time.
KEY_CHUNK = CHUNK
# Attention scores held at once (256 MB of them in 16 bits); more queries are taken in turns.
SCORES = 1 << 27
# Keys and values of some positions of the canvases -> those of all.
Hold = Callable[[Pair], Pair]


class Attention(nn.Module):
    """One layer's attention. Full layers have no v_proj: there the value is the raw key."""

    def __init__(self, text: TextConfig, layer: int):
        super().__init__()
        self.heads = text.num_attention_heads
        self.kv_heads = text.kv_heads_of(layer)
        self.head_dim = text.head_dim_of(layer)
        self.window = text.window_of(layer)
        self.eps = text.rms_norm_eps
        hidden, keys = text.hidden_size, self.kv_heads * self.head_dim
        self.q_proj = Linear(self.heads * self.head_dim, hidden)
        self.k_proj = Linear(keys, hidden)
        if text.is_sliding(layer):
            self.v_proj = Linear(keys, hidden)
        self.o_proj = Linear(hidden, self.heads * self.head_dim)
        self.q_norm = nn.RMSNorm(self.head_dim, self.eps)
        self.k_norm = nn.RMSNorm(self.head_dim, self.eps)

    def encode(
        self, x: mx.array, rope: Table, context: LayerContext, blocks: np.ndarray | None
    ) -> mx.array:
        """Causal pass over x [1, L, H]; appends L keys to the context."""
        queries, keys, values = self.project(x)
        queries = self.queries(queries, rope)
        first_query = context.offset
        segments = context.append(*self.keys_and_values(keys, values, rope))
        return self.o_proj(attend_causal(queries, segments, first_query, self.window, blocks))

    def extend(self, x: mx.array, rope: Table, context: LayerContext) -> None:
        """Append the keys of x [1, L, H] without attending, all that the encoder's last layer does.

        That layer's projections are never joined, so its queries need not be computed.
        """
        keys = self._split(self.k_proj(x), self.kv_heads)
        values = self._split(self.v_proj(x), self.kv_heads) if "v_proj" in self else keys
        context.append(*self.keys_and_values(keys, values, rope))

    def decode(
        self, x: mx.array, rope: Table, context: LayerContext, hold: Hold | None = None
    ) -> mx.array:
        """Bidirectional pass over canvases x [B, C, H] after one shared context.

        hold: of x [B, S, H] that is some positions of the canvases; completes their keys.
        """
        queries, keys, values = self.project(x)
        queries = self.queries(queries, rope)
        keys, values = self.keys_and_values(keys, values, rope)
        if hold is not None:
            keys, values = hold((keys, values))
        if x.shape[0] == 1:
            segments = context.with_canvas(keys, values)
        else:  # The context is shared: no row of the batch gets a copy of it.
            segments = [*context.visible(), (keys, values)]
        return self.o_proj(attend(queries, segments))

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Raw queries, keys, values [B, L, heads, D]."""
        if "qkv_proj" in self:
            query_width, key_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
            joined = self.qkv_proj(x)
            parts = mx.split(joined, [query_width, query_width + key_width], axis=-1)
            queries, keys = parts[0], parts[1]
            values = parts[2] if parts[2].shape[-1] else keys
        else:
            queries, keys = self.q_proj(x), self.k_proj(x)
            values = self.v_proj(x) if "v_proj" in self else keys
        return (
            self._split(queries, self.heads),
            self._split(keys, self.kv_heads),
            self._split(values, self.kv_heads),
        )

    def queries(self, queries: mx.array, rope: Table) -> mx.array:
        """Normed and rotated queries [B, heads, L, D] of raw ones [B, L, heads, D].

        The tables are [L, D / 2], or [B * L, D / 2] where canvases have rows of their own.
        """
        return self._heads_first(queries, self.q_norm.weight, rope)

    def keys_and_values(
        self, keys: mx.array, values: mx.array, rope: Table
    ) -> tuple[mx.array, mx.array]:
        """Normed and rotated keys, normed values, both [B, heads, L, D]."""
        rotated = self._heads_first(keys, self.k_norm.weight, rope)
        return rotated, self._heads_first(values, None, None)

    def _heads_first(self, x: mx.array, weight: mx.array | None, rope: Table | None) -> mx.array:
        batch, length, heads, dim = x.shape
        if rope is None or rope[0].shape[0] == length:
            return kernels.normed_heads(x, weight, rope, self.eps)
        joined = x.reshape(1, batch * length, heads, dim)
        normed = kernels.normed_heads(joined, weight, rope, self.eps)
        return normed.reshape(heads, batch, length, dim).swapaxes(0, 1)

    def prepare(self) -> None:
        names = [name for name in ("q_proj", "k_proj", "v_proj") if name in self]
        fused = fuse([self[name] for name in names])
        if fused is not None:
            for name in names:
                delattr(self, name)
            self.qkv_proj = fused

    def _split(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:-1], heads, self.head_dim)


def attend(
    queries: mx.array, segments: Sequence[Segment], mask: mx.array | None = None
) -> mx.array:
    """softmax(q k^T) v: queries [B, heads, L, D], keys [B or 1, kv_heads, K, D] ->
    [B, L, heads * D], over the keys of all segments.

    mask: bool [L, M] of the last M keys; all before them are visible.
    """
    count = sum(map(count_keys, segments))
    turns = _turns(queries, min(count, KEY_CHUNK))
    if len(turns) > 1:
        parts: list[mx.array] = []
        for turn in turns:
            some = _after(queries[:, :, turn], parts)
            parts.append(attend(some, segments, None if mask is None else mask[turn]))
        return mx.concatenate(parts, axis=1)
    first = segments[0]
    if len(segments) == 1 and isinstance(first, tuple) and count <= KEY_CHUNK:
        return _attend_at_once(queries, *first, mask)
    return _side_by_side(kernels.attend(queries, segments, chunk=KEY_CHUNK, mask=mask))


def attend_causal(
    queries: mx.array,
    segments: Sequence[Segment],
    first_query: int,
    window: int | None,
    blocks: np.ndarray | None,
) -> mx.array:
    """Encoder attention of queries [1, heads, L, D] -> [1, L, heads * D], a block of queries at a
    time over just the keys it can see.

    The last segment ends with the queries' own keys. A sliding layer has no other segment.
    """
    *before, own = segments
    assert isinstance(own, tuple)
    keys, values = own
    length, end = queries.shape[2], first_query + queries.shape[2]
    first_key = end - sum(map(count_keys, segments))
    # Without a window all that was there before is visible, and the mask need not reach back to it.
    oldest = first_query if window is None else first_key
    if blocks is not None:  # an image block looks ahead and past the window: keep it in one piece
        mask = encoder_mask(first_query, length, oldest, end - oldest, window, blocks)
        return attend(queries, segments, mask)
    outputs: list[mx.array] = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        begin = 0 if window is None else max(0, first_query + start - window + 1 - first_key)
        masked = max(oldest, first_key + begin)
        mask = encoder_mask(
            first_query + start, stop - start, masked, first_query + stop - masked, window
        )
        seen = slice(begin, keys.shape[2] - (length - stop))
        part = [*before, (keys[:, :, seen], values[:, :, seen])]
        outputs.append(attend(_after(queries[:, :, start:stop], outputs), part, mask))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)


def _attend_at_once(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None
) -> mx.array:
    """The queries that share a key head are folded into one matrix: keys are never repeated."""
    scores = fold(queries, keys.shape) @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = _hide(scores, mask)
    mixed = mx.softmax(scores, axis=-1, precise=True) @ values
    shared = keys.shape[0] < queries.shape[0]
    return _side_by_side(unfold(mixed, queries.shape[:3], shared))


def _after(queries: mx.array, done: list[mx.array]) -> mx.array:
    """The same queries, once what was done before them is computed: one block's scores at a time.

    MLX would else begin several blocks before it ends one.
    """
    return mx.depends([queries], done[-1:])[0] if done else queries


def _turns(queries: mx.array, keys: int) -> list[slice]:
    """Spans of queries whose scores stay within SCORES."""
    batch, heads, length, _ = queries.shape
    rows = max(1, SCORES // (batch * heads * keys))
    return [slice(start, start + rows) for start in range(0, length, rows)]


def _side_by_side(mixed: mx.array) -> mx.array:
    """[B, heads, L, D] -> [B, L, heads * D]."""
    return mixed.transpose(0, 2, 1, 3).reshape(mixed.shape[0], mixed.shape[2], -1)


def _hide(scores: mx.array, mask: mx.array) -> mx.array:
    """Lower hidden scores to the dtype's smallest finite number (minus infinity breeds NaN)."""
    batch, kv_heads, rows, keys = scores.shape
    queries, masked = mask.shape
    if masked < keys:
        mask = mx.concatenate([mx.ones((queries, keys - masked), dtype=mx.bool_), mask], axis=1)
    split = scores.reshape(batch, kv_heads, rows // queries, queries, keys)
    lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
    return mx.where(mask, split, lowest).reshape(scores.shape)
