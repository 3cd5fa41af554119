"""What a constraint costs the host: a step at the published size, and compiling real schemas."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_dgemma.model.shared_head import best_of_groups

_BESIDE = Path(__file__).parents[2] / "shared/assets/checkpoint-4bit"
CHECKPOINT = Path(os.environ.get("CHECKPOINT", _BESIDE))  # the published one's tokenizer
VOCABULARY, CANVAS, STOPS = 262_144, 256, (1, 106, 50)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "tags"],
}
# Models of two clients, as pydantic writes their schemas.
MODELS = {
    "openai.types.chat": "ChatCompletion ChatCompletionChunk ChatCompletionMessage "
    "ChatCompletionTokenLogprob ChatCompletionMessageFunctionToolCall ChatCompletionDeleted",
    "openai.types": "Batch Completion CreateEmbeddingResponse FileObject Image ImagesResponse "
    "Model ModelDeleted ModerationCreateResponse Upload VectorStore CompletionUsage",
    "openai.types.responses": "ResponseUsage ResponseOutputMessage ResponseFunctionToolCall "
    "ResponseReasoningItem ResponseError ResponseOutputText",
    "anthropic.types": "Message TextBlock ToolUseBlock Usage ThinkingBlock MessageTokensCount",
}


LANGUAGES: dict[str, Callable[[], Any]] = {
    "schema": lambda: _constraint().json_schema(SCHEMA),
    "json_object": lambda: _constraint().json_object(),
    "ChatCompletion": lambda: _constraint().json_schema(_schema("openai.types.chat")),
    "regex": lambda: _constraint().regex(r"[A-Z][a-z]+( [a-z]+){3,40}\."),
    "choice": lambda: _constraint().choice([f"answer {n} of the list" for n in range(200)]),
}


def host(steps: int = 6) -> dict[str, dict[str, Any]]:
    """By language: CPU milliseconds of the host for a step of random logits (the first step, the
    median and the least of the others), and the most memory that it held."""
    from mlx_dgemma.constraints.constraint import vocabulary
    from mlx_dgemma.decoding.canvas_constraint import CanvasConstraint
    from mlx_dgemma.decoding.constrained import constrain
    from mlx_dgemma.prompt import load_tokenizer

    tokenizer = load_tokenizer(CHECKPOINT, STOPS)
    shared = vocabulary(tokenizer, VOCABULARY)
    kept = sum(value.nbytes for value in vars(shared).values() if isinstance(value, np.ndarray))
    languages = {name: make().language(tokenizer, VOCABULARY) for name, make in LANGUAGES.items()}
    spent: dict[str, list[float]] = {name: [] for name in languages}
    peak = dict.fromkeys(languages, 0)
    for step in range(steps + 1):
        seen, device = _random(step)
        uniforms = mx.random.uniform(shape=(1, CANVAS, 2), key=mx.random.key(step))
        mx.eval(uniforms)
        for name, language in languages.items():
            held = CanvasConstraint(language, language.automaton.start, CANVAS, more=False)
            request = SimpleNamespace(constraint=held, spans=(), held=True)
            state: Any = SimpleNamespace(requests=[request], pins=None)
            if step == steps:
                tracemalloc.start()
            device.seconds, cpu = 0.0, time.process_time()
            constrain(seen, state, uniforms, 1.0)
            spent[name].append(1000 * (time.process_time() - cpu - device.seconds))
            if step == steps:
                peak[name] = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
    return {
        name: {
            "first": round(each[0]),
            "median": round(float(np.median(each[1:steps]))),
            "least": round(min(each[1:steps])),
            "MB of tables": round((languages[name].automaton.nbytes + kept) / 1e6, 1),
            "MB of a step": round(peak[name] / 1e6, 1),
        }
        for name, each in spent.items()
    }


def _constraint() -> Any:
    from mlx_dgemma.constraints import Constraint

    return Constraint


def _schema(module: str) -> Any:
    return import_module(module).ChatCompletion.model_json_schema()


class _Device:
    """Raw logits, and the CPU seconds that a device would spend on them instead."""

    def __init__(self, raw: mx.array) -> None:
        self._raw, self.seconds = raw, 0.0
        self._found = best_of_groups(raw, 0)
        mx.eval(*self._found)

    def candidates(self, rows: slice) -> tuple[mx.array, mx.array]:
        return self._found

    def columns(self, rows: slice, ids: mx.array) -> mx.array:
        started = time.process_time()
        found = self._raw[:, ids]
        mx.eval(found)
        self.seconds += time.process_time() - started
        return found


def _random(seed: int) -> tuple[Any, _Device]:
    """A canvas of normal logits, standard deviation 3, at the middle temperature."""
    from mlx_dgemma.decoding.predicted import Prediction

    raw = 3 * mx.random.normal((CANVAS, VOCABULARY), key=mx.random.key(seed))
    model: Any = SimpleNamespace(softcap=lambda values: 30 * mx.tanh(values / 30))
    tempered = model.softcap(raw) / 0.6
    log_z = mx.logsumexp(tempered, axis=1)
    log_p = tempered - log_z[:, None]
    entropy = -(mx.exp(log_p) * log_p).sum(axis=1)
    best = tempered.argmax(axis=1).astype(mx.int32)
    mx.eval(log_z, entropy, best)
    device = _Device(raw)
    nothing: Any = None
    seen = Prediction(
        model=model, hidden=raw, subset=None, free=np.arange(CANVAS), pins=None,
        logits=cast(Any, device), stats=cast(Any, SimpleNamespace(log_z=log_z)), temperature=0.6,
        draft=best[None], sample=best[None], entropy=entropy[None], settings=nothing,
        banned=np.zeros(0),
    )  # fmt: skip
    return seen, device


def compilation() -> dict[str, Any]:
    """Seconds per schema, the vocabulary loaded before."""
    from mlx_dgemma.constraints import Constraint
    from mlx_dgemma.constraints.constraint import vocabulary
    from mlx_dgemma.prompt import load_tokenizer

    tokenizer = load_tokenizer(CHECKPOINT, STOPS)
    vocabulary(tokenizer, VOCABULARY)
    seconds = {}
    for module, names in MODELS.items():
        for name in names.split():
            schema = getattr(import_module(module), name).model_json_schema()
            started = time.process_time()
            Constraint.json_schema(schema).language(tokenizer, VOCABULARY)
            seconds[name] = time.process_time() - started
    worst = max(seconds, key=lambda name: seconds[name])
    return {
        "schemas": len(seconds),
        "median ms": round(1000 * float(np.median([*seconds.values()])), 1),
        "worst ms": round(1000 * seconds[worst], 1),
        "worst": worst,
    }
