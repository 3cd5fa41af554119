"""Low-rank deltas beside weights, and layers of which each pass has its own.

Both passes share every text weight, but an adapter may change one pass alone, or each in its
own way: the decoder runs the model's layers, and the encoder then runs views of them, which hold
the same weights beside other deltas.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma.kernels.matrix import Matrix
from mlx_dgemma.kernels.moe import combine
from mlx_dgemma.kernels.moe import twin as expert_rows
from mlx_dgemma.kernels.router import Routing
from mlx_dgemma.model.backbone import Layer
from mlx_dgemma.model.experts import Experts
from mlx_dgemma.model.layers import Weights
from mlx_dgemma.model.names import DECODER
from mlx_dgemma.model.network import Model
from mlx_dgemma.model.parameters import matrices

LAYERS = f"{DECODER}layers."
_ROWS = 1024  # of a weight whose norms are computed at once
# What `Model.prepare` joins: the joint matrix, and its parts in their order.
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Factors:
    """scale * (a @ b).T of a weight [out, in]: a [in, r], b [r, out]; of weights [E, out, in]:
    a [E, in, r], b [E, r, out].

    magnitude: float32 [out], to which DoRA brings the norm of each row of weight and delta
    together; None where it stays as it is.
    """

    a: mx.array
    b: mx.array
    scale: float | mx.array
    magnitude: mx.array | None = None

    def rows(self, start: int, stop: int) -> mx.array:
        """float32 rows (or experts) [start, stop) of the delta [out, in] or [E, out, in]."""
        a, b = self.a, self.b
        if a.ndim == 3:
            a, b = a[start:stop], b[start:stop]
        else:
            b = b[:, start:stop]
        product = b.swapaxes(-1, -2).astype(mx.float32) @ a.swapaxes(-1, -2).astype(mx.float32)
        return self.scale * product

    def merged(self, weight: mx.array, start: int) -> mx.array:
        """float32 rows beginning at `start`, of `weight` with the delta, at DoRA's magnitude."""
        both = weight.astype(mx.float32) + self.rows(start, start + weight.shape[0])
        if self.magnitude is None:
            return both
        norms = mx.linalg.norm(both, axis=-1)
        return both * (self.magnitude[start : start + len(norms)] / norms)[:, None]


class LowRank(nn.Module):
    """(linear(x) + (x @ lora_a * lora_scale) @ lora_b) * dora_scale: one delta, or several side by
    side."""

    def __init__(self, linear: Weights, parts: Sequence[tuple[int, Factors]]) -> None:
        """parts: where in the linear map's outputs a delta begins, and the delta."""
        super().__init__()
        self.linear = linear
        rows = []
        for start, part in parts:
            after = linear.outputs - start - part.b.shape[1]
            rows.append(mx.pad(part.b, [(0, 0), (start, after)]))
        self.lora_a = mx.concatenate([part.a for _, part in parts], axis=1)
        self.lora_b = mx.concatenate(rows)
        self.lora_scale = mx.concatenate(
            [mx.full((part.b.shape[0],), part.scale, mx.float32) for _, part in parts]
        )
        if any(part.magnitude is not None for _, part in parts):
            self.dora_scale = mx.ones((linear.outputs,))
            for start, part in parts:
                stop = start + part.b.shape[1]
                self.dora_scale[start:stop] = _dora_scale(linear, part, start)
            mx.eval(self.dora_scale)
        mx.eval(self.lora_a, self.lora_b, self.lora_scale)  # by now: they belong to no thread then

    def __call__(self, x: mx.array) -> mx.array:
        """[..., out] of x [..., in], in the dtype that the linear map gives."""
        y: mx.array = self.linear(x)
        inner = (x @ self.lora_a).astype(mx.float32) * self.lora_scale
        y = y + (inner.astype(self.lora_b.dtype) @ self.lora_b).astype(y.dtype)
        return y * self.dora_scale.astype(y.dtype) if "dora_scale" in self else y


def _dora_scale(linear: Weights, part: Factors, start: int) -> mx.array:
    """float32 [out]: the magnitude over the norm of each row of weight and delta."""
    outputs = part.b.shape[1]
    if part.magnitude is None:
        return mx.ones((outputs,))
    norms = []
    for first in range(0, outputs, _ROWS):
        last = min(first + _ROWS, outputs)
        weight = linear.matrix(mx.float32).take(slice(start + first, start + last), mx.float32)
        norms.append(mx.linalg.norm(weight + part.rows(first, last), axis=-1))
        mx.eval(norms)
    return part.magnitude / mx.concatenate(norms)


