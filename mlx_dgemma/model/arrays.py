"""Named arrays as bytes, and back: what one process sends another of a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np


def packed_arrays(arrays: Mapping[str, mx.array]) -> tuple[list[Any], bytes]:
    """[name, dtype, shape] of each, and the bytes of all in this order."""
    described: list[Any] = []
    parts = []
    for name, array in arrays.items():
        described.append([name, str(array.dtype).split(".")[-1], list(array.shape)])
        parts.append(np.array(mx.contiguous(array).view(mx.uint8)).tobytes())
    return described, b"".join(parts)


def unpacked_arrays(described: Sequence[Any], payload: bytes) -> dict[str, mx.array]:
    """The arrays by name."""
    found, start = {}, 0
    for name, dtype, shape in described:
        kind: mx.Dtype = getattr(mx, dtype)
        end = start + prod(shape) * kind.size
        raw = mx.array(np.frombuffer(payload[start:end], np.uint8))
        found[name] = raw.view(kind).reshape(shape)
        start = end
    return found
