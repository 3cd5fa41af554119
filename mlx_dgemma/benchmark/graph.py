"""What one denoising step asks of the device, counted from the graph that MLX builds for it.

A launch is a primitive that computes; views (reshape, transpose, slice, ...) cost none, and MLX's
own RMSNorm, softmax and logsumexp count one each, as on Metal. MLX may copy or join a little
differently when it runs, so these are counts of the program, the same on every machine. They do
not depend on widths: a model of the same depth, vocabulary and experts but narrow layers is
counted, and nothing is computed.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma import kernels
from mlx_dgemma.checkpoint.weights import fill
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.denoise import step
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels import dispatch, registry, verdicts
from mlx_dgemma.kernels.table import operations
from mlx_dgemma.model import ContextCache, Model
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.kernel_shapes import kernel_shapes
from mlx_dgemma.model.parameters import parameter_shapes

_VIEWS = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Contiguous",  # of tables that are so already
    "Depends",
    "ExpandDims",
    "Flatten",
    "NumberOfElements",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
}
_LABEL = re.compile(r'label ="([^"]*)"')
_TEMPERATURE = 0.6
_CONTEXT = 64


def launches(outputs: Sequence[mx.array]) -> Counter[str]:
    """Primitive -> how often it occurs in what must still be computed for `outputs`."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    names = (name.split(" ")[0] for name in _LABEL.findall(text.getvalue()))
    found: Counter[str] = Counter()
    for name in names:
        if name not in _VIEWS:
            found["Compiled" if name.startswith("Compiled") else name] += 1
    return found


