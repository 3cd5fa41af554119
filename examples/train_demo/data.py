"""Training canvases: prompts as ids, clean canvases, and which of their tokens are pinned."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Gemma4ImageProcessorPil

from mlx_dgemma.demo.tasks import (
    PICTURE,
    TASKS,
    Example,
    InfillExample,
    infill_examples,
    is_held_out,
)
from mlx_dgemma.demo.tasks.example import ask
from mlx_dgemma.demo.tasks.fillings import PROMPT, ROOMY_PROMPT
from mlx_dgemma.demo.tasks.pictures import Picture

CANVAS = 32
PAD, EOS = 0, 1
WIDTHS = (26, 40, 72, 1000)  # prompts up to so many tokens share a batch: little of it is padding
FILLABLE = {"sentence", "list", "json", "grid", "sudoku"}
INFILL_SHARE = 0.2
PADDED_SHARE = 0.25  # of the infilling rows
SYSTEMS = ["You are a helpful assistant.", "You are a small demo model.", "Answer briefly."]


@dataclass
class Row:
    prompt: list[int]
    canvas: list[int]
    pins: list[list[bool]] | None  # one list a canvas, or None when every token may be noised


@dataclass
class Pixels:
    """N pictures cut into patches, as the vision tower takes them."""

    patches: Tensor  # [N, P, patch values]
    positions: Tensor  # [N, P, 2]
    counts: list[int]  # soft tokens a picture


class Encoder:
    """Renders messages with the chat template and encodes them."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.fast = self.tokenizer.backend_tokenizer
        self.processor = Gemma4ImageProcessorPil.from_pretrained(str(folder))

    def ids(self, text: str) -> list[int]:
        return self.fast.encode(text, add_special_tokens=False).ids

    def pixels(self, pictures: list[Picture]) -> Pixels:
        ready = self.processor([picture.draw() for picture in pictures], return_tensors="pt")
        counts = [int(count) for count in ready["num_soft_tokens_per_image"]]
        return Pixels(ready["pixel_values"].float(), ready["image_position_ids"], counts)

    def prompt_of(self, example: Example, soft_tokens: int = 0) -> list[int]:
        """With a picture: as many placeholders as it has soft tokens, in their brackets."""
        ids = self.prompt(example.messages, example.tools, example.enable_thinking)
        if example.picture is None:
            return ids
        begin, soft, end = map(
            self.tokenizer.convert_tokens_to_ids, ("<|image>", "<|image|>", "<image|>")
        )
        at = ids.index(soft)
        return [*ids[:at], begin, *[soft] * soft_tokens, end, *ids[at + 1 :]]

    def prompt(self, messages, tools=None, enable_thinking=False) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=True,
            tokenize=False,
        )
        return self.ids(text)

    def answer(self, example: Example) -> list[int]:
        """Answer, stop token, and <eos> to the end of the last canvas."""
        ids = self.ids(example.answer + example.stop)
        return ids + [EOS] * (-len(ids) % CANVAS)

    def text(self, ids: list[int]) -> str:
        return self.fast.decode(ids, skip_special_tokens=False)


def with_context(example: Example, rng: random.Random) -> list[dict]:
    """Now and then an earlier turn or a system prompt stands before the question."""
    messages = example.messages
    if example.tools is None and rng.random() < 0.04:
        earlier = TASKS[rng.choice(["reverse", "sort", "list", "sentence", "json"])].sample(rng)
        messages = [*earlier.messages, {"role": "assistant", "content": earlier.reply}, *messages]
    if rng.random() < 0.03:
        messages = [{"role": "system", "content": rng.choice(SYSTEMS)}, *messages]
    return messages


