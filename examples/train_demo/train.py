"""Trains the demo checkpoint with the reference model's weights and objective.

    python examples/train_demo/train.py mlx_dgemma/demo/checkpoint --minutes 80 --run RUN_FOLDER

The folder must hold the tokenizer and the settings (tokenizer.py and checkpoint.py write them).
The schedule follows the wall clock: warm-up, a constant rate, then a linear decay that ends when
the minutes are over.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import untrained, write_weights
from data import CANVAS, Encoder, Pixels, Row, Stream, infill_rows, judged, noised, noisier
from network import Batch, Network
from optimizer import Optimizer
from sampler import denoise, generate
from torch import Tensor

from mlx_dgemma.demo.tasks import PICTURE, TASKS, held_out

CANVASES = 3  # differently noised canvases of one prompt
WARM_UP = 60.0  # seconds
DECAY = 0.35  # the last share of the time
BALANCE = 0.01  # weight of the load-balancing loss over the experts
BASE = {"reverse": 1, "sort": 1.2, "count": 2, "repeat": 1, "sudoku": 1.5, "tool": 0.7}
BASE |= {"think": 1, "grid": 1.3, "list": 3, "sentence": 2, "json": 3}


def trainable(model) -> dict[str, torch.Tensor]:
    """The decoder's tensors, both passes' layer scalars and what sees, as the model's leaves."""
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.decoder.") or name.endswith("layer_scalar"):
            weights[name] = value.detach().requires_grad_()
    for name, value in model.named_parameters():
        if ".vision_tower." in name or ".embed_vision." in name:
            weights[name] = value
    return weights


def soft_tokens(model, pixels: Pixels) -> Tensor:
    """Soft tokens [sum of counts, hidden] of the pictures."""
    encoder = model.model.encoder
    return encoder.get_image_features(pixels.patches, pixels.positions).pooler_output


