"""Seconds of a training step beside PyTorch, on the demo checkpoint's shapes and one CPU.

    python studies/training_step.py [--batch-size 16] [--steps 7]

Both train the demo's layers whole, on the same batches: a first pass without gradient for the
self-conditioning signal, the passes, the loss, gradients, clipping and AdamW. PyTorch runs
examples/train_demo/network.py, which is quicker than transformers' own class and agrees with it.
Steps of both take turns; the medians are printed. On x86-64, where MLX brings a slow BLAS, preload
OpenBLAS (LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.demo.tasks import TASKS
from mlx_dgemma.training.batches import Batch, Batches, Noise
from mlx_dgemma.training.data import example_of
from mlx_dgemma.training.forward import Passes
from mlx_dgemma.training.loss import Objective, value_and_gradient
from mlx_dgemma.training.run import settle_for_training
from mlx_dgemma.training.tuning import Tuning, attach

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))
import network as torch_side

TABLE = "model.decoder.embed_tokens.weight"
RATE, BETAS, DECAY, CLIP = 1e-4, (0.95, 0.99), 1e-4, 1.0


def batches(model, tokenizer, size: int) -> Batches:
    rng = random.Random(0)
    examples = []
    for number in range(4 * size):
        example = list(TASKS.values())[number % len(TASKS)].sample(rng)
        answer = {"role": "assistant", "content": example.reply}
        line = {"messages": [*example.messages, answer], "tools": example.tools}
        if example.stop == "<turn|>":
            examples.append(example_of(line, model, tokenizer))
    noise = Noise(model.config.canvas_length, model.config.text.vocab_size)
    return Batches(examples, size, noise, 0, context_only=True)


def ours(model) -> Callable[[Batch], float]:
    attach(model, Tuning("full"))
    passes, objective = Passes(model), Objective(encoder_weight=0)
    optimizer = optim.AdamW(RATE, betas=list(BETAS), weight_decay=DECAY)

    of = value_and_gradient(passes, objective)

    def step(batch: Batch) -> float:
        (total, _), found = of(batch)
        found, _ = optim.clip_grad_norm(found, CLIP)
        optimizer.update(model, found)
        mx.eval(model.trainable_parameters(), optimizer.state, total)
        return total.item()

    return step


def theirs() -> Callable[[Batch], float]:
    settings = json.loads((CHECKPOINT / "config.json").read_text())
    stored = load_file(CHECKPOINT / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in stored.items()}
    trained = [
        t.requires_grad_() for n, t in weights.items() if n.startswith("model.decoder.layers.")
    ]
    net = torch_side.Network(weights, settings)
    optimizer = torch.optim.AdamW(trained, RATE, betas=BETAS, weight_decay=DECAY)

    def step(batch: Batch) -> float:
        lengths = batch.lengths.tolist()
        prompts = [row[:n].tolist() for row, n in zip(batch.tokens, lengths, strict=True)]

        def rows(canvases, chosen):
            ids = torch.tensor(canvases[chosen]).long()[:, None]
            return torch_side.Batch.of([prompts[row] for row in chosen], ids, net.shape)

        conditioned = batch.conditioned.nonzero()[0]
        signal = torch.zeros(*batch.clean.shape, net.weights[TABLE].shape[0])
        with torch.no_grad():
            signal[conditioned] = net(rows(batch.noisier, conditioned)).softmax(-1)
        logits = net(rows(batch.noisy, np.arange(len(prompts))), signal)
        clean = torch.tensor(batch.clean).long().reshape(-1)
        loss = functional.cross_entropy(logits.reshape(len(clean), -1), clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    model, tokenizer = load(CHECKPOINT, lazy=True)
    data = batches(model, tokenizer, arguments.batch_size)
    settle_for_training(model)
    sides = {"mlx_dgemma": ours(model), "PyTorch": theirs()}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.steps + 1):
        losses = []
        for name, step in sides.items():
            batch = data.at(number)
            began, used = time.perf_counter(), time.process_time()
            losses.append(step(batch))
            if number:  # the first one warms up
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
        if abs(losses[0] - losses[1]) > 1e-2 * abs(losses[1]):
            sys.exit(f"The losses differ: {losses}")
    for name in sides:
        print(
            f"{name:<12}{statistics.median(wall[name]):8.3f} s a step, "
            f"{statistics.median(cpu[name]):.3f} s of CPU"
        )
    ratios = [
        statistics.median(t["mlx_dgemma"]) / statistics.median(t["PyTorch"]) for t in (wall, cpu)
    ]
    print(f"ratio       {ratios[0]:8.2f} of PyTorch's time, {ratios[1]:.2f} of its CPU time")


if __name__ == "__main__":
    main()
