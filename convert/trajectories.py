"""States of real denoising trajectories: what a decoder pass was given at a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.adapters import Adapter
from mlx_dgemma.model.network import Model


@dataclass(frozen=True)
class State:
    """One denoising step's input. converged: the canvas is a draft that the stop test took."""

    context: tuple[int, ...]
    canvas: np.ndarray
    signal: np.ndarray | None
    temperature: float
    converged: bool


class _Recorder:
    """A model that notes what every decoder pass was given."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.passes: list[tuple[np.ndarray, np.ndarray | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden(
        self,
        canvas: mx.array,
        cache: Any,
        soft_embeddings: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        signal = None
        if soft_embeddings is not None:
            signal = np.array(soft_embeddings[0].astype(mx.float32))
        self.passes.append((np.array(canvas[0]), signal))
        return self._model.hidden(canvas, cache, soft_embeddings, **options)


def record(
    folder: Path, prompts: Sequence[Any], seed: int, kept: int, adapter: Adapter | None = None
) -> list[State]:
    """States of the first block of every prompt: `kept` steps spread over it, and its draft."""
    from mlx_dgemma.checkpoint.weights import load_model
    from mlx_dgemma.decoding.canvas import CanvasRequest
    from mlx_dgemma.decoding.denoise import denoise_block
    from mlx_dgemma.decoding.draws import SeededDraws
    from mlx_dgemma.decoding.settings import DecodingSettings
    from mlx_dgemma.decoding.temperature import temperature
    from mlx_dgemma.generate import encode_prompt
    from mlx_dgemma.prompt.tokenizer import load_tokenizer

    model = load_model(folder, adapter_path=adapter.folder if adapter else None)
    settings = DecodingSettings.from_defaults(model.config.generation, {})
    states = []
    for number, prompt in enumerate(prompts):
        if all(isinstance(token, int) for token in prompt):
            ids = tuple(prompt)
        else:
            tokenizer = load_tokenizer(folder, model.config.stop_ids)
            ids = tuple(int(token) for token in encode_prompt(tokenizer, prompt))
        cache = model.make_cache()
        model.prefill(ids, cache)
        recorder = _Recorder(model)
        steps = denoise_block(
            recorder,  # type: ignore[arg-type]
            cache,
            settings,
            [CanvasRequest(SeededDraws(seed + number))],
        )
        taken = 0
        try:
            while True:
                next(steps)
                taken += 1
        except StopIteration as stop:
            result = stop.value[0]
        total = settings.max_denoising_steps
        for step in sorted({round(x) for x in np.linspace(0, taken - 1, kept)}):
            canvas, signal = recorder.passes[step]
            now = temperature(total - step, total, settings.t_min, settings.t_max)
            states.append(State(ids, canvas, signal, now, converged=False))
        if result.converged:
            now = temperature(total - taken + 1, total, settings.t_min, settings.t_max)
            draft = np.array(result.ids, dtype=np.int32)
            states.append(State(ids, draft, recorder.passes[-1][1], now, converged=True))
    return states
