"""What every command shares: one-sentence errors, exit codes, and a calm start.

Exit codes: 0 it worked, 2 the user can fix it (one sentence on standard error), 130 Ctrl-C.
A bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, current_thread, main_thread
from types import FrameType
from typing import Any, NoReturn, Protocol

from mlx_dgemma.cli.defaults import apply_defaults
from mlx_dgemma.cli.exit_codes import INTERRUPTED, PIPE_CLOSED, USER_ERROR
from mlx_dgemma.errors import DGemmaError, InputError, UnconvergedWarning

try:
    import termios
except ImportError:  # not a Unix
    termios = None  # type: ignore[assignment]

# What a path can be refused for, wherever it is first looked at.
UNREACHABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)

Body = Callable[[Sequence[str] | None], int]


class Main(Protocol):
    """A console script: its argument defaults to the command line, it returns the exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one sentence, without the usage text above it, and whose
    defaults are the user's own (cli/defaults.py)."""

    _json = False  # whether the complaint is wanted as JSON

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        self._json = "--json" in given
        apply_defaults(self, self.prog.split()[0].rpartition(".")[2], given)
        return super().parse_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        message = f"{self.prog}: {message} (see {self.prog} --help)"
        if self._json:
            _print_json("UsageError", message)
            self.exit(USER_ERROR)
        self.exit(USER_ERROR, message + "\n")


def command(body: Body) -> Main:
    """Makes a function a console script: errors meant for the user become one sentence."""

    @functools.wraps(body)
    def main(argv: Sequence[str] | None = None) -> int:
        # transformers greets every user who has no PyTorch; nothing here needs it.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _open_streams()
        if sys.stdout is None:
            print("error: Standard output is closed: send it somewhere.", file=sys.stderr)
            return USER_ERROR
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UnconvergedWarning)  # of every reply
                warnings.showwarning = _show_warning
                code = body(argv)
            sys.stdout.flush()  # now, while what goes wrong can still be said
            return code
        except DGemmaError as error:
            if "--json" in (sys.argv[1:] if argv is None else argv):
                _print_json(type(error).__name__, str(error))
            else:
                print(f"error: {error}", file=sys.stderr)
            return USER_ERROR
        except (RuntimeError, MemoryError) as error:
            from mlx_dgemma.machine.gpu_failures import explanation  # imports MLX

            told = explanation(error)
            if told is None:
                raise
            print(f"error: {told}", file=sys.stderr)
            return USER_ERROR
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            _discard_output()  # the reader left (`| head`)
            return PIPE_CLOSED
        except OSError as error:
            if error.errno in UNREACHABLE and error.filename is not None:
                print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
                return USER_ERROR
            if error.errno == errno.EIO and error.filename is None:
                _discard_output()
                print("error: The terminal is gone, or a disk cannot be read.", file=sys.stderr)
                return USER_ERROR
            if error.errno != errno.ENOSPC:
                raise
            _discard_output()
            print("error: The disk is full: free some space and run this again.", file=sys.stderr)
            return USER_ERROR

    return main


def _print_json(kind: str, message: str) -> None:
    """The error where the reader of `--json` looks: alone on standard output."""
    print(json.dumps({"error": {"type": kind, "message": message}}, ensure_ascii=False))


def _open_streams() -> None:
    """Where the shell closed standard input (`<&-`) there is nothing to read; where it closed
    standard error, nothing listens; what a terminal's encoding lacks becomes a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One sentence, without the place in the source."""
    print(f"warning: {message}", file=sys.stderr)


def _discard_output() -> None:
    """Keeps the interpreter from complaining at exit of output that nothing takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def stop_on_interrupt() -> Iterator[Event]:
    """Yields the event that the first Ctrl-C (or a request to end) sets; a second interrupts.

    Generation looks at it between denoising steps, so that a run ends with its last committed
    block on the screen and the terminal as it was, instead of a traceback.
    """
    cancel = Event()
    if current_thread() is not main_thread():
        yield cancel
        return

    def request(_number: int, _frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    previous = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield cancel
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keeps what is typed meanwhile from showing up in a drawing; it is read afterwards."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = termios.tcgetattr(keyboard)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def read_stdin() -> str:
    """All of standard input as UTF-8 text; InputError for anything else."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("Standard input is not UTF-8 text.") from error