@dataclass(frozen=True)
class _AdaptedMatrix(Matrix):
    """The matrices [E, out, in] of experts, with a delta each."""

    delta: Factors | None = None

    def apply_gathered(self, rows: mx.array, experts: mx.array) -> mx.array:
        y = super().apply_gathered(rows, experts)
        if self.delta is None:
            return y
        a, b = self.delta.a, self.delta.b
        inner = mx.gather_mm(rows.astype(a.dtype), a, rhs_indices=experts, sorted_indices=True)
        inner = (inner.astype(mx.float32) * self.delta.scale).astype(b.dtype)
        delta = mx.gather_mm(inner, b, rhs_indices=experts, sorted_indices=True)
        return y + delta.astype(y.dtype)


class LowRankExperts(nn.Module):
    """Experts with deltas of "gate_up_proj", of "down_proj" or of both."""

    def __init__(self, experts: Experts, deltas: Mapping[str, Factors]) -> None:
        super().__init__()
        self.experts = experts
        self.lora_scale = {name: mx.array(delta.scale) for name, delta in deltas.items()}
        self.lora_a = {name: delta.a for name, delta in deltas.items()}
        self.lora_b = {name: delta.b for name, delta in deltas.items()}
        mx.eval(self.lora_a, self.lora_b, self.lora_scale)

    def __call__(self, x: mx.array, routing: Routing) -> mx.array:
        """x [T, H] -> [T, H] in the same dtype, in plain MLX operations."""
        gate_up, down = self._adapted("gate_up_proj", x), self._adapted("down_proj", x)
        return combine(expert_rows(x, routing, gate_up, down), routing)

    def _adapted(self, name: str, x: mx.array) -> Matrix:
        matrix: Matrix = self.experts[name].matrix(x.dtype)
        if name not in self.lora_scale:
            return matrix
        held = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
        delta = Factors(self.lora_a[name], self.lora_b[name], self.lora_scale[name])
        return _AdaptedMatrix(**held, delta=delta)


def attach(model: Model, encoder: Mapping[str, Factors], decoder: Mapping[str, Factors]) -> None:
    """Puts deltas beside the weights of a filled model, joined or not.

    encoder, decoder: the passes' deltas by module, under the decoder's name where both passes
    share the weight. The same object on both sides is one delta for both passes.
    """
    shapes = matrices(model.local)
    shared = {name for name in {*encoder, *decoder} if name.startswith(LAYERS)}
    if any(encoder.get(name) is not decoder.get(name) for name in shared):
        model.encoder_pass.layers = [_view(layer) for layer in model.layers]
    # Where both passes run the same layers, these get their deltas once.
    for layers, deltas in ((model.layers, decoder), (model.encoder_pass.layers, encoder)):
        for index, layer in enumerate(layers or ()):
            prefix = f"{LAYERS}{index}."
            own = {n.removeprefix(prefix): d for n, d in deltas.items() if n.startswith(prefix)}
            own_shapes = {
                n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)
            }
            _attach_within(layer, own, own_shapes)
    alone = {**encoder, **decoder}
    _attach_within(model, {n: d for n, d in alone.items() if n not in shared}, shapes)


def _view(layer: Layer) -> Layer:
    """A layer of the same weights, whose linear maps can be replaced one by one."""
    view = copy.copy(layer)
    for name in ("self_attn", "mlp", "router"):
        view[name] = copy.copy(layer[name])
    return view


def _attach_within(
    root: nn.Module, deltas: Mapping[str, Factors], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Puts each delta beside its module, by the module's path within `root`."""
    experts = {name: delta for name, delta in deltas.items() if name.startswith("experts.")}
    if experts:
        named = {name.removeprefix("experts."): delta for name, delta in experts.items()}
        root.experts = LowRankExperts(root.experts, named)
    parts: dict[tuple[str, str], list[tuple[int, Factors]]] = {}
    for path, delta in deltas.items():
        if path in experts:
            continue
        parent, _, name = path.rpartition(".")
        module = _module(root, parent)
        place = 0
        for joined, members in _JOINED.items():
            if name in members and joined in module:
                before = [f"{parent}.{n}" for n in members[: members.index(name)]]
                place = sum(shapes[other][0] for other in before if other in shapes)
                name = joined
        parts.setdefault((parent, name), []).append((place, delta))
    for (parent, name), some in parts.items():
        module = _module(root, parent)
        module[name] = LowRank(module[name], some)


def _module(root: nn.Module, path: str) -> nn.Module:
    for step in path.split("."):
        root = root[int(step)] if isinstance(root, list) else root[step]
    return root
