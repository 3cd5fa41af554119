"""Both passes over a batch of different prompts, for gradients.

The network's own modules, put together for training: prompts are padded and masked instead of
cached, every position of the encoder pass is computed, and a canvas sees the keys of its own row
up to where it begins. For one example this is `Model.encode` and `Model.hidden`, to rounding.
Metal kernels have no gradient, so their twins run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_dgemma.kernels.gradients import attend, rms_norm, with_gradient
from mlx_dgemma.model import Model
from mlx_dgemma.model.backbone import Layer
from mlx_dgemma.model.masks import image_blocks
from mlx_dgemma.model.names import named_tensors
from mlx_dgemma.model.rope import Table
from mlx_dgemma.training.batches import Rows

Pair = tuple[mx.array, mx.array]


class Passes:
    """The passes of a model. checkpoint: compute a layer's insides again for its gradient, so that
    only what enters each layer is held."""

    def __init__(self, model: Model, *, checkpoint: bool = False) -> None:
        self.model = model
        self._checkpoint = checkpoint

    def encode(self, batch: Rows) -> tuple[mx.array, list[Pair]]:
        """Hidden states [B, L, H] after the final norm, and every layer's keys and values
        [B, kv_heads, L, D]."""
        model = self.model
        x = self._embed(batch)
        rope = model.rope.span(0, batch.tokens.shape[1])
        blocks, dtype = self._blocks(batch), model.dtype
        longest = batch.tokens.shape[1]
        masks = self._by_window(
            lambda window: _added(encoder_visible(batch.lengths, longest, window, blocks), dtype)
        )
        pairs = []
        scalars = model.model.encoder.language_model.layers
        for layer, scalar in zip(model.layers, scalars, strict=True):
            run = self._wrapped(layer, _encode_layer)
            mask = masks[layer.self_attn.window]
            x, keys, values = run(x, *rope[layer.kind], mask, scalar.layer_scalar)
            pairs.append((keys, values))
        return self._final(x), pairs

    def decode(
        self, canvas: mx.array, starts: np.ndarray, context: Sequence[Pair], soft: mx.array | None
    ) -> mx.array:
        """[B, C, H] after the final norm, for canvases int [B, C] that begin at `starts` [B] of
        the encoded rows. soft: [B, C, H] soft embeddings, zeros where a row has no signal."""
        model = self.model
        decoder = model.model.decoder
        x = decoder.self_conditioning.condition(model.embedded(canvas), soft)
        length, encoded = canvas.shape[1], context[0][0].shape[2]
        tables = model.rope.span(0, encoded + length)
        places = mx.array((starts[:, None] + np.arange(length)).reshape(-1))
        rope = {kind: tuple(wave[places] for wave in table) for kind, table in tables.items()}
        masks = self._by_window(
            lambda window: _added(decoder_visible(starts, encoded, length, window), model.dtype)
        )
        for layer, (keys, values) in zip(model.layers, context, strict=True):
            run = self._wrapped(layer, _decode_layer)
            x = run(x, *rope[layer.kind], masks[layer.self_attn.window], keys, values)
        return self._final(x)

    def _final(self, x: mx.array) -> mx.array:
        norm = self.model.model.decoder.norm
        return rms_norm(x, norm.weight, norm.eps).astype(self.model.dtype)

    def _wrapped(self, layer: Layer, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._checkpoint:
            return _computed_again(layer, function)
        return partial(function, layer)

    def _by_window(self, make: Callable[[int | None], mx.array]) -> dict[int | None, mx.array]:
        windows = {layer.self_attn.window for layer in self.model.layers}
        return {window: make(window) for window in windows}

    def _blocks(self, batch: Rows) -> np.ndarray | None:
        if not any(batch.images) or not self.model.config.text.bidirectional_images:
            return None
        image = batch.tokens == self.model.config.image_token_id
        return np.stack([image_blocks(row) for row in image])

    def _embed(self, batch: Rows) -> mx.array:
        x = self.model.embedded(mx.array(batch.tokens))
        for row, images in enumerate(batch.images):
            blocks = image_blocks(batch.tokens[row] == self.model.config.image_token_id)
            for index, image in enumerate(images):
                places = np.flatnonzero(blocks == index)
                features = mx.stop_gradient(self.model.image_features(image.patches))
                x[row, places[0] : places[-1] + 1] = features.astype(x.dtype)
        return x


def _computed_again(layer: Layer, function: Callable[..., Any]) -> Callable[..., Any]:
    """function(layer, *arrays), whose insides are computed again for its gradient, once what comes
    back to it is there. mx.checkpoint waits for what leaves it alone, so that MLX may begin all
    layers again before it has gone back through one."""
    own = list(named_tensors(layer.trainable_parameters()).items())

    def run(*arrays: mx.array) -> Any:
        tensors, inputs = arrays[: len(own)], arrays[len(own) :]
        layer.update(_named(own, tensors))
        found = function(layer, *inputs)
        layer.update(_named(own, [tensor for _, tensor in own]))
        return found

    def gradient(arrays: Any, cotangents: Any, _: Any) -> Any:
        given = list(cotangents) if isinstance(cotangents, tuple | list) else [cotangents]
        inputs = mx.depends(list(arrays[len(own) :]), given)
        return mx.vjp(run, [*arrays[: len(own)], *inputs], given)[1]

    call = with_gradient(run, gradient)
    return lambda *arrays: call(*(tensor for _, tensor in own), *arrays)


def _named(own: list[tuple[str, mx.array]], tensors: Sequence[mx.array]) -> Any:
    return tree_unflatten([(name, t) for (name, _), t in zip(own, tensors, strict=True)])


def _encode_layer(
    layer: Layer, x: mx.array, cosine: mx.array, sine: mx.array, mask: mx.array, scalar: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    queries, keys, values = _heads(layer, x, (cosine, sine))
    mixed = _attend(layer, queries, keys, values, mask)
    return layer.feed_forward(x, mixed, scalar), keys, values


def _decode_layer(
    layer: Layer,
    x: mx.array,
    cosine: mx.array,
    sine: mx.array,
    mask: mx.array,
    context_keys: mx.array,
    context_values: mx.array,
) -> mx.array:
    queries, keys, values = _heads(layer, x, (cosine, sine))
    keys = mx.concatenate([context_keys, keys], axis=2)
    values = mx.concatenate([context_values, values], axis=2)
    mixed = _attend(layer, queries, keys, values, mask)
    return layer.feed_forward(x, mixed, layer.layer_scalar)


def _heads(layer: Layer, x: mx.array, rope: Table) -> tuple[mx.array, mx.array, mx.array]:
    attention = layer.self_attn
    queries, keys, values = attention.project(layer.attention_input(x))
    return attention.queries(queries, rope), *attention.keys_and_values(keys, values, rope)


def _attend(
    layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array
) -> mx.array:
    mixed = attend(queries, keys, values, mask)
    batch, _, length, _ = mixed.shape
    return layer.self_attn.o_proj(mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1))


def encoder_visible(
    lengths: np.ndarray, longest: int, window: int | None, blocks: np.ndarray | None = None
) -> np.ndarray:
    """bool [B, 1, L, L], which key a position sees: causal within the row's length, and all of an
    image's; what is padding sees itself. blocks: int [B, L], the image that a position belongs to,
    or -1."""
    place = np.arange(longest)
    visible = place[None, :] <= place[:, None]
    if window is not None:
        visible = visible & (place[None, :] > place[:, None] - window)
    rows = visible[None] & (place < lengths[:, None])[:, None, :]
    if blocks is not None:
        rows |= (blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None]
    rows |= np.eye(longest, dtype=bool)[None]
    return rows[:, None]


def decoder_visible(
    starts: np.ndarray, encoded: int, length: int, window: int | None
) -> np.ndarray:
    """bool [B, 1, 1, L + C]: the row's tokens before its canvas, within the window, and all of
    the canvas."""
    place = np.arange(encoded)
    seen = place[None] < starts[:, None]
    if window is not None:
        seen = seen & (place[None] > starts[:, None] - window)
    whole = np.concatenate([seen, np.ones((len(starts), length), bool)], axis=1)
    return whole[:, None, None]


def _added(visible: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """What is added to scores, so that nothing else is seen: quicker than a choice on a CPU."""
    return mx.array(np.where(visible, np.float32(0), np.float32(-np.inf))).astype(dtype)
