"""How well holes are filled: the demo checkpoint on held-out texts with a judge.

    python studies/infill.py                       # about 100 texts per figure
    python studies/infill.py --n 20 --json out.json

Figures: accuracy by number of holes and by their tokens, with right context and without (plain
continuation), which signal a pinned position should give, how lengths are chosen, how much
alternatives differ, and what all that costs in decoder passes.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_dgemma import edit, infill, load
from mlx_dgemma.decoding import (
    CanvasRequest,
    DecodingSettings,
    SeededDraws,
    denoise_block,
    self_conditioning,
)
from mlx_dgemma.decoding.logits import WholeLogits
from mlx_dgemma.demo.tasks import InfillExample, infill_examples
from mlx_dgemma.demo.tasks.example import ask
from mlx_dgemma.demo.tasks.fillings import PROMPT, ROOMY_PROMPT
from mlx_dgemma.generate import encode_prompt

SEED = 2026


def examples(kind: str, limit: int, model: Any, tokenizer: Any) -> Iterator[InfillExample]:
    """Held-out texts that fit the demo's canvas with room for the stop id."""
    for example in infill_examples(random.Random(f"{kind} {SEED}"), held_out=True):
        if len(tokenizer.encode(example.text)) < model.config.canvas_length:
            limit -= 1
            yield example
        if limit == 0:
            return


def marked(example: InfillExample, tokenizer: Any, *, length: bool = True) -> str:
    """The example's text with markers for its holes."""
    parts = []
    for segment in example.segments:
        if not segment.hole:
            parts.append(segment.text.replace("<hole", r"\<hole"))
        elif length:
            parts.append(f"<hole:{max(len(tokenizer.encode(segment.text)), 1)}>")
        else:
            parts.append("<hole>")
    return "".join(parts)


def share(outcomes: Iterable[bool]) -> dict[str, float]:
    """A proportion with its standard error."""
    values = [float(outcome) for outcome in outcomes]
    p = statistics.fmean(values)
    return {"share": p, "error": (p * (1 - p) / len(values)) ** 0.5, "n": len(values)}


def fill(model: Any, tokenizer: Any, example: InfillExample, seed: int, **options: Any) -> Any:
    spans, text, lengths = [], "", []
    for segment in example.segments:
        if segment.hole:
            spans.append((len(text), len(text) + len(segment.text)))
            lengths.append(len(tokenizer.encode(segment.text)))
        text += segment.text
    return infill(
        model,
        tokenizer,
        marked(example, tokenizer),
        prompt=example.messages,
        seed=seed,
        **options,
    )


def continuation(model: Any, tokenizer: Any, example: InfillExample, seed: int) -> str:
    """The same holes filled from the left alone: each hole is the start of a free canvas."""
    settings = DecodingSettings.from_defaults(model.config.generation, {})
    text = ""
    for segment in example.segments:
        if not segment.hole:
            text += segment.text
            continue
        ids = encode_prompt(tokenizer, example.messages) + tokenizer.encode(text)
        cache = model.make_cache()
        model.prefill(mx.array(ids)[None], cache)
        steps = denoise_block(model, cache, settings, [CanvasRequest(SeededDraws(seed))])
        result = _result(steps)
        count = len(tokenizer.encode(segment.text))
        text += tokenizer.decode(result.ids[:count].tolist(), skip_special=True)
    return text


