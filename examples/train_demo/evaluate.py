"""Held-out accuracy of a checkpoint folder: replies by transformers' generate, infilling by ours.

    python examples/train_demo/evaluate.py mlx_dgemma/demo/checkpoint --n 200

Prints a Markdown table: right answers, standard error, denoising steps a block (mean, and the share
of blocks with 5 to 20). Weights are widened to float32. Prompts of one length go through generate
together, so none is padded. A quantized folder is put back into the Hugging Face layout first
(`mlx_dgemma.convert --to-hf`), so that transformers answers with the values the bits stand for.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from data import CANVAS, Encoder, infill_rows, judged
from network import Network
from sampler import denoise
from train import split_thought, trainable
from transformers import DiffusionGemmaForBlockDiffusion

from mlx_dgemma.convert import convert
from mlx_dgemma.demo.tasks import PICTURE, TASKS, Example, held_out

BATCH = 50


@torch.no_grad()
def answers(model, encoder: Encoder, examples: list[Example]) -> tuple[list[bool], list[float]]:
    """Whether each reply is right, and its denoising steps a block."""
    by_length = defaultdict(list)
    soft = [0] * len(examples)
    if examples[0].picture is not None:
        pixels = encoder.pixels([example.picture for example in examples])
        soft = pixels.counts
    for index, example in enumerate(examples):
        prompt = encoder.prompt_of(example, soft[index])
        by_length[len(prompt)].append((index, prompt))
    right, steps = [False] * len(examples), [0.0] * len(examples)
    stops = set(model.generation_config.eos_token_id)
    for length, rows in sorted(by_length.items()):
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            prompts = torch.tensor([prompt for _, prompt in part])
            seen = {}
            if soft[part[0][0]]:
                at = [index for index, _ in part]
                seen["pixel_values"] = pixels.patches[at]
                seen["image_position_ids"] = pixels.positions[at]
                seen["mm_token_type_ids"] = (prompts == model.config.image_token_id).long()
            # a reply of more than four canvases is wrong for every task
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=4 * CANVAS,
                **seen,
            )
            new = output.sequences[:, length:]
            tokens = (new != 0).sum(-1)
            forwards = tokens / output.tokens_per_forward
            for (index, _), ids, count, passes in zip(
                part, new.tolist(), tokens.tolist(), forwards.tolist(), strict=True
            ):
                end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
                right[index] = examples[index].verify(*split_thought(encoder.text(ids[:end])))
                steps[index] = passes / math.ceil(count / CANVAS)
    return right, steps


def fill_left_to_right(
    network: Network, prompts: list[list[int]], known: torch.Tensor
) -> torch.Tensor:
    """Each hole from what stands before it alone: what a model without right context can do."""
    filled = known.clone()
    while (filled < 0).any():
        open_rows = (filled < 0).any(-1)
        seen = filled.clone()
        for row in range(len(seen)):
            hole = (filled[row] < 0).nonzero()
            if len(hole):
                seen[row, int(hole[0]) :] = -1
        rows = open_rows.nonzero()[:, 0].tolist()
        draft = denoise(network, [prompts[row] for row in rows], seen[rows]).ids
        for row, ids in zip(rows, draft, strict=True):
            at = int((filled[row] < 0).nonzero()[0])
            while at < CANVAS and filled[row, at] < 0:
                filled[row, at] = ids[at]
                at += 1
    return filled


def line(name: str, right: list[bool], steps: list[float]) -> str:
    n, share = len(right), sum(right) / len(right)
    usual = sum(5 <= count <= 20 for count in steps) / n
    error = math.sqrt(share * (1 - share) / n)
    return f"| {name} | {n} | {share:.3f} | {error:.3f} | {sum(steps) / n:.1f} | {usual:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=200, help="prompts a task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tasks", nargs="*", default=[*TASKS, PICTURE.name, "infill"])
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    settings = json.loads((arguments.folder / "config.json").read_text())
    if "quantization" in settings:
        widened = Path(tempfile.mkdtemp()) / "widened"
        convert(arguments.folder, widened, to_hf=True)
        arguments.folder = widened
    encoder = Encoder(arguments.folder)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        arguments.folder, dtype=torch.float32
    ).eval()
    print(
        "| task | n | right | s.e. | steps a block | 5-20 steps |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in arguments.tasks:
        started = time.time()
        if name == "infill":
            network = Network({k: v.detach() for k, v in trainable(model).items()}, settings)
            examples, known = infill_rows(encoder, arguments.n, arguments.seed)
            prompts = [encoder.prompt(example.messages) for example in examples]
            for label, certain in (("infill", True), ("infill, no signal from pins", False)):
                block = denoise(network, prompts, known, certain)
                print(
                    line(label, judged(encoder, examples, block.ids), block.steps.tolist()),
                    flush=True,
                )
            filled = fill_left_to_right(network, prompts, known)
            right = judged(encoder, examples, filled)
            print(
                line("infill, left to right", right, [0.0] * len(right)).rsplit("|", 3)[0]
                + "| | |",
                flush=True,
            )
        else:
            right, steps = answers(model, encoder, held_out(name, arguments.n, arguments.seed))
            print(line(name, right, steps), flush=True)
        print(f"{name}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
