"""The flags that commands share, named as mlx-lm names them where it has them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mlx_dgemma._version import __version__
from mlx_dgemma.checkpoint.known_repositories import COMMUNITY
from mlx_dgemma.decoding.settings import PRESETS, settings_by_name
from mlx_dgemma.model.config import DTYPES

# Settings with a flag of the same name, and the preset; None leaves the checkpoint's own value.
SETTINGS = ("preset", *(name for name, known in settings_by_name().items() if known.help))


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"mlx_dgemma {__version__}")


def add_source(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags that say which checkpoint; the group, for more about it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="a checkpoint's folder, a Hugging Face repository, or a short name such as 4bit for "
        f"{COMMUNITY}-4bit (default: MLX_DGEMMA_MODEL, else the bundled demo checkpoint)",
    )
    group.add_argument("--revision", help="branch, tag or commit of the repository")
    return group


def add_model(parser: argparse.ArgumentParser) -> None:
    group = add_source(parser)
    group.add_argument(
        "--adapter-path",
        metavar="FOLDER",
        help="a LoRA adapter of PEFT's or mlx-lm's form, kept beside the weights",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja chat template in the place of the checkpoint's, such as a newer one",
    )
    add_dtype(group)


def add_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what is computed in; float16 suits M1 and M2, which have no bfloat16 of their own "
        "(default: the checkpoint's; float32 without a GPU)",
    )


def add_preset(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="named settings: reference (the checkpoint's own), or balanced or turbo, which "
        "compute less and are not exact (default: reference)",
    )


def add_setting(parser: argparse._ActionsContainer, name: str) -> None:
    """The flag of one decoding setting, as its record describes it."""
    known = settings_by_name()[name]
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        *filter(None, [known.short]),
        type=known.kind,
        choices=known.choices or None,
        metavar=known.metavar,
        help=known.help,
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding (defaults: the checkpoint's generation config)")
    add_preset(group)
    for name in SETTINGS[1:]:
        add_setting(group, name)
    group.add_argument(
        "--seed", type=int, metavar="N", help="repeats a generation (default: drawn and shown)"
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text (repeatable)",
    )


def add_prompting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system-prompt", metavar="TEXT", help="instructions before the prompt")
    parser.add_argument(
        "--enable-thinking", action="store_true", help="let the model think before it answers"
    )
    parser.add_argument(
        "--prompt-cache-file",
        metavar="FILE",
        help="continue from the context in FILE if it is there, and write it back",
    )


def add_display(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("display")
    group.add_argument(
        "--drafts",
        action=argparse.BooleanOptionalAction,
        help="show the canvas while it resolves (default: on a terminal)",
    )
    group.add_argument(
        "--pace",
        type=pace,
        metavar="SECONDS",
        help="show every step at least this long (default: 0.25 for the demo checkpoint, else 0)",
    )


def public_name(model: str) -> str:
    """What a report calls a model: a folder's last name, whose path may name its owner."""
    return Path(model).resolve().name if os.path.exists(model) else model


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def pace(text: str) -> float:
    """A pause between steps: 0 to 10 seconds."""
    value = float(text)
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10 seconds")
    return value


def truth(text: str) -> bool:
    """mlx-lm's spelling of a truth value: True, T, False, F and their like."""
    lowered = text.lower()
    if lowered in ("true", "t", "yes", "y", "1"):
        return True
    if lowered in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The decoding settings that were given."""
    given = {name: getattr(arguments, name) for name in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}
