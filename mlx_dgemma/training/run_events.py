"""What a training run tells its observers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """What the last steps were like: means over them; tokens_per_second counts prompt and response
    tokens; peak_memory in bytes."""

    step: int
    loss: float
    canvas_loss: float
    encoder_loss: float
    learning_rate: float
    steps_per_second: float
    tokens_per_second: float
    peak_memory: int


@dataclass(frozen=True)
class Evaluated:
    """Validation after a step; facts: what judged answers gave, if any were judged."""

    step: int
    loss: float
    canvas_loss: float
    encoder_loss: float
    seconds: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    step: int
    path: Path


@dataclass(frozen=True)
class Answered:
    """Groups of prompts that the model has answered, of `of`; no training step is done yet."""

    groups: int
    of: int
    step: int = 0


Event = Report | Evaluated | Saved | Answered
