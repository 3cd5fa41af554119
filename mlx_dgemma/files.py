"""Opening files that anyone may have put there, and replacing files whole.

A pipe, a device or a socket under a file's name would block, never end, or fail in a library
without a word: nothing but a regular file is opened.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.untrusted_json import DEFAULT, Limits, UntrustedJSONError, parse, printable

T = TypeVar("T")

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_LONGEST_NAME = 255  # bytes, of most file systems

# Names of descriptors that the process was started with.
_MARK = "\ufeff"
_OPENED = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def open_regular(path: str | Path) -> io.BufferedReader:
    """A regular file, opened for reading; never waits for a pipe's writer.

    Raises OSError whose strerror says what is wrong, also for what is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the name
        raise OSError(None, str(error)) from error
    except OSError:
        kind = _kind(os.stat(path).st_mode)  # a socket cannot even be opened
        if kind is None:
            raise
        raise OSError(None, f"it is {kind}, not a file") from None
    kind = _kind(os.fstat(descriptor).st_mode)
    if kind is not None:
        os.close(descriptor)
        raise OSError(None, f"it is {kind}, not a file")
    return io.BufferedReader(_Regular(descriptor))


class _Regular(io.FileIO):
    """A file whose data is there: one of the kernel's that would have to be waited for is none."""

    def readinto(self, buffer: Any, /) -> int:
        count: int | None = super().readinto(buffer)
        return _there(count)

    def readall(self) -> bytes:
        content: bytes | None = super().readall()
        return _there(content)


def _there(got: T | None) -> T:
    if got is None:
        raise OSError(None, "it has no data yet")
    return got


def _kind(mode: int) -> str | None:
    """What a file's mode says it is, where that is no regular file."""
    return next((name for test, name in _KINDS if test(mode)), None)


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; OSError as from `open_regular`."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(None, f"it is larger than {most:,} bytes")
    return content


def read_text(path: str | Path, most: int = 16 << 20) -> str:
    """The content as UTF-8 text; OSError as from `read_bytes`, also for other encodings."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(None, f"it is not UTF-8 text (byte {error.start:,})") from error


def read_argument(path: str | Path, what: str = "", most: int = 16 << 20) -> str:
    """The text of a file that a command line names; InputError that says what to do instead.

    What the shell has opened already, `/dev/stdin` and `<(command)`, is read to its end. A byte
    order mark, which editors on Windows write, is left out. most: bytes. what: the kind of file,
    for the message.
    """
    try:
        if not str(path).startswith(_OPENED):
            return read_text(path, most).removeprefix(_MARK)
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise OSError(None, f"it is larger than {most:,} bytes")
        return content.decode("utf-8").removeprefix(_MARK)
    except OSError as error:
        the = f"the {what} " if what else ""
        raise InputError(f"Cannot read {the}{path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        the = f"The {what} " if what else ""
        raise InputError(f"{the}{path} is not UTF-8 text.") from error


def read_json(path: str | Path, limits: Limits = DEFAULT) -> Any:
    """The value of a JSON file; CheckpointError when it cannot be read, parsed or is too much."""
    try:
        return parse(read_bytes(path, limits.size), limits)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UntrustedJSONError as error:
        raise CheckpointError(f"{path} {error}; download it again.") from error


@contextmanager
def reading_weights(source: str | Path) -> Iterator[None]:
    """MLX's error, where a file of weights that it reads late is cut short or its disk is gone, as
    CheckpointError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("[read]"):
            raise
        raise CheckpointError(
            f"{source}: the weights can no longer be read; were the files cut short, or is their "
            "disk gone?"
        ) from error


@contextmanager
def replacing(path: Path, suffix: str = ".part", *, sync: bool = False) -> Iterator[Path]:
    """The name of a file beside `path` to write, which then replaces `path` whole.

    After an exception it is gone and `path` as it was. suffix: of its name. sync: its bytes are on
    the disk before it has the name.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{suffix}")
    try:
        yield beside
        if sync:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` replaced where there is such a user."""
    return Path(os.path.expanduser(path))


def is_plain(name: str) -> bool:
    """Whether a name that stands in a file may be one of a file beside it."""
    short = len(name.encode("utf-8", "replace")) <= _LONGEST_NAME
    return short and Path(name).name == name and name.isprintable()


def check_name(path: str | Path) -> None:
    """Refuses what no file can be called: a name too long, a null character, a loop of links."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # Which is also said of a name too long in a folder that is not there.
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(path).parts):
            name = printable(str(path))
            raise InputError(f"{name} cannot be written: File name too long.") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(str(path))} cannot be written: {why}.") from error


def check_replaceable(path: str | Path) -> None:
    """Refuses what the rename would replace by a file: a folder, a device, a pipe."""
    check_name(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no regular file and must not be replaced: name another.")


def check_writable(path: str | Path, flag: str) -> None:
    """Refuses a file that cannot be written whole, before the work whose result it is to hold.

    flag: what names it on the command line.
    """
    folder = Path(path).absolute().parent
    refused = f"{flag} {printable(str(path))} cannot be written:"
    try:
        if not folder.is_dir():
            raise InputError(f"{refused} there is no folder {printable(str(folder))}.")
        if Path(path).is_dir():
            raise InputError(f"{refused} it is a folder.")
    except OSError as error:  # a name too long, say
        raise InputError(f"{refused} {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{refused} {printable(str(folder))} is read-only.")
    check_replaceable(path)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all. Raises InputError for what is no regular file,
    ResourceError where it cannot be written."""
    check_replaceable(path)
    try:
        with replacing(Path(path)) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        name = printable(str(path))
        raise ResourceError(f"{name} cannot be written: {error.strerror}.") from error
