"""A network run one layer at a time over many states, so that any size fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_dgemma.checkpoint.weights import fill
from mlx_dgemma.convert.plan import Plan
from mlx_dgemma.convert.source import Tensor, slices
from mlx_dgemma.convert.stream import DTYPES
from mlx_dgemma.convert.trajectories import State
from mlx_dgemma.model.backbone import Layer
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.layer_context import LayerContext
from mlx_dgemma.model.network import Model


class Streamed:
    """A network whose layers are read, quantized as a plan says, used and dropped in turn."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, Tensor],
        plan: Plan | None,
        dtype: str,
    ) -> None:
        self._config = config
        self._parameters = parameters
        self._dtype = DTYPES[dtype]
        self._precision = {step.name: step.precision for step in plan.steps} if plan else {}
        self._model = Model(replace(config, quantization=None), self._dtype)
        self._load("model.decoder.embed_tokens.")

    def _load(self, *prefixes: str) -> None:
        fill(
            self._model,
            {name: self._tensor(name) for name in self._parameters if name.startswith(prefixes)},
        )

    def _tensor(self, name: str) -> mx.array:
        """The parameter as the recipe would leave it, dense."""
        tensor, precision = self._parameters[name], self._precision.get(name)
        if not tensor.shape:
            return tensor.rows(0, 1).astype(self._dtype)
        parts = []
        for start, stop in slices(tensor.shape):
            rows = tensor.rows(start, stop).astype(self._dtype)
            if precision is not None:
                size, bits, mode = precision.group_size, precision.bits, precision.mode
                packed = mx.quantize(rows, size, bits, mode)
                rows = mx.dequantize(
                    *packed, group_size=size, bits=bits, mode=mode, dtype=self._dtype
                )
            mx.eval(rows)
            parts.append(rows)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def hidden(self, states: Sequence[State], on_layer: Callable[[], None]) -> list[mx.array]:
        """[C, H] after the final norm for every state."""
        model, text = self._model, self._config.text
        decoder, scalars = model.model.decoder, model.model.encoder.language_model.layers
        contexts = sorted({state.context for state in states})
        encoded = {ids: model.embedded(mx.array([ids])) for ids in contexts}
        self._load("model.decoder.self_conditioning.", "model.decoder.norm.")
        decoded = []
        for state in states:
            canvas = model.embedded(mx.array(state.canvas[None]))
            signal = None if state.signal is None else mx.array(state.signal[None])
            signal = None if signal is None else signal.astype(self._dtype)
            decoded.append(decoder.self_conditioning.condition(canvas, signal))
        mx.eval(decoded, list(encoded.values()))
        for index in range(text.num_hidden_layers):
            self._load(
                f"model.decoder.layers.{index}.",
                f"model.encoder.language_model.layers.{index}.",
            )
            layer = decoder.layers[index]
            kept = {}
            for ids in contexts:
                kept[ids] = LayerContext(text.window_of(index), self._config.canvas_length)
                rope = model.rope.span(0, len(ids))[layer.kind]
                scalar = scalars[index].layer_scalar
                encoded[ids] = layer.encode(encoded[ids], rope, kept[ids], None, scalar)
                mx.eval(encoded[ids])
            for number, state in enumerate(states):
                rope = model.rope.span(len(state.context), len(state.canvas))[layer.kind]
                decoded[number] = layer.decode(decoded[number], rope, kept[state.context])
                mx.eval(decoded[number])
            decoder.layers[index] = Layer(text, index, model.dtype)  # lets go of the weights
            mx.clear_cache()
            on_layer()
        return [decoder.norm(x)[0] for x in decoded]

    def logits(self, hidden: mx.array) -> mx.array:
        """float32 [rows, V] after the softcap."""
        return self._model.softcap(self._model.raw_logits(hidden[None]))[0]