def loss_of(
    network: Network, rows: list[Row], use_signal: bool, pictures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    vocabulary = network.weights["model.decoder.embed_tokens.weight"].shape[0]
    clean, noisy, pins = noised(rows, CANVASES, vocabulary)
    batch = Batch.of([row.prompt for row in rows], noisy, network.shape, pictures)
    signal = None
    if use_signal:
        # In sampling the signal comes from the step before, whose canvas had more noise.
        before = noisier(noisy, pins, vocabulary)
        earlier = Batch.of([row.prompt for row in rows], before, network.shape, pictures)
        with torch.no_grad():
            logits = network(earlier).view(len(rows), CANVASES, CANVAS, vocabulary)
            temperature = 0.4 + 0.4 * torch.rand(len(rows), CANVASES, 1, 1)
            signal = (logits / temperature).softmax(-1)
    if pins.any() and torch.rand(()) < 0.9:
        signal = torch.zeros(*clean.shape, vocabulary) if signal is None else signal
        signal[pins] = F.one_hot(clean[pins], vocabulary).float()
    signal = None if signal is None else signal.view(len(rows), CANVASES * CANVAS, vocabulary)
    logits = network(batch, signal)
    loss = F.cross_entropy(logits.view(-1, vocabulary), clean.view(-1))
    return loss, balance_loss(network)


def balance_loss(network: Network) -> Tensor:
    """Switch-style load balance: experts * sum(share of rows x mean probability)."""
    total = torch.zeros(())
    for scores in network.balance:
        share = (
            torch.zeros_like(scores)
            .scatter(1, scores.topk(network.shape.top_k, -1).indices, 1.0)
            .mean(0)
        )
        total = (
            total
            + (share * scores.softmax(-1).mean(0)).sum()
            * network.shape.experts
            / network.shape.top_k
        )
    return total / len(network.balance)


@torch.no_grad()
def check(
    network: Network, model, encoder: Encoder, n: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Accuracy and steps a block on held-out examples, for each task and for infilling."""
    stops = {
        encoder.tokenizer.convert_tokens_to_ids(t) for t in ("<eos>", "<turn|>", "<|tool_response>")
    }
    results = {}
    for name in TASKS:
        examples = held_out(name, n, seed)
        prompts = [encoder.prompt(e.messages, e.tools, e.enable_thinking) for e in examples]
        replies, steps = generate(network, prompts, stops, 2 if name == "repeat" else 1)
        right = [
            e.verify(*split_thought(encoder.text(ids)))
            for e, ids in zip(examples, replies, strict=True)
        ]
        results[name] = (sum(right) / n, sum(steps) / n)
    examples = held_out(PICTURE.name, n, seed)
    pixels = encoder.pixels([example.picture for example in examples])
    seen = list(soft_tokens(model, pixels).split(pixels.counts))
    counted = zip(examples, pixels.counts, strict=True)
    prompts = [encoder.prompt_of(example, count) for example, count in counted]
    replies, steps = generate(network, prompts, stops, 1, seen)
    right = [e.verify(encoder.text(ids)) for e, ids in zip(examples, replies, strict=True)]
    results[PICTURE.name] = (sum(right) / n, sum(steps) / n)
    results["infill"] = check_infill(network, encoder, 2 * n, seed)
    return results


def split_thought(text: str) -> tuple[str, str]:
    head, marker, tail = text.partition("<channel|>")
    return (tail, head.removeprefix("<|channel>thought\n")) if marker else (text, "")


def check_infill(network: Network, encoder: Encoder, n: int, seed: int) -> tuple[float, float]:
    examples, known = infill_rows(encoder, n, seed)
    block = denoise(network, [encoder.prompt(e.messages) for e in examples], known)
    right = judged(encoder, examples, block.ids)
    return sum(right) / n, float(block.steps.float().mean())


def rate_factor(elapsed: float, total: float) -> float:
    left = max(0.0, total - elapsed) / (DECAY * total)
    return min(1.0, elapsed / WARM_UP, left)


def task_weights(results: dict[str, tuple[float, float]]) -> dict[str, float]:
    """More of what lags: the share grows with the error."""
    return {
        name: base * (0.3 + 1.5 * (1 - results.get(name, (0.5, 0))[0]))
        for name, base in BASE.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="settings and tokenizer; receives the weights")
    parser.add_argument("--run", type=Path, required=True, help="folder for resumable state")
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--rows", type=int, default=42, help="prompts a step")
    parser.add_argument("--pictures", type=int, default=8, help="rows about pictures a step")
    parser.add_argument("--check-every", type=float, default=10, help="minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)

    settings = json.loads((arguments.folder / "config.json").read_text())
    encoder = Encoder(arguments.folder)
    model = untrained(settings, arguments.seed)
    weights = trainable(model)
    network = Network(weights, settings, compiled=not arguments.eager)
    checker = Network(weights, settings)  # eager: its shapes change all the time
    optimizer = Optimizer(weights, arguments.muon_rate, arguments.adam_rate)
    stream = Stream(encoder, arguments.rows, CANVASES, arguments.seed + int(time.time()))
    results: dict[str, tuple[float, float]] = {}
    spent, step, saved = 0.0, 0, arguments.run / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        for name, value in state["weights"].items():
            weights[name].data.copy_(value)
        optimizer.load(state["optimizer"])
        spent, step, results = state["spent"], state["step"], state["results"]

    total = arguments.minutes * 60
    started = reported = time.time() - spent
    checked = kept = time.time()
    losses: list[float] = []
    balances: list[float] = []
    sights: list[float] = [0.0]
    coin = random.Random(step)

    def keep() -> None:
        state = {"weights": {name: value.detach() for name, value in weights.items()}}
        state |= {
            "optimizer": optimizer.state(),
            "spent": time.time() - started,
            "step": step,
            "results": results,
        }
        torch.save(state, saved.with_suffix(".new"))
        saved.with_suffix(".new").replace(saved)
        write_weights(model, arguments.run)

    reported = time.time()
    while time.time() - started < total:
        use_signal = coin.random() < 0.5
        groups = stream.next(task_weights(results))
        mean = 0.0
        for rows in groups:
            loss, balance = loss_of(network, rows, use_signal)
            share = len(rows) / arguments.rows
            ((loss + BALANCE * balance) * share).backward()
            mean += loss.item() * share
        if arguments.pictures:
            rows, pixels = stream.pictures(arguments.pictures)
            sight, _ = loss_of(network, rows, use_signal, soft_tokens(model, pixels))
            (sight * arguments.pictures / arguments.rows).backward()
            sights.append(sight.item())
        optimizer.step(rate_factor(time.time() - started, total))
        losses.append(mean)
        balances.append(balance.item())
        step += 1
        now = time.time()
        if now - reported > 60:
            pace = (now - reported) / len(losses)
            line = f"{(now - started) / 60:6.1f} min  step {step:6d}"
            line += f"  loss {sum(losses) / len(losses):.4f}"
            line += f"  pictures {sum(sights) / len(sights):.4f}"
            line += f"  balance {sum(balances) / len(balances):.2f}  {pace:.2f} s/step"
            print(line, flush=True)
            reported, losses, balances, sights = now, [], [], sights[-1:]
        if now - kept > 240:
            keep()
            kept = now
        if now - checked > arguments.check_every * 60:
            results = check(checker, model, encoder, 32, seed=1)
            print(
                "       " + "  ".join(f"{k} {a:.2f}/{s:.1f}" for k, (a, s) in results.items()),
                flush=True,
            )
            checked = time.time()
    keep()
    final = check(checker, model, encoder, 64, seed=1)
    print("final  " + "  ".join(f"{k} {a:.2f}/{s:.1f}" for k, (a, s) in final.items()), flush=True)
    write_weights(model, arguments.folder)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
