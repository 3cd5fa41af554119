"""A quick sampler: the reference's algorithm in batches, with pinned tokens."""

from dataclasses import dataclass

import torch
from network import Batch, Network
from torch import Tensor

STEPS, BOUND, T_MAX, T_MIN, CONFIDENCE = 48, 0.1, 0.8, 0.4, 0.005


@dataclass
class Block:
    ids: Tensor  # [B, C]
    steps: Tensor  # [B]


@torch.no_grad()
def denoise(
    network: Network,
    prompts: list[list[int]],
    known: Tensor | None = None,
    certain: bool = True,
    steps: int = STEPS,
    pictures: list[Tensor] | None = None,
) -> Block:
    """One canvas a prompt; known [B, C] holds pinned ids and -1 where a token is to be found.

    pictures: the soft tokens [n, hidden] of each prompt's picture.
    """
    B, C = len(prompts), network.shape.canvas  # noqa: N806
    vocabulary = network.weights["model.decoder.embed_tokens.weight"].shape[0]
    pins = torch.zeros(B, C, dtype=torch.bool) if known is None else known >= 0
    sure = (
        torch.nn.functional.one_hot(known.clamp(min=0), vocabulary).float()
        if known is not None
        else None
    )
    pin = (
        (lambda canvas: torch.where(pins, known, canvas))
        if known is not None
        else (lambda canvas: canvas)
    )
    canvas = pin(torch.randint(vocabulary, (B, C)))
    signal = torch.zeros(B, C, vocabulary)
    draft = torch.full((B, C), -1)
    used = torch.zeros(B, dtype=torch.long)
    active = torch.arange(B)
    for step in range(steps, 0, -1):
        if sure is not None and certain:
            signal[active] = torch.where(pins[active][..., None], sure[active], signal[active])
        seen = None if pictures is None else torch.cat([pictures[i] for i in active])
        batch = Batch.of([prompts[i] for i in active], canvas[active][:, None], network.shape, seen)
        logits = network(batch, signal[active]) / (T_MIN + (T_MAX - T_MIN) * step / STEPS)
        spread = logits.log_softmax(-1)
        probabilities = spread.exp()
        entropy = -(probabilities * spread).sum(-1).masked_fill(pins[active], 0.0)
        sampled = torch.multinomial(probabilities.flatten(0, 1), 1).view(len(active), C)
        new = pin_rows(logits.argmax(-1), pins, known, active)
        ordered, order = entropy.masked_fill(pins[active], 1e9).sort(dim=-1, stable=True)
        accepted = torch.zeros_like(order, dtype=torch.bool).scatter(
            1, order, ordered.cumsum(-1) - ordered <= BOUND
        )
        canvas[active] = torch.where(accepted, sampled, torch.randint(vocabulary, sampled.shape))
        canvas = pin(canvas)
        used[active] += 1
        stable = (new == draft[active]).all(-1)
        draft[active] = new
        signal[active] = probabilities
        free = (~pins[active]).sum(-1).clamp(min=1)
        active = active[~(stable & (entropy.sum(-1) / free < CONFIDENCE))]
        if not len(active):
            break
    return Block(draft, used)


def pin_rows(canvas: Tensor, pins: Tensor, known: Tensor | None, rows: Tensor) -> Tensor:
    return canvas if known is None else torch.where(pins[rows], known[rows], canvas)


def generate(
    network: Network,
    prompts: list[list[int]],
    stops: set[int],
    blocks: int,
    pictures: list[Tensor] | None = None,
) -> tuple[list[list[int]], list[float]]:
    """Reply ids without the stop token, and the mean steps a block, for each prompt."""
    replies: list[list[int]] = [[] for _ in prompts]
    steps: list[list[int]] = [[] for _ in prompts]
    contexts = [list(prompt) for prompt in prompts]
    open_rows = list(range(len(prompts)))
    for _ in range(blocks):
        if not open_rows:
            break
        seen = None if pictures is None else [pictures[i] for i in open_rows]
        block = denoise(network, [contexts[i] for i in open_rows], pictures=seen)
        still = []
        for row, ids, used in zip(open_rows, block.ids.tolist(), block.steps.tolist(), strict=True):
            steps[row].append(used)
            end = next((i for i, token in enumerate(ids) if token in stops), None)
            replies[row] += ids[:end]
            contexts[row] += ids
            if end is None:
                still.append(row)
        open_rows = still
    return replies, [sum(counts) / len(counts) for counts in steps]
