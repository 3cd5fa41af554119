"""Would float16 hold it: the largest magnitude of every kind of tensor on a run of a checkpoint.

The run computes in the checkpoint's own precision, with the twins, so that every product is seen.
In float16 the residual stream stays in float32, and the branches' products may have a unit (see
model.float16); nothing else is scaled, so whatever else comes near 65,504 speaks against float16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_dgemma import kernels
from mlx_dgemma.checkpoint.audits import Audit
from mlx_dgemma.checkpoint.weights import cast, expand, load_model
from mlx_dgemma.generate import stream_generate
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.model import Model, attention, layers, vision
from mlx_dgemma.model.float16 import can_use_units
from mlx_dgemma.model.names import named_tensors
from mlx_dgemma.prompt import Tokenizer, load_tokenizer

RESIDUAL = "residual"
BRANCHES = ("layers.mlp.down_proj", "layers.experts.down_proj")
TOKENS = 256  # of a reply, at most
# Prose, arithmetic, code, other scripts, tables, repetition: what activations differ by.
PROMPTS = (
    "Why is the sky blue? Answer in three paragraphs.",
    "What is 48,317 times 926? Show every step.",
    "Write a Python class for a binary heap, with tests.",
    "Traduis en français, puis en japonais : The harbour was quiet before the storm.",
    "列出五个城市的人口，并用表格比较。",
    "Summarise as JSON with the keys name, year and reason: Ada Lovelace wrote notes in 1843.",
    "0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1",
    "{}[]()<>|\\/~`!@#$%^&*_+-=;:'\",.?\n\t\n",
)


class Watch:
    """Kind of tensor -> its largest magnitude so far."""

    def __init__(self, model: Model) -> None:
        self.largest: dict[str, mx.array] = {}
        self.kinds = {
            id(module.weight): ".".join(part for part in name.split(".")[2:] if not part.isdigit())
            for name, module in model.named_modules()
            if isinstance(module, layers.Weights)
        }

    def see(self, kind: str, values: mx.array) -> None:
        found = mx.abs(values.astype(mx.float32)).max()
        known = self.largest.get(kind)
        self.largest[kind] = found if known is None else mx.maximum(known, found)

    def product(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(module: Any, x: mx.array, *more: Any) -> mx.array:
            kind = self.kinds.get(id(module.weight), "other")
            self.see(f"{kind} input", x)
            y = real(module, x, *more)
            self.see(f"{kind} output", y)
            return y

        return call

    def attended(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: mx.array, *others: Any) -> Any:
            self.see(RESIDUAL, x)
            read = real(x, *others)
            self.see(RESIDUAL, read.residual)
            return read

        return call

    def left(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*given: Any) -> mx.array:
            y = real(*given)
            self.see(RESIDUAL, y)
            return y

        return call

    def scores(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(queries: mx.array, segments: Any, mask: Any = None) -> mx.array:
            for keys, values in segments:
                grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])
                self.see("attention scores", grouped @ keys.swapaxes(-1, -2))
                self.see("attention values", values)
            return real(queries, segments, mask)

        return call

    def tower(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*given: Any) -> mx.array:
            y = real(*given)
            self.see("vision residual", y)
            return y

        return call

    def evaluate(self) -> None:
        mx.eval(self.largest)


@contextmanager
def watched(model: Model) -> Iterator[Watch]:
    """Everything that runs inside is seen."""
    watch = Watch(model)
    places = (
        (layers.Linear, "__call__", watch.product),
        (layers.PackedLinear, "__call__", watch.product),
        (kernels.Matrix, "apply_gathered", watch.product),
        (kernels, "after_attention", watch.attended),
        (kernels, "after_branches", watch.left),
        (attention, "attend", watch.scores),
        (vision, "attend", watch.scores),
        (vision.VisionLayer, "__call__", watch.tower),
    )
    real = [getattr(owner, name) for owner, name, _ in places]
    try:
        for (owner, name, wrap), function in zip(places, real, strict=True):
            setattr(owner, name, wrap(function))
        yield watch
    finally:
        for (owner, name, _), function in zip(places, real, strict=True):
            setattr(owner, name, function)


def audit(folder: Path, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS) -> Audit:
    """Replies to the prompts, and to a picture where the model sees, watched.

    Raises what loading and generating raise.
    """
    model = load_model(folder, lazy=True)  # unjoined, so that every matrix is seen by its name
    if mx.default_device() == mx.Device(mx.cpu):
        expand(model)
        cast(model)
    mx.eval(model.model.decoder.parameters())
    tokenizer = load_tokenizer(folder, model.config.stop_ids)
    with dispatch.twins_only(), watched(model) as watch:
        for number, prompt in enumerate(prompts):
            pictures = [picture()] if number == 0 and model.config.vision is not None else []
            _reply(model, tokenizer, prompt, pictures, number, tokens, watch)
    found = {kind: _finite(value.item()) for kind, value in watch.largest.items()}
    branches = {kind: value for kind, value in found.items() if kind.startswith(BRANCHES)}
    others = {kind: value for kind, value in found.items() if kind not in {*branches, RESIDUAL}}
    where = max(others, key=others.__getitem__)
    return Audit(
        others[where],
        where,
        max(branches.values()),
        stored_loss(model),
        can_use_units(model),
        len(prompts),
        time.time(),
    )


def _reply(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    pictures: list[Image.Image],
    seed: int,
    tokens: int,
    watch: Watch,
) -> None:
    replies = stream_generate(
        model, tokenizer, prompt, images=pictures or None, seed=seed, max_tokens=tokens, drafts=True
    )
    for _ in replies:
        watch.evaluate()


def stored_loss(model: Model) -> float:
    """The largest relative error, by norm, of a float tensor of the text model in float16."""
    worst = 0.0
    for tensor in named_tensors(model.model.decoder.parameters()).values():
        if not mx.issubdtype(tensor.dtype, mx.floating) or not tensor.size:
            continue
        wide = tensor.astype(mx.float32)
        lost = mx.square(tensor.astype(mx.float16).astype(mx.float32) - wide).sum()
        whole = mx.square(wide).sum()
        if whole.item():
            worst = max(worst, _finite(mx.sqrt(lost / whole).item()))
    return worst


def _finite(value: Any) -> float:
    """What is no number counts as the largest there is."""
    most = float(np.finfo(np.float32).max)
    return float(np.nan_to_num(value, nan=most, posinf=most))


def picture() -> Image.Image:
    """Colours, edges and noise, the same every time."""
    side = 256
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    noise[: side // 2] = np.linspace(0, 255, side, dtype=np.uint8)[None, :, None]
    noise[:, : side // 4] = (255, 0, 0)
    return Image.fromarray(noise)
