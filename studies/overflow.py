"""Would float16 hold it: the largest magnitude of every kind of tensor on a run, against 65,504.

    python studies/overflow.py                       # the bundled demo
    python studies/overflow.py --model FOLDER --n 4  # any checkpoint that fits

The run computes in the checkpoint's own precision. In float16 the residual stream stays in
float32 and everything marked "wide" with it; nothing is scaled, so whatever else comes near the
limit speaks against float16 for that checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from mlx_dgemma import kernels, stream_generate
from mlx_dgemma.checkpoint.weights import cast, expand, load_model
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.demo.tasks import TASKS, held_out
from mlx_dgemma.model import Model, attention, layers
from mlx_dgemma.prompt import load_tokenizer

LIMIT = 65504.0
WIDE = ("residual",)


class Audit:
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
            self.see("residual", x)
            read = real(x, *others)
            self.see("residual", read.residual)
            return read

        return call

    def left(self, real: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*given: Any) -> mx.array:
            y = real(*given)
            self.see("residual", y)
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

    def evaluate(self) -> None:
        mx.eval(self.largest)


@contextmanager
def watched(model: Model) -> Iterator[Audit]:
    """Everything that runs inside is seen."""
    audit = Audit(model)
    places = (
        (layers.Linear, "__call__", audit.product),
        (layers.PackedLinear, "__call__", audit.product),
        (kernels.Matrix, "apply_gathered", audit.product),
        (kernels, "after_attention", audit.attended),
        (kernels, "after_branches", audit.left),
        (attention, "attend", audit.scores),
    )
    real = [getattr(owner, name) for owner, name, _ in places]
    try:
        for (owner, name, wrap), function in zip(places, real, strict=True):
            setattr(owner, name, wrap(function))
        yield audit
    finally:
        for (owner, name, _), function in zip(places, real, strict=True):
            setattr(owner, name, function)


def measure(folder: Path, n: int, seed: int = 7) -> dict[str, float]:
    """Kind -> largest magnitude over n replies of every task."""
    model = load_model(folder, lazy=True)  # unjoined, so that every matrix is seen by its name
    if mx.default_device() == mx.Device(mx.cpu):
        expand(model)
        cast(model)
    tokenizer = load_tokenizer(folder, model.config.stop_ids)
    with watched(model) as audit:
        for task in TASKS:
            for number, example in enumerate(held_out(task, n, seed=seed)):
                for _ in stream_generate(
                    model, tokenizer, example.messages, seed=number, max_tokens=64
                ):
                    audit.evaluate()
    return {kind: float(value.item()) for kind, value in sorted(audit.largest.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--n", type=int, default=1, help="replies per task")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.n)
    table = Table("tensor", "largest magnitude", "of 65,504", "")
    for kind, value in sorted(found.items(), key=lambda item: -item[1]):
        note = "wide" if kind in WIDE else "!" if value > LIMIT / 8 else ""
        table.add_row(kind, f"{value:.4g}", f"{value / LIMIT:.2%}", note)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
