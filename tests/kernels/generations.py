"""Whole replies of the demo twice, by the twins and by the kernels in the emulator, step by step.

    python tests/kernels/generations.py            # 50 replies in float32
    python tests/kernels/generations.py --packed   # the same with the demo's 4-bit recipe

Every operation that has a kernel runs as one: attention in chunks of `KEY_CHUNK` keys, so that each
step needs several, and every other reply with sparse self-conditioning. Only the norm of the
sliding layers' heads, which are narrower than its kernel takes, stays with the twin.

The sums of a kernel and its twin are associated differently, so their float32 results differ in the
last digits. Where two experts score alike to those digits, one run may take the one and one the
other: a `Tie`. Logits are compared as long as no tie has been met.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np

if __name__ == "__main__":  # a test run has its own path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import emulated

from mlx_dgemma import Commit, stream_generate
from mlx_dgemma.checkpoint.weights import cast, load_model
from mlx_dgemma.convert.conversion import convert
from mlx_dgemma.decoding import sampler as decoding_sampler
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.demo.tasks import TASKS, Example, held_out
from mlx_dgemma.kernels import router
from mlx_dgemma.model import Model
from mlx_dgemma.model import attention as network_attention
from mlx_dgemma.prompt.tokenizer import Tokenizer, load_tokenizer

KEY_CHUNK = 48
TOKENS = 40  # a second block where the reply is long
KERNELS = {
    *("row_statistics", "accept", "survivors", "gather_embeddings"),
    *("top_experts", "sort_by_expert", "experts", "combine"),
    *("normed_heads", "chunk_softmax", "merge_attention"),
    *("after_attention", "after_branches"),
}


@dataclass(frozen=True)
class Step:
    """One denoising step in NumPy: the contract's logits [C, V], and [C] each what came of them.

    routings: (scores [T, E], experts [T, k] in ascending order) of every layer, also of the encoder
        passes before this step.
    """

    routings: list[tuple[np.ndarray, np.ndarray]]
    canvas: np.ndarray
    logits: np.ndarray
    entropy: np.ndarray
    draft: np.ndarray
    sample: np.ndarray
    accepted: np.ndarray
    mean_entropy: float


@dataclass
class Reply:
    """A reply's ids, and the steps it took."""

    ids: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Tie:
    """The first position whose experts differ.

    gap: between the last score that was taken and the first that was not, by the twins; moved: the
    most that a score there differs between the two. Both relative to the largest score.
    """

    step: int
    gap: float
    moved: float


@dataclass
class Comparison:
    """Two replies to the same prompt and seed.

    logits, entropy: the largest differences before the tie, relative to a step's largest logit and
        in nats. compared: over so many of all steps.
    apart: what the step decided otherwise after which canvases or ids differ, if they do.
    """

    task: str
    seed: int
    same_ids: bool
    steps: int
    kernels: frozenset[str]
    compared: int = 0
    logits: float = 0.0
    entropy: float = 0.0
    tie: Tie | None = None
    apart: str | None = None


