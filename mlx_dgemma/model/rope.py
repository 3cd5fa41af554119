"""Rotary position tables: built in float32 on the host, the same on every backend.

Two kinds. Sliding layers rotate every pair (i, i + D/2). Full layers are "proportional": the
first `partial_rotary_factor` of the pairs rotate, with exponents over the whole head dimension,
and the rest have angle zero.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_dgemma.model.config import FULL, SLIDING, TextConfig

Table = tuple[mx.array, mx.array]


def inverse_frequencies(theta: float, head_dim: int, rotated_pairs: int) -> np.ndarray:
    """float32 [head_dim / 2]: radians per position of every pair; zero where none turns."""
    exponents = np.arange(0, 2 * rotated_pairs, 2, dtype=np.float32) / np.float32(head_dim)
    rotated = np.float32(1.0) / np.power(np.float32(theta), exponents, dtype=np.float32)
    return np.concatenate([rotated, np.zeros(head_dim // 2 - rotated_pairs, np.float32)])


def table(frequencies: np.ndarray, positions: np.ndarray, dtype: mx.Dtype) -> Table:
    """cos and sin [positions, head_dim / 2] in `dtype`.

    The angle is rounded to float32 before the cosine, as the reference does: at position 200,000
    that rounding is larger than the rest of the network's.
    """
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    cos, sin = (
        mx.array(wave.astype(np.float32)).astype(dtype, stream=mx.cpu)
        for wave in (np.cos(angles), np.sin(angles))
    )
    mx.eval(cos, sin)  # now, on the CPU: another thread may use them, and no GPU work is awaited
    return cos, sin


class RopeTables:
    """The tables of both layer types for a span of positions; the last spans are remembered."""

    def __init__(self, text: TextConfig, dtype: mx.Dtype):
        pairs = int(text.full_partial_rotary_factor * text.global_head_dim // 2)
        self.frequencies = {
            SLIDING: inverse_frequencies(
                text.sliding_rope_theta, text.head_dim, text.head_dim // 2
            ),
            FULL: inverse_frequencies(text.full_rope_theta, text.global_head_dim, pairs),
        }
        self.dtype = dtype
        self.span = lru_cache(maxsize=2)(self._span)

    def _span(self, start: int, length: int) -> dict[str, Table]:
        positions = np.arange(start, start + length)
        return {
            kind: table(frequencies, positions, self.dtype)
            for kind, frequencies in self.frequencies.items()
        }
