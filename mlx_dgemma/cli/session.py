"""A command's model: found, checked against this machine, loaded, and the demo announced."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_dgemma.checkpoint.hub import demo_path
from mlx_dgemma.checkpoint.known_repositories import DEMO_NAME
from mlx_dgemma.checkpoint.plan import PLANNED_CONTEXT, Plan, prepare
from mlx_dgemma.cli.arguments import settings
from mlx_dgemma.cli.draft_view import Pieces
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.decoding.draws import check_seed
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.prompt import Tokenizer

DEMO_NOTICE = (
    "Using the bundled demo checkpoint, a miniature that knows its own puzzles and nothing else. "
    "The real model: --model 4bit"
)
DEMO_PACE = 0.25


@dataclass(frozen=True)
class Session:
    """A loaded model with the settings that the flags ask for.

    name: what the user called it. options: the given settings, as keywords of `stream_generate`.
    pace: seconds a step stays on the screen.
    """

    name: str
    model: Model
    tokenizer: Tokenizer
    options: dict[str, Any]
    max_denoising_steps: int
    pace: float

    @property
    def pieces(self) -> Pieces:
        return Pieces(self.tokenizer.decode, self.tokenizer.control_ids)

    def prompt_cache(self, path: str | Path | None = None) -> PromptCache:
        """The context saved at `path`, or an empty one when there is no such file."""
        kv_bits = self.options.get("kv_bits")
        if path is not None and os.path.exists(path):
            return PromptCache.load(path, self.model, kv_bits)
        return PromptCache(self.model, kv_bits)


def prepared(
    arguments: argparse.Namespace, context: int, *, weights: bool = True, progress: bool = False
) -> tuple[Path, Plan]:
    """The folder and the memory plan of the model that the flags name.

    context: tokens that prompt and reply may take. weights: False fetches the small files alone.
    """
    return prepare(
        arguments.model,
        revision=arguments.revision,
        adapter_path=getattr(arguments, "adapter_path", None),
        context_tokens=max(context, PLANNED_CONTEXT),
        kv_bits=arguments.kv_bits,
        dtype=arguments.dtype,
        weights=weights,
        progress=progress,
    )


def open_session(arguments: argparse.Namespace, messages: Console, context: int = 0) -> Session:
    """Finds, checks and loads the model; notices go to `messages` (standard error).

    context: tokens that prompt and reply may take, for the memory plan.
    """
    folder, plan = prepared(arguments, context, progress=messages.is_terminal)
    demo = folder == demo_path()
    config = ModelConfig.from_folder(folder)
    options = settings(arguments)
    # Before the weights are read: a flag out of range should not take a minute.
    if arguments.seed is not None:
        check_seed(arguments.seed)
    decoding = DecodingSettings.from_defaults(config.generation, options)
    name = DEMO_NAME if demo else str(arguments.model)
    if demo:
        messages.print(DEMO_NOTICE, style="dim", highlight=False, soft_wrap=True)
    if plan.advice:
        messages.print(plan.advice, style="dim", highlight=False, soft_wrap=True)
    model, tokenizer = _load(folder, arguments, messages)
    pace = arguments.pace
    if pace is None:
        pace = DEMO_PACE if folder == demo_path() else 0.0
    return Session(name, model, tokenizer, options, decoding.max_denoising_steps, pace)


def _load(
    folder: Path, arguments: argparse.Namespace, messages: Console
) -> tuple[Model, Tokenizer]:
    from mlx_dgemma.checkpoint.loading import load

    options = {
        "adapter_path": arguments.adapter_path,
        "dtype": arguments.dtype,
        "chat_template": arguments.chat_template,
    }
    if not messages.is_terminal:
        return load(folder, **options)
    with messages.status(f"Loading {folder.name}", spinner="dots"):
        return load(folder, **options)
