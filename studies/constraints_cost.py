"""What a constraint costs the host: a step at the published size, and compiling real schemas."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

CHECKPOINT = Path(__file__).parents[2] / "shared/assets/checkpoint-4bit"
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


def host(steps: int = 5) -> dict[str, Any]:
    """Milliseconds per step of random logits, the automaton's bytes."""
    from mlx_dgemma.constraints import Constraint
    from mlx_dgemma.constraints.constraint import vocabulary
    from mlx_dgemma.decoding.conditioning import condition
    from mlx_dgemma.prompt import load_tokenizer

    tokenizer = load_tokenizer(CHECKPOINT, STOPS)
    shared = vocabulary(tokenizer, VOCABULARY)
    automaton = Constraint.json_schema(SCHEMA).language(tokenizer, VOCABULARY).automaton
    rng = np.random.default_rng(0)
    wall, own = [], []
    for _ in range(steps):
        seen = _random(rng)
        started, cpu = time.perf_counter(), time.process_time()
        condition(
            automaton, seen, start=automaton.start, uniforms=rng.random(CANVAS), ends_by=CANVAS
        )
        wall.append(1000 * (time.perf_counter() - started))
        own.append(1000 * (time.process_time() - cpu))
    bytes_ = automaton.nbytes + shared.symbols.nbytes + shared.offsets.nbytes
    return {"wall ms": [round(x) for x in wall], "cpu ms": [round(x) for x in own],
            "MB": round(bytes_ / 1e6, 1), "states": len(automaton)}  # fmt: skip


def _random(rng: np.random.Generator) -> Any:
    """A canvas of normal logits, standard deviation 3, at the middle temperature."""
    from mlx_dgemma.decoding.candidates import Distributions

    raw = rng.normal(0, 3, (CANVAS, VOCABULARY)).astype(np.float32)
    raw = 30 * np.tanh(raw / 30) / 0.6
    p = np.exp(raw - raw.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=1)
    ids = np.argpartition(-p, 64, axis=1)[:, :64]
    best = np.take_along_axis(p, ids, 1).astype(float)
    best[best < 1e-4] = 0
    top = p.argmax(axis=1)
    return Distributions(
        ids, best, lambda some: p[:, some].astype(float), entropy, top, top, whole=False
    )


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
