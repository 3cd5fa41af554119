"""The Gemma 4 vision tower: image patches in, soft tokens in the text model's space out."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.kernels.fused_attention import OPERATION as FUSED_ATTENTION
from mlx_dgemma.kernels.fused_attention import fused
from mlx_dgemma.kernels.moe import geglu
from mlx_dgemma.kernels.qkv import rotate
from mlx_dgemma.model.attention import attend
from mlx_dgemma.model.config import VisionConfig
from mlx_dgemma.model.layers import Linear
from mlx_dgemma.model.rope import inverse_frequencies, table


@dataclass(frozen=True)
class ImagePatches:
    """One image, cut into patches.

    pixels: float [patches, 3 * patch_size**2] in 0..1, a patch's rows of RGB pixels.
    positions: int [patches, 2], the patch's column and row; (-1, -1) marks padding.
    """

    pixels: np.ndarray
    positions: np.ndarray

    @property
    def key(self) -> bytes:
        """Equal for equal content."""
        digest = hashlib.sha256(repr((self.pixels.shape, self.pixels.dtype.str)).encode())
        for values in (self.pixels, self.positions):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.digest()

    def without_padding(self) -> ImagePatches:
        real = (self.positions >= 0).all(axis=-1)
        return ImagePatches(self.pixels[real], self.positions[real])


class FeatureCache:
    """The soft tokens of the images encoded last, so that the same image is encoded once."""

    def __init__(self, budget_bytes: int = 64 << 20):
        self._budget = budget_bytes
        self._known: OrderedDict[bytes, mx.array] = OrderedDict()

    def get(self, image: ImagePatches, encode: Callable[[ImagePatches], mx.array]) -> mx.array:
        """encode(image), [soft tokens, H], evaluated, or what it was the last time."""
        key = image.key
        if key not in self._known:
            features = encode(image)
            mx.eval(features)  # now: the tower's activations go before the next image's come
            mx.clear_cache()
            self._known[key] = features
        self._known.move_to_end(key)
        features = self._known[key]
        while sum(kept.nbytes for kept in self._known.values()) > self._budget:
            self._known.popitem(last=False)
        return features

    def clear(self) -> None:
        """Forgets them all."""
        self._known.clear()


class ClippableLinear(nn.Module):
    """A linear map whose input and output are clamped, where the checkpoint has bounds."""

    def __init__(self, outputs: int, inputs: int, clipped: bool):
        super().__init__()
        self.linear = Linear(outputs, inputs)
        self.clipped = clipped
        if clipped:
            self.input_min, self.input_max = mx.zeros(()), mx.zeros(())
            self.output_min, self.output_max = mx.zeros(()), mx.zeros(())

    def __call__(self, x: mx.array) -> mx.array:
        if not self.clipped:
            return self.linear(x)
        x = mx.clip(x, self.input_min, self.input_max)
        return mx.clip(self.linear(x), self.output_min, self.output_max)


class VisionAttention(nn.Module):
    """Bidirectional attention over one image's patches, with a rotary half per axis."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        clipped = config.use_clipped_linears
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        hidden, queries = config.hidden_size, self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        self.q_proj = ClippableLinear(queries, hidden, clipped)
        self.k_proj = ClippableLinear(keys, hidden, clipped)
        self.v_proj = ClippableLinear(keys, hidden, clipped)
        self.o_proj = ClippableLinear(hidden, queries, clipped)
        self.q_norm = nn.RMSNorm(self.head_dim, self.eps)
        self.k_norm = nn.RMSNorm(self.head_dim, self.eps)

    def __call__(self, x: mx.array, rope: tuple[tuple[mx.array, mx.array], ...]) -> mx.array:
        queries = self._rotated(self.q_norm(self._split(self.q_proj(x), self.heads)), rope)
        keys = self._rotated(self.k_norm(self._split(self.k_proj(x), self.kv_heads)), rope)
        values = mx.fast.rms_norm(self._split(self.v_proj(x), self.kv_heads), None, self.eps)
        values = values.transpose(0, 2, 1, 3)
        return self.o_proj(self._attend(queries, keys, values))

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """[1, L, heads * D] of queries [1, heads, L, D], keys and values [1, kv_heads, L, D]."""
        _, heads, patches, head_dim = queries.shape
        sizes = (queries.dtype, patches, heads, head_dim)
        if keys.shape == queries.shape and dispatch.use(FUSED_ATTENTION, *sizes):
            return fused(queries, keys, values).swapaxes(1, 2).reshape(1, patches, -1)
        return attend(queries, [(keys, values)])

    def _split(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:-1], heads, self.head_dim)

    def _rotated(self, x: mx.array, rope: tuple[tuple[mx.array, mx.array], ...]) -> mx.array:
        halves = mx.split(x.transpose(0, 2, 1, 3), 2, axis=-1)
        return mx.concatenate(
            [rotate(half, axis) for half, axis in zip(halves, rope, strict=True)], axis=-1
        )


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_proj = ClippableLinear(width, hidden, config.use_clipped_linears)
        self.up_proj = ClippableLinear(width, hidden, config.use_clipped_linears)
        self.down_proj = ClippableLinear(hidden, width, config.use_clipped_linears)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, eps)

    def __call__(self, x: mx.array, rope: tuple[tuple[mx.array, mx.array], ...]) -> mx.array:
        mixed = self.self_attn(self.input_layernorm(x), rope)
        x = x + self.post_attention_layernorm(mixed)
        mixed = self.mlp(self.pre_feedforward_layernorm(x))
        after: mx.array = self.post_feedforward_layernorm(mixed)
        return x + after