def count_step(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Way of computing a step -> {"launches": n, "by_primitive": {...}}; one canvas, mid-block.

    "written out": the contract `model.denoise` and the sampler's rules, with nothing joined.
    "twins": joined matrices and the fused operations in plain MLX.
    "kernels": the same with every fused operation as its Metal kernels.
    "here": with those that would run on this machine, by what is remembered of their checks.
    """
    model = _hollow(thin(config))
    found = {"written out": _count(_written_out, model)}
    model.prepare()
    found["twins"] = _count(_step, model)
    found["kernels"] = _count(_step, model, known=operations())
    found["here"] = _count(_step, model, known=enabled_here(config))
    return {
        way: {"launches": counter.total(), "by_primitive": dict(counter.most_common())}
        for way, counter in found.items()
    }


def enabled_here(config: ModelConfig) -> set[str]:
    """The operations whose kernels run here at every shape that a canvas of this config needs."""
    names = {name for name, one in operations().items() if one.kernels}  # no step sees a picture
    if not dispatch.available() or dispatch.mode() == "off":
        return set()
    if dispatch.mode() == "auto":
        known = verdicts.remembered()
        for operation, shape in kernel_shapes(config):
            key = verdicts.verdict_key(operation, dispatch.shape_class(shape))
            rows = [shape[name] for name in dispatch.ROW_CLASSES if name in shape]
            if rows == [config.canvas_length] and not (key in known and known[key].enabled):
                names.discard(operation.name)
    return names


def thin(config: ModelConfig) -> ModelConfig:
    """The same depth, experts, vocabulary and packing in layers 64 wide."""
    text = replace(
        config.text,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_global_key_value_heads=1,
        global_head_dim=64,
    )
    return replace(config, text=text, vision=None)


def _hollow(config: ModelConfig) -> Model:
    """A model of zeros."""
    model = Model(config, getattr(mx, config.text.dtype))
    fill(
        model,
        {
            name: mx.zeros(shape, getattr(mx, dtype))
            for name, (shape, dtype) in parameter_shapes(config).items()
        },
    )
    mx.eval(model.parameters())
    return model


def _context(model: Model) -> ContextCache:
    cache, text = model.make_cache(), model.config.text
    for index, layer in enumerate(cache.layers):
        shape = (1, text.kv_heads_of(index), _CONTEXT, text.head_dim_of(index))
        layer.reset(0, (mx.zeros(shape, model.dtype), mx.zeros(shape, model.dtype)))
    mx.eval(cache.arrays)
    return cache


_Build = Callable[[Model, ContextCache], list[mx.array]]


def _count(build: _Build, model: Model, known: Collection[str] = ()) -> Counter[str]:
    """known: the operations that run as kernels."""
    tally: Counter[str] = Counter()
    cache = _context(model)
    with ExitStack() as stack:
        for module, name in ((mx.fast, "rms_norm"), (mx, "softmax"), (mx, "logsumexp")):
            stack.enter_context(_swapped(module, name, _one(tally, name, getattr(module, name))))
        stack.enter_context(_swapped(dispatch, "use", partial(_supported, known)))
        stack.enter_context(_swapped(registry, "launch", _launch(tally)))
        outputs = build(model, cache)
    return tally + launches(outputs)


def _supported(
    known: Collection[str], operation: registry.Operation, *sizes: registry.Size
) -> bool:
    return operation.name in known and operation.supports(operation.shape(*sizes))


def _one(tally: Counter[str], name: str, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(x: mx.array, *arguments: Any, **keywords: Any) -> mx.array:
        tally[name] += 1
        shape = real(mx.zeros(x.shape, x.dtype), *arguments, **keywords).shape
        return _placeholder([(shape, x.dtype)], [x])[0]

    return call


def _launch(tally: Counter[str]) -> Callable[..., list[mx.array]]:
    def call(
        kernel: registry.Kernel,
        inputs: Sequence[mx.array],
        *,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
        **_: Any,
    ) -> list[mx.array]:
        tally[f"Metal: {kernel.name}"] += 1
        return _placeholder(outputs, inputs)

    return call


def _placeholder(
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]], inputs: Sequence[mx.array]
) -> list[mx.array]:
    """Arrays that need `inputs` computed and nothing else."""
    empty = [mx.zeros(shape, dtype) for shape, dtype in outputs]
    mx.eval(empty)
    later: list[mx.array] = mx.depends(empty, list(inputs))
    return later


@contextmanager
def _swapped(module: Any, name: str, new: Any) -> Iterator[None]:
    real = getattr(module, name)
    setattr(module, name, new)
    try:
        yield
    finally:
        setattr(module, name, real)


def _written_out(model: Model, cache: ContextCache) -> list[mx.array]:
    """A step as the reference writes it: arrays as long as the vocabulary, one after another."""
    length, vocabulary = model.config.canvas_length, model.config.text.vocab_size
    canvas = mx.zeros((1, length), mx.int32)
    before = mx.zeros((1, length, vocabulary), model.dtype)
    mx.eval(canvas, before)
    tempered = model.denoise(canvas, cache, before) / _TEMPERATURE
    draft = tempered.argmax(axis=-1)
    sample = mx.random.categorical(tempered, key=mx.random.key(0))
    log_p = tempered - mx.logsumexp(tempered, axis=-1, keepdims=True)
    entropy = -(mx.exp(log_p) * log_p).sum(axis=-1)
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    within = mx.cumsum(ascending, axis=-1) - ascending <= 0.1
    accepted = mx.put_along_axis(mx.zeros_like(within), order, within, axis=-1)
    fresh = mx.random.randint(0, vocabulary, canvas.shape, key=mx.random.key(1))
    renoised = mx.where(accepted, sample, fresh)
    return [renoised, (draft == canvas).all(), entropy.mean(), tempered.astype(model.dtype)]


def _step(model: Model, cache: ContextCache) -> list[mx.array]:
    """The loop's step, with the sum over survivors that gives it its signal."""
    config = model.config
    length, rows = config.canvas_length, (config.canvas_length, kernels.CAPACITY)
    request, steps = CanvasRequest(SeededDraws(0)), DecodingSettings.max_denoising_steps
    vocabulary = config.text.vocab_size
    state = CanvasState.initial([request], Place(0, 0, 0), length, vocabulary, steps)
    state.canvas = state.draft = mx.zeros((1, length), mx.int32)
    counts, dropped = mx.full((length,), 64, mx.int32), mx.zeros((length,))
    survivors = kernels.Survivors(mx.zeros(rows, mx.int32), mx.zeros(rows), counts, dropped)
    mx.eval(state.canvas, state.revealed, survivors)
    state.signal = kernels.gather_soft_embeddings(
        survivors, model.embedding_matrix, np.array(counts), scale=model.embed_scale
    )[None]
    settings = DecodingSettings(conditioning="sparse")
    outcome = step(model, cache, settings, state, dispatch=False)
    assert outcome.survivors is not None
    few = outcome.survivors
    return [outcome.decision.canvas, outcome.report.packed, few.ids, few.weights]
