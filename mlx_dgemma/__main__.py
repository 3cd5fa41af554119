"""`mlx_dgemma VERB` and `mlx_dgemma.VERB`: hand the rest of the line to the verb's own command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from threading import Event
from types import FrameType

from mlx_dgemma._version import __version__
from mlx_dgemma.cli.exit_codes import INTERRUPTED, USER_ERROR
from mlx_dgemma.cli.verbs import SHARED, VERBS


def usage() -> str:
    lines = "\n".join(f"  {verb:<12}{about}" for verb, about in VERBS.items())
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
    """Imports and runs one command.

    Ctrl-C ends it with 130, whatever it is at: while it imports at once, and later also where an
    import that is under way makes another error of it, as MLX's does.
    """
    interrupted = Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    try:
        with (
            _on_interrupt(lambda *_: os._exit(INTERRUPTED), afterwards_too=argv is None),
            _together(verb),
        ):
            command = import_module(f"mlx_dgemma.cli.{verb}").main
            with _on_interrupt(interrupt):
                return int(command(argv))
    except BaseException as error:
        if interrupted.is_set() or isinstance(error, KeyboardInterrupt):
            return INTERRUPTED
        raise


@contextmanager
def _together(verb: str) -> Iterator[None]:
    """Where `mlx.launch` started several processes for a command that computes with one model,
    rank 0 alone comes through: the others serve it, and end with it."""
    if verb not in SHARED or not (os.environ.keys() & {"MLX_RANK", "OMPI_COMM_WORLD_SIZE"}):
        yield
        return
    from mlx_dgemma.cli.ranks import together

    with together():
        yield


@contextmanager
def _on_interrupt(
    handler: Callable[[int, FrameType | None], object], *, afterwards_too: bool = False
) -> Iterator[None]:
    """Ctrl-C calls `handler`; afterwards too, while the interpreter ends, where this is all that
    the process does."""
    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    finally:
        if not afterwards_too:
            signal.signal(signal.SIGINT, before)


(
    generate,
    chat,
    infill,
    decide,
    lora,
    fuse,
    convert,
    server,
    benchmark,
    evaluate,
    doctor,
    models,
    completion,
) = (partial(launch, verb) for verb in VERBS)


if __name__ == "__main__":
    sys.exit(main())