def padded(canvas: list[int], rng: random.Random) -> tuple[list[int], list[bool]] | None:
    """One hole with more room than it needs: its right filling ends with <pad>."""
    length = next(i for i, token in enumerate([*canvas, EOS]) if token == EOS)
    width = rng.randint(1, max(2, length // 2))
    start = rng.randint(0, max(0, length - width))
    room = rng.randint(1, 6)
    if length + room > CANVAS:
        return None
    end = min(start + width, length)
    longer = canvas[:end] + [PAD] * room + canvas[end:]
    pins = [not start <= i < end + room for i in range(CANVAS)]
    return longer[:CANVAS], pins


def pinned(length: int, rng: random.Random) -> list[bool]:
    """Pins all but one to three spans of the first `length` tokens; the tail is pinned or open."""
    pins = [True] * length + [rng.random() < 0.6] * (CANVAS - length)
    for _ in range(rng.choice([1, 1, 2, 3])):
        width = rng.randint(1, max(2, length // 2))
        start = rng.randint(0, max(0, length - width))
        pins[start : start + width] = [False] * len(pins[start : start + width])
    return pins


def draw(encoder: Encoder, weights: dict[str, float], canvases: int, rng: random.Random) -> Row:
    task = rng.choices(list(weights), list(weights.values()))[0]
    example = TASKS[task].sample(rng)
    answer = encoder.answer(example)
    block = rng.randrange(len(answer) // CANVAS)
    canvas = answer[block * CANVAS : (block + 1) * CANVAS]
    if task in FILLABLE and rng.random() < INFILL_SHARE and not is_held_out(example.answer):
        bare = task != "sudoku" and rng.random() < 0.5
        prompt = encoder.prompt(ask(PROMPT) if bare else example.messages)
        # Told apart by its prompt: without that, pads turn up in ordinary replies as well.
        roomy = padded(canvas, rng) if rng.random() < PADDED_SHARE else None
        if roomy is not None:
            return Row(encoder.prompt(ask(ROOMY_PROMPT)), roomy[0], [roomy[1]] * canvases)
        length = next(i for i, token in enumerate([*canvas, EOS]) if token == EOS)
        return Row(prompt, canvas, [pinned(min(length, CANVAS), rng) for _ in range(canvases)])
    prompt = encoder.prompt(with_context(example, rng), example.tools, example.enable_thinking)
    return Row(prompt + answer[: block * CANVAS], canvas, None)


class Stream:
    """Draws the rows of a step and hands them out in batches of like prompt lengths."""

    def __init__(self, encoder: Encoder, rows: int, canvases: int, seed: int):
        self.encoder, self.rows, self.canvases = encoder, rows, canvases
        self.rng = random.Random(seed)

    def pictures(self, count: int) -> tuple[list[Row], Pixels]:
        """Rows that are about a picture each, and the pictures; all may go in one batch."""
        examples = [PICTURE.sample(self.rng) for _ in range(count)]
        pixels = self.encoder.pixels([example.picture for example in examples])
        rows = [
            Row(self.encoder.prompt_of(e, n), self.encoder.answer(e), None)
            for e, n in zip(examples, pixels.counts, strict=True)
        ]
        return rows, pixels

    def next(self, weights: dict[str, float]) -> list[list[Row]]:
        rows = [draw(self.encoder, weights, self.canvases, self.rng) for _ in range(self.rows)]
        groups: list[list[Row]] = [[] for _ in WIDTHS]
        for row in rows:
            groups[next(i for i, width in enumerate(WIDTHS) if len(row.prompt) <= width)].append(
                row
            )
        return [group for group in groups if group]


def noised(rows: list[Row], canvases: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and noised canvases [B, K, C] and their pins.

    Each token that is not pinned is replaced by a random one with probability t ~ U(0, 1).
    """
    clean = (
        torch.tensor([row.canvas for row in rows])[:, None].expand(-1, canvases, -1).contiguous()
    )
    open_row = [[False] * CANVAS] * canvases
    pins = torch.tensor([row.pins if row.pins else open_row for row in rows])
    B = len(rows)  # noqa: N806
    t = (
        torch.rand(B, 1) + torch.arange(canvases) / canvases
    ) % 1.0  # spread over (0, 1) within a prompt
    replaced = (torch.rand(B, canvases, CANVAS) < t[..., None]) & ~pins
    return clean, torch.where(replaced, torch.randint(vocabulary, clean.shape), clean), pins


def noisier(noisy: Tensor, pins: Tensor, vocabulary: int) -> Tensor:
    """Noised canvases [B, K, C], in half of them more tokens replaced; pinned ones never."""
    more = torch.rand(*noisy.shape[:2], 1) * (torch.rand(*noisy.shape[:2], 1) < 0.5)
    replaced = (torch.rand(noisy.shape) < more) & ~pins
    return torch.where(replaced, torch.randint(vocabulary, noisy.shape), noisy)


def infill_rows(encoder: Encoder, n: int, seed: int) -> tuple[list[InfillExample], Tensor]:
    """Held-out texts and their canvases [n, C]: ids, and -1 where a token is to be found."""
    stream = infill_examples(random.Random(f"infill {seed}"), held_out=True)
    chosen, rows = [], []
    while len(chosen) < n:
        example = next(stream)
        row: list[int] = []
        for segment in example.segments:
            ids = encoder.ids(segment.text)
            row += [-1] * len(ids) if segment.hole else ids
        row += encoder.ids("<turn|>")
        if len(row) <= CANVAS:
            chosen.append(example)
            rows.append(row + [1] * (CANVAS - len(row)))
    return chosen, torch.tensor(rows)


def judged(encoder: Encoder, examples: list[InfillExample], ids: Tensor) -> list[bool]:
    texts = [encoder.text(row).split("<turn|>")[0] for row in ids.tolist()]
    return [example.verify(text) for example, text in zip(examples, texts, strict=True)]
