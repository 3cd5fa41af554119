"""The same checkpoint and canvas through mlx-vlm, side by side.

Each runtime steps in a process of its own, so that neither's memory counts for the other, and the
two take turns, so that a busy machine slows both the same. mlx-vlm runs its own generator with the
reference's sampler ("entropy-bound"), a full canvas, and nothing that lets a block end early.

    python -m mlx_dgemma.benchmark.versus RUNTIME FOLDER STEPS PROMPT_TOKENS
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.errors import InputError, ResourceError

OURS, SLICED, THEIRS = "mlx_dgemma", "mlx_dgemma, head in slices", "mlx-vlm"


def compare(
    folder: Path, *, steps: int, prompt_tokens: int, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Runtime -> seconds of a step with self-conditioning (median) and bytes above the weights.

    The processor's own seconds are counted too: on the CPU backend they hardly depend on what else
    the machine does.

    Raises InputError when mlx-vlm is not installed, ResourceError when a run fails.
    """
    if importlib.util.find_spec("mlx_vlm") is None:
        raise InputError("mlx-vlm is not installed: pip install mlx-vlm, or leave out --compare.")
    samples: dict[str, list[dict[str, Any]]] = {OURS: [], SLICED: [], THEIRS: []}
    for number in range(rounds):
        for runtime in list(samples)[:: -1 if number % 2 else 1]:
            samples[runtime].append(_run(runtime, folder, steps, prompt_tokens))
    return {
        runtime: {
            "step_seconds": statistics.median(s for run in runs for s in run["steps"]),
            "fastest_step_seconds": min(s for run in runs for s in run["steps"]),
            "slowest_step_seconds": max(s for run in runs for s in run["steps"]),
            "step_cpu_seconds": statistics.median(s for run in runs for s in run["cpu"]),
            "bytes_above_weights": statistics.median(run["above_weights"] for run in runs),
            "weights_bytes": runs[0]["weights"],
        }
        for runtime, runs in samples.items()
    }


def _run(runtime: str, folder: Path, steps: int, prompt_tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, runtime, str(folder), str(steps), str(prompt_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ResourceError(f"The run of {runtime} failed: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> int:
    """One runtime's run; prints {"steps": [seconds], "cpu": [seconds], "above_weights": bytes,
    "weights": bytes}."""
    runtime, folder, steps, prompt_tokens = arguments
    run = _theirs if runtime == THEIRS else _ours
    moments: list[tuple[float, float]] = []

    def mark() -> None:
        moments.append((time.perf_counter(), time.process_time()))

    weights = run(Path(folder), int(steps), int(prompt_tokens), runtime == SLICED, mark)
    peak = mx.get_peak_memory()
    # The first step conditions on nothing and the second compiles: neither is counted.
    wall, cpu = ([b - a for a, b in pairwise(clock)][2:] for clock in zip(*moments, strict=True))
    found = {"steps": wall, "cpu": cpu, "above_weights": peak - weights, "weights": weights}
    print(json.dumps(found))
    return 0


def _prompt(vocabulary: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (1, count), dtype=np.int32)


def _loaded() -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    weights: int = mx.get_active_memory()
    return weights


_Mark = Callable[[], None]  # called at the beginning of every step, and at the last one's end


def _ours(folder: Path, steps: int, prompt_tokens: int, sliced: bool, mark: _Mark) -> int:
    from mlx_dgemma.benchmark.timing import endless
    from mlx_dgemma.checkpoint.weights import load_model
    from mlx_dgemma.decoding.settings import DecodingSettings

    model = load_model(folder)
    weights = _loaded()
    cache = model.make_cache()
    model.prefill(_prompt(model.config.text.vocab_size, prompt_tokens), cache)
    block = endless(model, cache, DecodingSettings(sliced_head=sliced), steps)
    mx.eval(cache.arrays)
    mark()
    for _ in zip(range(steps), block, strict=False):
        mark()
    return weights


def _theirs(folder: Path, steps: int, prompt_tokens: int, _: bool, mark: _Mark) -> int:
    from mlx_vlm.generate.diffusion import stream_diffusion_generate
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)  # what we compute in there, and all that MLX's experts can
    mx.eval(model.parameters())
    weights = _loaded()
    vocabulary = int(model.config.text_config.vocab_size)
    model.config.generation_config = {  # a block that cannot become confident runs every step
        "stability_threshold": 1,
        "confidence_threshold": 0.0,
    }
    tokenizer: Any = _Silent()
    watched: Any = _Watched(model, mark)
    for _event in stream_diffusion_generate(
        watched,
        tokenizer,
        tokenizer,
        mx.array(_prompt(vocabulary, prompt_tokens)),
        None,
        None,
        max_tokens=model.config.canvas_length,
        skip_special_token_ids=[],
        temperature=1.0,
        max_denoising_steps=steps + 1,
        diffusion_full_canvas=True,
        diffusion_sampler="entropy-bound",
    ):
        pass
    return weights


class _Watched:
    """mlx-vlm's model; every decoder pass is marked. Its loop waits for each step's stop test."""

    def __init__(self, model: Any, mark: _Mark) -> None:
        self._model, self._mark = model, mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def diffusion_decoder_logits(self, *arguments: Any, **keywords: Any) -> Any:
        self._mark()
        return self._model.diffusion_decoder_logits(*arguments, **keywords)


class _Silent:
    """A tokenizer that never stops a reply and writes nothing."""

    bos_token = eos_token = None
    all_special_ids: tuple[int, ...] = ()
    clean_up_tokenization_spaces = False

    def __init__(self) -> None:
        self.tokenizer = self
        self.detokenizer = SimpleNamespace(
            reset=lambda: None,
            add_token=lambda *_, **__: None,
            finalize=lambda: None,
            last_segment="",
            text="",
        )

    def stopping_criteria(self, _: int) -> bool:
        return False

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
