"""Products in float16: what would pass its range comes in a larger unit.

Everything that a matrix product reads comes from a norm, except the input of the two branches'
`down_proj`: gelu(gate) * up, whose magnitude no norm bounds, and its output with it. A norm comes
next. So the rows of `up` are multiplied by 1 / unit, a power of two, which changes nothing of a
result but its exponent, and the norm's epsilon by the square of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_dgemma.model.layers import Weights

if TYPE_CHECKING:
    from mlx_dgemma.model.backbone import Layer
    from mlx_dgemma.model.network import Model

_BYTES = ("mxfp4", "mxfp8")  # modes whose scales are exponents, one byte each


def can_use_units(model: Model) -> bool:
    """Whether every matrix that `use_unit` changes is dense, or packed in a way it can change."""
    matrices = [one for layer in model.layers for one in (_up(layer), layer.experts.gate_up_proj)]
    return all(
        isinstance(one, Weights)
        and (one.packing is None or one.packing.mode in ("affine", *_BYTES))
        for one in matrices
    )


def use_unit(model: Model, unit: int) -> None:
    """Lets both branches of every layer compute in units of `unit`, a power of two.

    Before `Model.prepare`, once. The model then computes what it did, as long as nothing was beyond
    the range of its dtype before, or is below it now.
    """
    if unit < 1 or unit & (unit - 1):
        raise ValueError(f"{unit=} is no power of two")
    for layer in model.layers:
        layer.unit = float(unit)
        _divide(_up(layer), unit, 0)
        experts = layer.experts.gate_up_proj
        _divide(experts, unit, experts.outputs // 2)


def _up(layer: Layer) -> Weights:
    found: Weights = layer.mlp.up_proj
    return found


def _divide(matrix: Weights, unit: int, first: int) -> None:
    """Divides the rows of the matrix from `first` on."""
    for name in ("weight",) if matrix.packing is None else ("scales", "biases"):
        if name not in matrix:
            continue
        tensor = matrix[name]
        if tensor.dtype == mx.uint8:  # an exponent
            less = mx.maximum(tensor.astype(mx.int32) - (unit.bit_length() - 1), 0)
            divided = less.astype(mx.uint8)
        else:
            divided = tensor * mx.array(1 / unit, tensor.dtype)
        rows = mx.arange(tensor.shape[-2])[:, None] >= first
        matrix[name] = mx.where(rows, divided, tensor)
