"""What a task hands out: messages, one right answer, and a judge of any answer."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_dgemma.demo.tasks.shapes import Picture

HELD_OUT_SHARE = 16  # one prompt in 16, chosen by its hash, is never trained on

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One question to the demo model.

    `answer` is a right model turn as raw text, markers included, without the closing stop token
    `stop`. `verify(text, thought)` judges a reply: for a tool call the raw text of the call, for
    anything else the reply with its thinking removed; a thought is judged too when it is given.
    `picture` is drawn for the message part `{"type": "image"}`.
    """

    task: str
    messages: list[Message]
    answer: str
    verify: Callable[..., bool] = field(repr=False)
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool = False
    stop: str = "<turn|>"
    picture: Picture | None = None

    @property
    def key(self) -> str:
        """The prompt as one string: equal keys mean equal prompts."""
        parts: list[Any] = [self.messages, self.tools, self.enable_thinking]
        if self.picture is not None:
            parts.append(asdict(self.picture))
        return json.dumps(parts, sort_keys=True)

    @property
    def reply(self) -> str:
        """The answer as a user sees it, without the thought."""
        return self.answer.split("<channel|>")[-1]

    @property
    def thought(self) -> str | None:
        if not self.answer.startswith("<|channel>thought\n"):
            return None
        return self.answer.removeprefix("<|channel>thought\n").split("<channel|>")[0].strip()


@dataclass(frozen=True)
class Task:
    """A family of prompts with a judge; `open_ended` when many answers are right."""

    name: str
    open_ended: bool
    draw: Callable[[random.Random], Example] = field(repr=False)

    def sample(self, rng: random.Random) -> Example:
        """Draws a training example: its prompt is never among the held-out ones."""
        return next(example for example in self._stream(rng) if not is_held_out(example.key))

    def held_out(self, n: int, seed: int = 0) -> list[Example]:
        """Draws n examples whose prompts no training example has; the seed decides them."""
        rng = random.Random(f"held out {self.name} {seed}")
        examples: list[Example] = []
        for example in self._stream(rng):
            if len(examples) == n:
                break
            if is_held_out(example.key):
                examples.append(example)
        return examples

    def _stream(self, rng: random.Random) -> Iterator[Example]:
        while True:
            yield self.draw(rng)


def is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
