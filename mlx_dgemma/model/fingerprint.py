"""Which model a context belongs to: keys and values are worth nothing to any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.model.config import TextConfig
from mlx_dgemma.model.names import named_tensors

_NUMBERS = 1024  # of every tensor


def fingerprint(config: TextConfig, dtype: mx.Dtype, parts: Mapping[str, nn.Module]) -> str:
    """SHA-256 of config, dtype and numbers spread over every tensor of the named parts.

    An adapter may change a single projection, so none is left out.
    """
    digest = hashlib.sha256(json.dumps(asdict(config)).encode())
    digest.update(str(dtype).encode())
    tree = {name: part.parameters() for name, part in parts.items()}
    spread = {name: _spread(tensor) for name, tensor in named_tensors(tree).items()}
    mx.eval(spread)
    for name, numbers in spread.items():
        digest.update(name.encode())
        digest.update(np.array(numbers).tobytes())
    return digest.hexdigest()


def _spread(tensor: mx.array) -> mx.array:
    """uint8: the bytes of numbers from all over a tensor."""
    flat = tensor.reshape(-1)
    return mx.contiguous(flat[:: max(1, flat.size // _NUMBERS)]).view(mx.uint8)