def _result(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value[0]


def accuracy(model: Any, tokenizer: Any, n: int) -> dict[str, Any]:
    """By holes and tokens, seeing both sides and seeing the left alone."""
    by_holes: dict[str, list[bool]] = defaultdict(list)
    by_tokens: dict[str, list[bool]] = defaultdict(list)
    both, left, forwards = [], [], []
    for seed, example in enumerate(examples("accuracy", n, model, tokenizer)):
        result = fill(model, tokenizer, example, seed)
        right = example.verify(result.text)
        holes = [segment for segment in example.segments if segment.hole]
        tokens = sum(len(tokenizer.encode(segment.text)) for segment in holes)
        by_holes[str(len(holes))].append(right)
        by_tokens["1-2" if tokens < 3 else "3-5" if tokens < 6 else "6 or more"].append(right)
        both.append(right)
        forwards.append(result.forwards)
        left.append(example.verify(continuation(model, tokenizer, example, seed)))
    return {
        "both sides": share(both),
        "left side alone": share(left),
        "by holes": {key: share(value) for key, value in sorted(by_holes.items())},
        "by tokens": {key: share(value) for key, value in sorted(by_tokens.items())},
        "forwards": {"mean": statistics.fmean(forwards), "median": statistics.median(forwards)},
    }


def signals(model: Any, tokenizer: Any, n: int) -> dict[str, Any]:
    """What a pinned position tells the next step: its own embedding, nothing, or the prediction."""
    certain = self_conditioning.signal

    def predicted(model: Any, seen: Any, *_: Any) -> mx.array:
        """As if nothing were pinned; the step itself predicts free positions alone."""
        logits = WholeLogits(model, seen.hidden, np.zeros(0, dtype=np.int32))
        stats = logits.statistics(seen.temperature, mx.zeros((len(seen.hidden), 2)), 0.0)
        return logits.signal(stats, seen.temperature).reshape(*seen.draft.shape, -1)

    def zero(model: Any, seen: Any, state: Any, *few: Any) -> mx.array:
        soft = certain(model, seen, state, *few)
        return soft if state.pins is None else mx.where(state.pins[1][..., None], 0.0, soft)

    figures = {}
    for name, signal in {"one-hot": certain, "zero": zero, "predicted": predicted}.items():
        with patch.object(self_conditioning, "signal", signal):
            outcomes, steps = [], []
            for seed, example in enumerate(examples("signals", n, model, tokenizer)):
                result = fill(model, tokenizer, example, seed)
                outcomes.append(example.verify(result.text))
                steps.append(result.steps)
        figures[name] = {**share(outcomes), "steps": statistics.fmean(steps)}
    return figures


def lengths(model: Any, tokenizer: Any, n: int) -> dict[str, Any]:
    """One hole of unknown length: is the text right, and at what cost, by how it is chosen?"""
    single = (
        example
        for example in examples("lengths", 50 * n, model, tokenizer)
        if sum(segment.hole for segment in example.segments) == 1
    )
    chosen = list(islice(single, n))
    figures: dict[str, Any] = {}
    for name, (known, options, changes) in WAYS.items():
        right, same, forwards = [], [], []
        slow = "Filler._promising" in changes
        texts = chosen[: max(n // 4, 1)] if slow else chosen
        if "prompt" in options:  # in place of the bare one alone: others tell what to fill in
            texts = [example for example in texts if example.messages == ask(PROMPT)]
        with ExitStack() as patches:
            for place, value in changes.items():
                patches.enter_context(patch(f"mlx_dgemma.infilling.windows.{place}", value))
            for seed, example in enumerate(texts):
                text = marked(example, tokenizer, length=known)
                given = {"prompt": example.messages, **options}
                result = infill(model, tokenizer, text, seed=seed, **given)
                right.append(example.verify(result.text))
                same.append(len(result.text) == len(example.text))
                forwards.append(result.forwards)
        figures[name] = {
            "text valid": share(right),
            "as long as the original": share(same),
            "forwards": statistics.fmean(forwards),
        }
    return figures


def _every(self: Any, cache: Any, window: Any, tries: Any, *_: Any) -> Any:
    """Fills every length instead of a few."""
    yield from ()
    return tries


def _surest(self: Any, cache: Any, window: Any, filled: Any, *_: Any) -> Any:
    """Takes the filling that is surest of itself."""
    yield from ()
    return max(filled, key=lambda canvas: canvas.score)


# name -> (is the length told, options of infill, what is changed in windows.py)
WAYS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "length given": (True, {}, {}),
    "by what follows": (False, {}, {}),
    "four filled, the hidden text decides": (False, {}, {"FINALISTS": 4}),
    "every length filled, by its own probability": (
        False,
        {},
        {"Filler._promising": _every, "Filler._best_followed": _surest},
    ),
    "ended early with pads": (False, {"lengths": "pad", "prompt": ROOMY_PROMPT}, {}),
}


def alternatives(model: Any, tokenizer: Any, n: int) -> dict[str, Any]:
    """Four alternatives of each text: how many differ, and does the best score judge well?"""
    distinct, best, any_right = [], [], []
    for seed, example in enumerate(examples("alternatives", n, model, tokenizer)):
        result = fill(model, tokenizer, example, 100 + 4 * seed, n=4)
        every = [result, *result.alternatives]
        distinct.append(len({alternative.text for alternative in every}))
        best.append(example.verify(result.text))
        any_right.append(any(example.verify(alternative.text) for alternative in every))
    return {
        "distinct of 4": statistics.fmean(distinct),
        "best scored is valid": share(best),
        "some is valid": share(any_right),
    }


def strengths(model: Any, tokenizer: Any, n: int) -> dict[str, Any]:
    """Editing a span from its present text: how much changes, and does the text stay valid?"""
    figures = {}
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        changed, right, steps = [], [], []
        for seed, example in enumerate(examples("strength", n, model, tokenizer)):
            position = 0
            for segment in example.segments:
                if segment.hole:
                    break
                position += len(segment.text)
            span = (position, position + len(segment.text))
            count = len(tokenizer.encode(segment.text))
            options: dict[str, Any] = {"strength": strength} if strength < 1 else {"length": count}
            result = edit(
                model,
                tokenizer,
                example.text,
                [span],
                prompt=example.messages,
                seed=seed,
                **options,
            )
            changed.append(result.text != example.text)
            right.append(example.verify(result.text))
            steps.append(result.steps)
        figures[f"{strength:g}"] = {
            "changed": share(changed),
            "valid": share(right),
            "steps": statistics.fmean(steps),
        }
    return figures


PARTS = {
    "accuracy": accuracy,
    "signals": signals,
    "lengths": lengths,
    "alternatives": alternatives,
    "strengths": strengths,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="texts per figure")
    parser.add_argument("--model", help="checkpoint folder (default: the bundled demo)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this (repeatable)")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    console = Console()
    figures: dict[str, Any] = {"n": arguments.n, "machine": platform.processor() or "CPU"}
    for name in arguments.part or PARTS:
        figures[name] = PARTS[name](model, tokenizer, arguments.n)
        console.print(_table(name, figures[name]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def _table(title: str, figures: dict[str, Any]) -> Table:
    table = Table("figure", "value", title=title, title_justify="left")
    for path, value in _flat(figures):
        table.add_row(path, value)
    return table


def _flat(figures: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        path = f"{above} / {name}" if above else name
        if isinstance(value, dict) and "share" in value:
            extra = f"  in {value['steps']:.1f} steps" if "steps" in value else ""
            shown = f"{value['share']:.2f} ± {value['error']:.2f} (n={value['n']}){extra}"
            yield path, shown
        elif isinstance(value, dict):
            yield from _flat(value, path)
        else:
            yield path, f"{value:.2f}"


if __name__ == "__main__":
    main()
