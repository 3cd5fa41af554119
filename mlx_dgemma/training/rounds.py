"""Rounds of few-steps training: answers of the model as it is by now, then steps on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.kernels.dispatch import twins_only
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.training.data import Example, Trail
from mlx_dgemma.training.forward import Passes
from mlx_dgemma.training.run_events import Answered
from mlx_dgemma.training.sampled_answers import Answers, Asker
from mlx_dgemma.training.settings import Settings

ANSWERS = "answers-{}-{}.safetensors"  # a split's, of a round

Judge = Callable[[Example, np.ndarray], bool]  # of a prompt and the ids that answer it


class Rounds:
    """Lets a model answer prompts, at the beginning of each round.

    judge: whether an answer may be learned; all may where there is none.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        keep: bool,
        judge: Judge | None = None,
    ) -> None:
        self._settings, self._keep = settings, keep
        self._asker = Asker(
            Passes(model),
            DecodingSettings.from_defaults(model.config.generation, {}),
            settings.entropy_bound,
            frozenset(tokenizer.stop_ids),
            settings.max_seq_length,
            judge,
        )

    def answers(
        self,
        split: str,
        prompts: Sequence[Example],
        number: int,
        show: Callable[[Answered], None],
        *,
        cancelled: Callable[[], bool],
    ) -> list[Trail] | None:
        """What round `number` learns from: the reference's answers of the untrained model, to keep
        what it says, and those that it gives as it is; read from their files, or made. None when
        cancelled."""
        kept = self._made(split, prompts, None, show, cancelled)
        own = None if kept is None else self._made(split, prompts, number, show, cancelled)
        return None if kept is None or own is None else kept + own

    def _made(
        self,
        split: str,
        prompts: Sequence[Example],
        number: int | None,
        show: Callable[[Answered], None],
        cancelled: Callable[[], bool],
    ) -> list[Trail] | None:
        settings = self._settings
        name = "reference" if number is None else str(number)
        answers = Answers(
            Path(settings.adapter_path) / ANSWERS.format(split, name),
            json.dumps({**settings.identity, "split": split, "round": name}, sort_keys=True),
            self._asker.passes.model.config.canvas_length,
            keep=self._keep,
        )
        with twins_only():
            done = answers.ask(
                self._asker, prompts, settings.answers_per_prompt, settings.batch_size,
                (settings.seed, 0 if number is None else number + 1), show,
                cancelled=cancelled, own=number is not None,
                step=settings.first_step(number or 0),
            )  # fmt: skip
        return answers.trails(prompts) if done else None


def begun(folder: Path) -> bool:
    """Whether a run has answers to go on from."""
    return any(folder.glob(ANSWERS.format("*", "*")))