def replies(n: int) -> Iterator[tuple[int, Example]]:
    """n held-out prompts with their seeds, the tasks by turns."""
    each = {name: held_out(name, -(-n // len(TASKS)), seed=9) for name in TASKS}
    for seed in range(n):
        yield seed, each[list(TASKS)[seed % len(TASKS)]][seed // len(TASKS)]


def compare(model: Model, tokenizer: Tokenizer, seed: int, example: Example) -> Comparison:
    """One reply by the twins, the same by the kernels in the emulator."""
    with _kernels("off"):
        expected = _reply(model, tokenizer, seed, example)
    with _kernels("force"), emulated("greedy") as launched:
        found = _reply(model, tokenizer, seed, example)
    kernels = frozenset(launch.body.name.removeprefix("dgemma_") for launch in launched)
    same = expected.ids == found.ids
    result = Comparison(example.task, seed, same, len(expected.steps), kernels)
    latest = ""
    for number, (one, two) in enumerate(zip(expected.steps, found.steps, strict=False), start=1):
        if not np.array_equal(one.canvas, two.canvas):
            result.apart = latest
            return result
        latest = f"step {number}: {_apart(one, two)}"
        result.tie = result.tie or _tie(number, one, two)
        if result.tie is None:
            largest = np.abs(one.logits).max()
            result.logits = max(result.logits, np.abs(one.logits - two.logits).max() / largest)
            result.entropy = max(result.entropy, np.abs(one.entropy - two.entropy).max())
            result.compared = number
    if not same or len(expected.steps) != len(found.steps):
        result.apart = latest
    return result


def _tie(number: int, one: Step, two: Step) -> Tie | None:
    for (scores, experts), (others, chosen) in zip(one.routings, two.routings, strict=True):
        for token in np.flatnonzero((experts != chosen).any(axis=1)):
            best, largest = -np.sort(-scores[token]), np.abs(scores[token]).max()
            gap = best[experts.shape[1] - 1] - best[experts.shape[1]]
            moved = np.abs(scores[token] - others[token]).max()
            return Tie(number, gap / largest, moved / largest)
    return None


def _apart(one: Step, two: Step) -> str:
    """What two steps from the same canvas decided differently, and how near each decision was."""
    decided = {
        name: np.flatnonzero(getattr(one, name) != getattr(two, name)).tolist()
        for name in ("draft", "sample", "accepted")
    }
    two_best = np.sort(one.logits, axis=1)[:, -2:]
    ascending = np.sort(one.entropy)
    sums = np.cumsum(ascending) - ascending
    return (
        f"positions that differ {decided}; logits by at most "
        f"{np.abs(one.logits - two.logits).max():.1e}, the two best of a position are apart by "
        f"{(two_best[:, 1] - two_best[:, 0]).min():.1e} or more; sums of entropies "
        f"{np.array2string(sums, precision=7)}; mean entropies {one.mean_entropy:.9f} and "
        f"{two.mean_entropy:.9f}"
    )


def _reply(model: Model, tokenizer: Tokenizer, seed: int, example: Example) -> Reply:
    reply = Reply()
    with _recording(model, reply.steps):
        events = stream_generate(
            model,
            tokenizer,
            example.messages,
            seed=seed,
            tools=example.tools,
            enable_thinking=example.enable_thinking,
            max_tokens=TOKENS,
            conditioning="sparse" if seed % 2 else "dense",
        )
        for event in events:
            if isinstance(event, Commit):
                reply.ids += event.ids
    return reply


@contextmanager
def _recording(model: Model, steps: list[Step]) -> Iterator[None]:
    """Writes down every decoder pass and what was decided after it."""
    routings: list[tuple[np.ndarray, np.ndarray]] = []
    last: list[mx.array] = []

    def choose_experts(scores, *arguments, **keywords):
        result = choose(scores, *arguments, **keywords)
        routings.append((np.array(scores), np.sort(result.experts, axis=1)))
        return result

    def hidden(self, *arguments, **keywords):
        last[:] = [network(self, *arguments, **keywords)]
        return last[0]

    def accept_renoise(canvas, entropy, draft, sample, *arguments, **keywords):
        result = accept(canvas, entropy, draft, sample, *arguments, **keywords)
        logits = model.softcap(model.raw_logits(last[0]))
        rows = [np.array(a[0]) for a in (canvas, logits, entropy, draft, sample, result.accepted)]
        steps.append(Step(routings.copy(), *rows, result.status[0, 1].item()))
        routings.clear()
        return result

    network, accept = Model.hidden, decoding_sampler.accept_renoise
    choose = router.choose_experts
    with (
        patch.object(Model, "hidden", hidden),
        patch.object(router, "choose_experts", choose_experts),
        patch.object(decoding_sampler, "accept_renoise", accept_renoise),
        patch.object(network_attention, "KEY_CHUNK", KEY_CHUNK),
    ):
        yield


@contextmanager
def _kernels(mode: str) -> Iterator[None]:
    with patch.dict(os.environ, MLX_DGEMMA_KERNELS=mode):
        yield


def packed_demo(folder: Path) -> Model:
    """The demo in the 4-bit recipe, its matrices left packed, computing in float32."""
    convert(CHECKPOINT, folder, recipe="4bit")
    model = load_model(folder, lazy=True)
    cast(model)
    model.prepare()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=50, help="replies")
    parser.add_argument("--packed", action="store_true", help="the demo in 4 bits")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = packed_demo(Path(folder) / "4bit") if options.packed else load_model(CHECKPOINT)
        tokenizer = load_tokenizer(CHECKPOINT, model.config.stop_ids)
        started, results = time.perf_counter(), []
        for seed, example in replies(options.n):
            result = compare(model, tokenizer, seed, example)
            results.append(result)
            if result.tie or result.apart:
                ids = "the same ids" if result.same_ids else "OTHER IDS"
                print(f"{result.task}, seed {seed}, {result.steps} steps, {ids}: {result.tie}")
                print(f"    {result.apart or 'the same canvases'}", flush=True)
    same = sum(result.same_ids for result in results)
    print(
        f"{same} of {len(results)} replies have the same ids; "
        f"in {sum(result.compared for result in results)} of "
        f"{sum(result.steps for result in results)} steps, those before a tie, logits differ by "
        f"{max(result.logits for result in results):.1e} of the largest and entropies by "
        f"{max(result.entropy for result in results):.1e} nats; "
        f"{(time.perf_counter() - started) / 60:.1f} minutes"
    )
    raise SystemExit(same < len(results))


if __name__ == "__main__":
    main()