class PatchEmbedder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.input_proj = Linear(hidden, 3 * config.patch_size**2)
        self.position_embedding_table = mx.zeros((2, config.position_embedding_size, hidden))

    def __call__(self, pixels: mx.array, positions: np.ndarray) -> mx.array:
        columns, rows = mx.array(positions[:, 0]), mx.array(positions[:, 1])
        places = self.position_embedding_table[0][columns] + self.position_embedding_table[1][rows]
        return self.input_proj(2 * (pixels - 0.5)) + places


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """Patches of one image -> soft tokens [tokens, width], standardised where the model asks."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.zeros((config.hidden_size,))

    def __call__(self, image: ImagePatches, dtype: mx.Dtype) -> mx.array:
        image = image.without_padding()
        x = self.patch_embedder(mx.array(image.pixels).astype(dtype), image.positions)[None]
        rope = self._rope(image.positions, dtype)
        for layer in self.encoder.layers:
            x = layer(x, rope)
        pooled: mx.array = self._pool(x[0], image.positions) * self.config.hidden_size**0.5
        if self.config.standardize:
            bias, scale = self.std_bias.astype(mx.float32), self.std_scale.astype(mx.float32)
            pooled = (pooled - bias) * scale
        return pooled.astype(dtype)

    def _rope(
        self, positions: np.ndarray, dtype: mx.Dtype
    ) -> tuple[tuple[mx.array, mx.array], ...]:
        half = self.config.head_dim // 2
        frequencies = inverse_frequencies(self.config.rope_theta, half, half // 2)
        return tuple(table(frequencies, positions[:, axis], dtype) for axis in (0, 1))

    def _pool(self, x: mx.array, positions: np.ndarray) -> mx.array:
        """Average each k x k square of patches, in float32; squares in reading order."""
        k = self.config.pooling_kernel_size
        columns = int(positions[:, 0].max()) + 1
        square = positions[:, 0] // k + (columns // k) * (positions[:, 1] // k)
        tokens = len(positions) // (k * k)
        if (
            tokens * k * k != len(positions)
            or (np.bincount(square, minlength=tokens) != k * k).any()
        ):
            raise InputError(
                f"An image must have a whole number of {k} by {k} patch squares, "
                f"not {len(positions)} patches in {columns} columns."
            )
        order = mx.array(np.argsort(square, kind="stable"))
        squares = x.astype(mx.float32)[order].reshape(tokens, k * k, -1)
        return squares.mean(axis=1).astype(x.dtype).astype(mx.float32)


class VisionProjection(nn.Module):
    """Soft tokens -> text width."""

    def __init__(self, config: VisionConfig, text_hidden: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embedding_projection = Linear(text_hidden, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.embedding_projection(mx.fast.rms_norm(x, None, self.eps))
