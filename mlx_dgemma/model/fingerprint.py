"""Which model a context belongs to: keys and values are worth nothing to any other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

if TYPE_CHECKING:
    from mlx_dgemma.model.network import Model

_NUMBERS = 1024  # of every tensor


def fingerprint(model: Model) -> str:
    """SHA-256 of config, dtype and numbers spread over every text tensor.

    An adapter may change a single projection, so none is left out.
    """
    digest = hashlib.sha256(json.dumps(asdict(model.config.text)).encode())
    digest.update(str(model.dtype).encode())
    text = {"decoder": model.model.decoder, "encoder": model.model.encoder.language_model}
    tree = {name: part.parameters() for name, part in text.items()}
    for index, layer in enumerate(model.encoder_pass.layers or ()):
        tree[f"encoder pass {index}"] = layer.parameters()
    tensors: dict[str, mx.array] = tree_flatten(tree, destination={})  # type: ignore[assignment]
    spread = {name: _spread(tensor) for name, tensor in tensors.items()}
    mx.eval(spread)
    for name, numbers in spread.items():
        digest.update(name.encode())
        digest.update(np.array(numbers).tobytes())
    return digest.hexdigest()


def _spread(tensor: mx.array) -> mx.array:
    """uint8: the bytes of numbers from all over a tensor."""
    flat = tensor.reshape(-1)
    return mx.contiguous(flat[:: max(1, flat.size // _NUMBERS)]).view(mx.uint8)
