"""Seconds of a training step beside PyTorch, on the demo checkpoint's shapes and one CPU.

    python studies/training_step.py [--batch-size 16] [--steps 9] [--only lora full written]

Both sides take the same step: the encoder pass, a first decoder pass without gradient for the
self-conditioning signal, the decoder pass, the loss, gradients, clipping and AdamW, in float32, on
the same batches.

    lora     rank 8 on attention and the dense branch; beside transformers and PEFT, both losses
    full     the layers trained whole; beside transformers, both losses
    written  the same with the canvas' loss alone; beside examples/train_demo/network.py, which is
             written for speed and takes prompt and canvas through the layers in one pass

Each side's matrix products and PyTorch's other operations have one thread; MLX has one for its
operations beside the one that Python runs on, so CPU seconds are printed as well. Steps of both
take turns. On x86-64, where MLX brings a slow BLAS, preload OpenBLAS (LD_PRELOAD=libopenblas.so.0).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from mlx_dgemma.training.export import to_peft
from mlx_dgemma.training.forward import Passes, decoder_visible, encoder_visible
from mlx_dgemma.training.loss import Objective, value_and_gradient
from mlx_dgemma.training.optimizers import Update
from mlx_dgemma.training.run import settle_for_training
from mlx_dgemma.training.tensor_files import write_tensors
from mlx_dgemma.training.tuning import WEIGHTS, Tuning, attach, trained, write_config

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))
import network as written

TABLE = "model.decoder.embed_tokens.weight"
RATE, BETAS, DECAY, CLIP = 1e-4, (0.95, 0.99), 1e-4, 1.0
Step = Callable[[Batch], float]


def batches(model: Any, tokenizer: Any, size: int, encoder_weight: float) -> Batches:
    rng = random.Random(0)
    examples = []
    for number in range(4 * size):
        example = list(TASKS.values())[number % len(TASKS)].sample(rng)
        answer = {"role": "assistant", "content": example.reply}
        line = {"messages": [*example.messages, answer], "tools": example.tools}
        if example.stop == "<turn|>":
            examples.append(example_of(line, model, tokenizer))
    noise = Noise(model.config.canvas_length, model.config.text.vocab_size)
    return Batches(examples, size, noise, 0, context_only=not encoder_weight)


def ours(model: Any, encoder_weight: float) -> Step:
    of = value_and_gradient(Passes(model), Objective(encoder_weight))
    optimizer = optim.AdamW(RATE, betas=list(BETAS), weight_decay=DECAY, bias_correction=True)
    update = Update(model, optimizer, CLIP)

    def step(batch: Batch) -> float:
        (total, _), found = of(batch)
        update(found)
        mx.eval(model.trainable_parameters(), optimizer.state, total)
        return total.item()

    return step


def torch_step(
    parameters: list[torch.nn.Parameter], loss_of: Callable[[Batch], torch.Tensor]
) -> Step:
    optimizer = torch.optim.AdamW(parameters, RATE, betas=BETAS, weight_decay=DECAY)

    def step(batch: Batch) -> float:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def transformers_step(adapter: Path | None) -> Step:
    """transformers' own class, its layers trained whole, or with PEFT's copy of an adapter."""
    from transformers import DynamicCache
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    network = DiffusionGemmaForBlockDiffusion.from_pretrained(CHECKPOINT, dtype=torch.float32)
    network.set_experts_implementation("eager")
    network.requires_grad_(False)
    parts = network.model
    if adapter is None:
        parts.decoder.layers.requires_grad_(True)
    else:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapter, is_trainable=True).get_base_model()
    window = network.config.text_config.sliding_window
    cap = network.final_logit_softcapping

    def masks(visible: Callable[[int | None], np.ndarray]) -> dict[str, torch.Tensor]:
        made = {}
        for kind, width in (("full_attention", None), ("sliding_attention", window)):
            made[kind] = torch.tensor(visible(width))
        return made

    def of(batch: Batch) -> torch.Tensor:
        tokens, longest = torch.tensor(batch.tokens).long(), batch.tokens.shape[1]
        cache = DynamicCache()
        read = parts.encoder(
            input_ids=tokens,
            past_key_values=cache,
            attention_mask=masks(lambda width: encoder_visible(batch.lengths, longest, width)),
        ).last_hidden_state
        canvas = batch.clean.shape[1]

        def rows(canvases: np.ndarray, chosen: np.ndarray, context: Any) -> dict[str, Any]:
            starts = batch.starts[chosen]
            seen = masks(lambda width: decoder_visible(starts, longest, canvas, width))
            places = torch.tensor(starts[:, None] + np.arange(canvas))
            return {
                "past_key_values": context,
                "decoder_input_ids": torch.tensor(canvases[chosen]).long(),
                "decoder_position_ids": places,
                "decoder_attention_mask": {
                    kind: mask.expand(-1, -1, canvas, -1) for kind, mask in seen.items()
                },
            }

        conditioned = batch.conditioned.nonzero()[0]
        signal = torch.zeros(*batch.clean.shape, len(network.lm_head.weight))
        with torch.no_grad():
            some = DynamicCache()
            for index, layer in enumerate(cache.layers):
                some.update(layer.keys[conditioned], layer.values[conditioned], index)
            signal[conditioned] = network(**rows(batch.noisier, conditioned, some)).logits
        logits = network(
            **rows(batch.noisy, np.arange(len(tokens)), cache),
            self_conditioning_logits=signal,
            self_conditioning_mask=torch.tensor(batch.conditioned),
        ).logits
        clean = torch.tensor(batch.clean).long().reshape(-1)
        loss = functional.cross_entropy(logits.reshape(len(clean), -1), clean)
        learned = torch.tensor(batch.learned.reshape(-1).nonzero()[0])
        found = torch.tanh(network.lm_head(read.flatten(0, 1)[learned]) / cap) * cap
        return loss + functional.cross_entropy(found, tokens.reshape(-1)[learned + 1])

    return torch_step([p for p in network.parameters() if p.requires_grad], of)


def written_step() -> Step:
    settings = json.loads((CHECKPOINT / "config.json").read_text())
    stored = load_file(CHECKPOINT / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in stored.items()}
    learned = [
        t.requires_grad_() for n, t in weights.items() if n.startswith("model.decoder.layers.")
    ]
    net = written.Network(weights, settings)

    def of(batch: Batch) -> torch.Tensor:
        lengths = batch.lengths.tolist()
        prompts = [row[:n].tolist() for row, n in zip(batch.tokens, lengths, strict=True)]

        def rows(canvases, chosen):
            ids = torch.tensor(canvases[chosen]).long()[:, None]
            return written.Batch.of([prompts[row] for row in chosen], ids, net.shape)

        conditioned = batch.conditioned.nonzero()[0]
        signal = torch.zeros(*batch.clean.shape, net.weights[TABLE].shape[0])
        with torch.no_grad():
            signal[conditioned] = net(rows(batch.noisier, conditioned)).softmax(-1)
        logits = net(rows(batch.noisy, np.arange(len(prompts))), signal)
        clean = torch.tensor(batch.clean).long().reshape(-1)
        return functional.cross_entropy(logits.reshape(len(clean), -1), clean)

    return torch_step(learned, of)


def one_thread() -> str:
    """Gives the matrix products of both sides a thread; says what the sides run on."""
    torch.set_num_threads(1)
    try:  # what was preloaded
        openblas = ctypes.CDLL(None)
        openblas.openblas_set_num_threads(1)
        if openblas.openblas_get_num_threads() != 1:
            sys.exit("OpenBLAS keeps more than one thread: set OPENBLAS_NUM_THREADS=1.")
        blas = "OpenBLAS"
    except AttributeError:
        blas = "its own BLAS"
    if torch.get_num_threads() != 1:
        sys.exit("PyTorch keeps more than one thread: set OMP_NUM_THREADS=1.")
    return f"MLX {mx.__version__} with {blas}, PyTorch {torch.__version__}; a thread each"


def sides(kind: str, folder: Path) -> tuple[Any, float, Callable[[], Step]]:
    """The model whose step is measured, the weight of the encoder's loss, and what makes the other
    side."""
    model, tokenizer = load(CHECKPOINT, lazy=True)
    settle_for_training(model)
    tuning = Tuning("lora" if kind == "lora" else "full")
    attach(model, tuning)
    if kind == "written":
        return (model, tokenizer), 0.0, written_step
    if kind == "full":
        return (model, tokenizer), 1.0, lambda: transformers_step(None)
    write_config(folder, tuning)
    write_tensors(folder / WEIGHTS, trained(model), {})
    to_peft(folder, folder / "peft")
    return (model, tokenizer), 1.0, lambda: transformers_step(folder / "peft")


def compare(kind: str, batch_size: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (model, tokenizer), weight, other = sides(kind, Path(folder))
        both = {"mlx_dgemma": ours(model, weight), "PyTorch": other()}
    data = batches(model, tokenizer, batch_size, weight)
    wall: dict[str, list[float]] = {name: [] for name in both}
    cpu: dict[str, list[float]] = {name: [] for name in both}
    for number in range(steps + 1):
        losses = []
        for name, step in both.items():
            batch = data.at(number)
            began, used = time.perf_counter(), time.process_time()
            losses.append(step(batch))
            if number:  # the first one warms up
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
        # Rounding moves a loss by 4e-6; where it changes the choice of an expert, by 2e-4.
        if abs(losses[0] - losses[1]) > (1e-3 if number else 1e-5) * abs(losses[1]):
            sys.exit(f"The losses of step {number + 1} differ: {losses}")
    for name in both:
        clock, used = statistics.median(wall[name]), statistics.median(cpu[name])
        print(f"{kind:<8} {name:<12}{clock:7.3f} s a step, {used:.3f} s of CPU")
    found = []
    for times in (wall, cpu):  # of the same batch, at nearly the same time
        pairs = zip(times["mlx_dgemma"], times["PyTorch"], strict=True)
        low, middle, high = statistics.quantiles([one / two for one, two in pairs], n=4)
        found.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    print(f"{kind:<8} of PyTorch's time {found[0]}, of its CPU time {found[1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9)
    kinds = ("lora", "full", "written")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    arguments = parser.parse_args()
    print(one_thread())
    for kind in arguments.only:
        compare(kind, arguments.batch_size, arguments.steps)


if __name__ == "__main__":
    main()
