"""A model of random weights in memory, for timing where no checkpoint is at hand.

The values have the size that keeps activations near one, and nothing more: what such a model says
is noise, so it measures time and memory and never quality.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint.agreement import facts, next_number, number_model, settle_choices
from mlx_dgemma.checkpoint.parts import cut, drop_absent
from mlx_dgemma.checkpoint.plan import check_fits, current_share, plan
from mlx_dgemma.checkpoint.sizes import weight_bytes
from mlx_dgemma.checkpoint.weights import fill, settle
from mlx_dgemma.distributed.team import Leader, Team
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.kernel_shapes import kernel_shapes
from mlx_dgemma.model.packing import Quantization, quantization_of
from mlx_dgemma.model.parameters import parameter_shapes
from mlx_dgemma.model.share import Share

# Rows of a large random matrix that are drawn; the others repeat them in memory of their own.
_DRAWN_ROWS = 16384
_DRAWN_EXPERTS = 8


def synthetic_model(raw: Mapping[str, Any], *, seed: int = 0, team: Team | None = None) -> Model:
    """A model of these shapes in memory, prepared as a loaded checkpoint is.

    team: the processes that hold it together, each of which calls this for its part.
    """
    config = ModelConfig.from_dict(dict(raw))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = mx.float32 if on_cpu else getattr(mx, config.text.dtype)
    model = Model(config, dtype, team)
    tensors = random_tensors(config, seed=seed)
    if model.share is not None:
        tensors = _own(tensors, model.share, config)
    parameters = dict(tensors)
    if model.share is not None:
        drop_absent(model, parameters)
    fill(model, parameters)
    settle(model)
    return model


def lead_synthetic(team: Leader, raw: Mapping[str, Any]) -> Model:
    """Rank 0's of a synthetic model that all ranks hold together."""
    answers = team.ask("synthetic", raw=dict(raw))
    chosen = settle_choices(team, synthetic_facts(Share(0, team.size), raw), answers)
    number = next_number()
    team.tell("draw", number=number, raw=dict(raw), kernels=chosen, unequal=team.unequal)
    model = synthetic_model(raw, team=team)
    number_model(team, model, number)
    team.ask("loaded")
    return model


def synthetic_facts(share: Share, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the ranks compare before they draw weights; the kernels' checks come first."""
    shapes = kernel_shapes(share.config(ModelConfig.from_dict(dict(raw))))
    dispatch.prepare(shapes)
    drawn_from = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return facts(drawn_from, shapes)


def check_synthetic(
    config: ModelConfig, context_tokens: int, *, name: str, kv_bits: int | None = None
) -> None:
    """InputError where the processes cannot share a model of these shapes; ResourceError where this
    machine has no room for its part of it."""
    share = current_share()
    if share is not None:
        share.check(config)
    wanted = plan(
        config if share is None else share.config(config),
        context_tokens=context_tokens,
        weights=weight_bytes(config, share=share),
        kv_bits=kv_bits,
    )
    check_fits(wanted, machine(), name=name)


def _own(
    tensors: Iterator[tuple[str, mx.array]], share: Share, config: ModelConfig
) -> Iterator[tuple[str, mx.array]]:
    """A rank's parts, computed one by one: no process holds the whole."""
    for name, whole in tensors:
        if share.holds(name):
            part = share.part(config, name)
            held = whole if part is None else cut(whole, part)
            mx.eval(held)
            yield name, held


def random_tensors(config: ModelConfig, *, seed: int = 0) -> Iterator[tuple[str, mx.array]]:
    """Name and value of every tensor of the MLX layout, packed as the config says."""
    key = mx.random.key(seed)
    table = parameter_shapes(config)
    for name, (shape, dtype) in table.items():
        module, _, suffix = name.rpartition(".")
        if suffix in ("scales", "biases") and f"{module}.scales" in table:
            continue  # made with the weight
        key, own = mx.random.split(key)
        if f"{module}.scales" not in table:
            yield name, _random(name, shape, own).astype(getattr(mx, dtype))
            continue
        packing = quantization_of(config.quantization, module)
        assert packing is not None
        dense = (*shape[:-1], shape[-1] * 32 // packing.bits)
        parts = _packed(name, dense, own, getattr(mx, config.text.dtype), packing)
        for part, tensor in zip(("weight", "scales", "biases"), parts, strict=False):
            yield f"{module}.{part}", tensor


def _packed(
    name: str, shape: tuple[int, ...], key: mx.array, dtype: mx.Dtype, packing: Quantization
) -> tuple[mx.array, ...]:
    dense = _random(name, _drawn(shape), key).astype(dtype)
    parts = mx.quantize(dense, packing.group_size, packing.bits, mode=packing.mode)
    return tuple(_repeated(part, shape[0]) for part in parts)


def _random(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    if len(shape) < 2:
        return mx.random.uniform(0.9, 1.1, shape, key=key)
    spread = 1.0 if "router" in name else shape[-1] ** -0.5
    drawn = _drawn(shape) if prod(shape) > _DRAWN_ROWS * shape[-1] else shape
    return _repeated(mx.random.normal(drawn, key=key) * spread, shape[0])


def _drawn(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a matrix or a stack of them: the shape of the part that is drawn."""
    return (min(shape[0], _DRAWN_EXPERTS if len(shape) == 3 else _DRAWN_ROWS), *shape[1:])


def _repeated(part: mx.array, count: int) -> mx.array:
    times = -(-count // part.shape[0])
    return part if times == 1 else mx.concatenate([part] * times, axis=0)[:count]
