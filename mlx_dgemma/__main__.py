"""`mlx_dgemma VERB` and `mlx_dgemma.VERB`: hand the rest of the line to the verb's own command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from mlx_dgemma._version import __version__
from mlx_dgemma.cli.exit_codes import INTERRUPTED, USER_ERROR

VERBS = {
    "generate": "one prompt, one reply, and the canvas while it resolves",
    "chat": "a conversation in the terminal",
    "infill": "fill the holes of a text, or rewrite parts of it",
    "decide": "answers to yes-or-no, choice and score questions, from one pass",
    "lora": "fine-tune a checkpoint on conversations of your own",
    "convert": "a checkpoint to another layout or precision",
    "server": "an OpenAI- and Anthropic-compatible endpoint on this machine",
    "benchmark": "time, memory and quality of a model on this machine",
    "doctor": "this machine: memory, what fits, kernels",
}


def usage() -> str:
    lines = "\n".join(f"  {verb:<11}{about}" for verb, about in VERBS.items())
    return f"usage: mlx_dgemma VERB [options]\n\n{lines}\n\nmlx_dgemma VERB --help tells more.\n"


def main(argv: Sequence[str] | None = None) -> int:
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("--help", "-h"):
        print(usage(), end="")
        return 0
    if verb == "--version":
        print(f"mlx_dgemma {__version__}")
        return 0
    if verb not in VERBS:
        print(f"mlx_dgemma: no verb {verb!r}; the verbs are {', '.join(VERBS)}", file=sys.stderr)
        return USER_ERROR
    return launch(verb, rest)


def launch(verb: str, argv: Sequence[str] | None = None) -> int:
    """Imports and runs one command; Ctrl-C while it imports, half a second, ends it too."""
    try:
        with _left_on_interrupt():
            command = import_module(f"mlx_dgemma.cli.{verb}").main
    except KeyboardInterrupt:
        return INTERRUPTED
    return int(command(argv))


@contextmanager
def _left_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once: raised inside MLX's import, it would come out as an
    ImportError."""
    try:
        before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


generate, chat, infill, decide, lora, convert, server, benchmark, doctor = (
    partial(launch, verb) for verb in VERBS
)


if __name__ == "__main__":
    sys.exit(main())
