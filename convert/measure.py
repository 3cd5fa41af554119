"""What a recipe costs: the quantized network against the source, at the same states.

States are taken from real denoising trajectories: a context, a canvas, the self-conditioning
signal and the temperature of a step. The source and every recipe are then run over all states
one layer at a time, so that one layer's weights are held at once, whatever the model's size.

    KL              of tempered distributions, source against recipe: mean and 99th percentile
    top-1           share of positions of converged canvases where both have the same argmax
    steps, accuracy from whole generations, for models that fit in this machine's memory
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.adapters import Adapter
from mlx_dgemma.checkpoint.sizes import stored_bytes
from mlx_dgemma.convert.plan import Plan, make_plan
from mlx_dgemma.convert.recipes import RECIPES, Recipe
from mlx_dgemma.convert.source import dense_shapes, open_source, slices
from mlx_dgemma.convert.streamed import Streamed
from mlx_dgemma.convert.trajectories import State, record
from mlx_dgemma.errors import ResourceError
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.model.config import ModelConfig

if TYPE_CHECKING:
    from mlx_dgemma.demo.tasks import Example

# By size; the recipes beside the chosen one are measured with it.
BY_SIZE = ("small", "mxfp4", "4bit", "quality", "8bit", "bf16")
# Positions whose distributions over the whole vocabulary are held at once.
ROWS_AT_ONCE = 32

PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give a JSON object with the name, age and city of a fictional person.",
    "What is 17 times 23? Show the steps.",
    "Translate into French: The train leaves at nine and arrives before noon.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List five differences between TCP and UDP.",
    "Summarise the causes of the First World War for a twelve-year-old.",
)


@dataclass(frozen=True)
class Figures:
    """One recipe's row. `steps_per_block` and `accuracy` are None where nothing was generated."""

    recipe: str
    total_size: int
    bits_per_weight: float
    kl_mean: float
    kl_p99: float
    top1_converged: float
    steps_per_block: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Measurement:
    """All rows, on how many states and prompts, and whether the model is the bundled demo."""

    model: str
    demo: bool
    states: int
    prompts: int
    seed: int
    rows: tuple[Figures, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Markdown."""
        of = "the bundled demo model" if self.demo else self.model
        head = f"Measured on {of}: {self.states} denoising states of {self.prompts} prompts."
        lines = [
            head,
            "",
            "| recipe | bits/weight | KL mean | KL p99 | same top-1 | steps per block | valid |",
            "|" + " --- |" * 7,
        ]
        for row in self.rows:
            steps = "-" if row.steps_per_block is None else f"{row.steps_per_block:.1f}"
            valid = "-" if row.accuracy is None else f"{row.accuracy:.2f}"
            lines.append(
                f"| {row.recipe} | {row.bits_per_weight:.2f} | {row.kl_mean:.2e} "
                f"| {row.kl_p99:.2e} | {row.top1_converged:.4f} | {steps} | {valid} |"
            )
        return "\n".join(lines)


def neighbours(recipe: Recipe) -> list[Recipe]:
    """The recipe with the next smaller and the next larger one of the table."""
    if recipe.name not in BY_SIZE:
        return [RECIPES["4bit"], recipe, RECIPES["8bit"]]
    at = BY_SIZE.index(recipe.name)
    return [RECIPES[name] for name in BY_SIZE[max(0, at - 1) : at + 2]]


def measure(
    folder: Path,
    recipes: Sequence[Recipe],
    *,
    driver: Path | None = None,
    adapter: Adapter | None = None,
    scratch: Path | None = None,
    prompts: Sequence[Any] | None = None,
    samples: int = 4,
    steps_kept: int = 4,
    convert: Callable[..., object] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Measurement:
    """Compare `recipes` with the checkpoint in `folder` (and an adapter merged into it).

    driver: a smaller checkpoint whose generations give the states where the source does not fit
        this machine's memory. scratch: where models to generate with are written for a while.
    prompts: texts, messages or lists of ids; by default `samples` held-out prompts of each demo
        task for the demo model, else the first of PROMPTS. steps_kept: states taken of each
        block. convert: `mlx_dgemma.convert.convert`, to also generate with every recipe that fits;
        None leaves that out.

    Raises ResourceError when neither source nor driver fits in memory.
    """
    demo = is_demo(folder)
    examples = demo_examples(samples, seed) if demo and prompts is None else []
    if prompts is None:
        prompts = [example.messages for example in examples] or list(PROMPTS[:samples])
    chosen = _driver(folder, driver)
    states = record(chosen, prompts, seed, steps_kept, adapter if chosen == folder else None)
    dtype = "float32" if mx.default_device() == mx.Device(mx.cpu) else "bfloat16"
    rows = []
    with open_source(folder) as source:
        counter = _Ticks(progress, (len(recipes) + 1) * source.config.text.num_hidden_layers)
        parameters = source.with_adapter(adapter)
        reference = Streamed(source.config, parameters, None, dtype)
        expected = reference.hidden(states, counter)
        for recipe in recipes:
            shapes = dense_shapes(source.config)
            plan = make_plan(source.config, source.raw_config, shapes, recipe, dtype="bfloat16")
            candidate = Streamed(source.config, parameters, plan, dtype)
            found = candidate.hidden(states, counter)
            rows.append(compare(plan, states, (reference, expected), (candidate, found)))
    if convert is not None:
        rows = [
            _with_generations(
                row, folder, recipe, prompts, examples, seed, adapter, scratch, convert
            )
            for row, recipe in zip(rows, recipes, strict=True)
        ]
    return Measurement(folder.name, demo, len(states), len(prompts), seed, tuple(rows))


def _driver(folder: Path, other: Path | None) -> Path:
    """Whose generations give the states: the source where it fits, else the smaller one."""
    for candidate in (folder, *([other] if other is not None else [])):
        if _fits(stored_bytes(candidate)):
            return candidate
    raise ResourceError(
        f"{folder.name} is too large to generate with on this machine; measure a recipe that fits."
    )


def _fits(nbytes: int) -> bool:
    room = machine().limit
    return room is None or nbytes < 0.9 * room


def is_demo(folder: Path) -> bool:
    """Whether the checkpoint has the bundled demo's architecture and vocabulary."""
    from mlx_dgemma.checkpoint.hub import demo_path

    return ModelConfig.from_folder(folder).text == ModelConfig.from_folder(demo_path()).text


def demo_examples(samples: int, seed: int) -> list[Example]:
    """Held-out prompts of the tasks that are answered in plain text."""
    from mlx_dgemma.demo.tasks import TASKS, held_out

    return [
        example
        for name in TASKS
        for example in held_out(name, samples, seed)
        if example.tools is None and not example.enable_thinking
    ]


def compare(
    plan: Plan,
    states: Sequence[State],
    reference: tuple[Streamed, list[mx.array]],
    candidate: tuple[Streamed, list[mx.array]],
) -> Figures:
    """KL in nats of every position of every state, and where the argmax of converged ones agrees.

    reference, candidate: the network and its hidden states, [C, H] per state.
    """
    divergences, same = [], []
    for state, ours, theirs in zip(states, candidate[1], reference[1], strict=True):
        for start, stop in slices(ours.shape, ROWS_AT_ONCE * 4 * ours.shape[1]):
            p = reference[0].logits(theirs[start:stop])
            q = candidate[0].logits(ours[start:stop])
            if state.converged:
                same.append(np.array(mx.argmax(p, -1) == mx.argmax(q, -1)))
            log_p, log_q = (_log_softmax(logits / state.temperature) for logits in (p, q))
            divergences.append(np.array(mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1)))
    kl = np.concatenate(divergences)
    return Figures(
        recipe=plan.recipe,
        total_size=plan.total_size,
        bits_per_weight=plan.bits_per_weight,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_converged=float(np.concatenate(same).mean()) if same else float("nan"),
    )


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _with_generations(
    figures: Figures,
    folder: Path,
    recipe: Recipe,
    prompts: Sequence[Any],
    examples: Sequence[Example],
    seed: int,
    adapter: Adapter | None,
    scratch: Path | None,
    convert: Callable[..., object],
) -> Figures:
    """The same row with steps per block and the share of valid answers, where the model fits."""
    from mlx_dgemma.checkpoint.weights import load_model
    from mlx_dgemma.generate import stream_generate
    from mlx_dgemma.prompt.tokenizer import load_tokenizer

    if not _fits(figures.total_size):
        return figures
    steps: list[int] = []
    valid = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder_name:
        target = Path(folder_name) / "model"
        try:
            merged = adapter.folder if adapter is not None else None
            convert(folder, target, recipe=recipe, adapter_path=merged)
        except ResourceError:  # no room on the disk: the other figures stand
            return figures
        model = load_model(target)
        tokenizer = load_tokenizer(target, model.config.stop_ids)
        for number, prompt in enumerate(prompts):
            text = []
            for event in stream_generate(model, tokenizer, prompt, seed=seed + number):
                text.append(event.text)
                steps += getattr(event, "steps_per_block", ())
            if examples:
                valid.append(examples[number].verify("".join(text)))
    return replace(
        figures,
        steps_per_block=float(np.mean(steps)),
        accuracy=float(np.mean(valid)) if valid else None,
    )


class _Ticks:
    """Counts layers for a progress display."""

    def __init__(self, progress: Callable[[str, int, int], None] | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("measuring", self._done, self._total)
