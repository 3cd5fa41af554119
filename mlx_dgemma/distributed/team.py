"""The processes of one model: rank 0 leads, the others do what it asks.

Rank 0 alone decides: it runs the loop, samples, and answers; the others hold their part of the
weights and of every context, and compute what a message asks for. So nothing that a rank finds
(a tie that rounds otherwise on another chip) can make two ranks go different ways, and a cancelled
request is one about which no more is asked.

A process that is gone, or silent for `SILENCE` seconds, ends them all with a sentence of rank 0:
nobody can be called back from a collective that waits for it.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import mlx.core as mx

from mlx_dgemma.distributed.channel import BEAT, Channel, LostError, Message
from mlx_dgemma.errors import ResourceError

SILENCE = 8.0  # seconds after which a silent process counts as lost
_BETWEEN_BEATS = 1.0
_LEAVING = 3.0  # seconds that a process has to end by itself once it was asked to
FAILED = 2  # exit code
_COLLECTIVES = re.compile(r"\[(ring|jaccl|mpi)\]|peer")


class Team:
    """One process' view. group: MLX's. sums: how many times a layer's activations were summed over
    all ranks; collectives, nbytes: how many there were of every kind, and the bytes of their
    arrays, since the start.

    unequal: the processes run on different chips, whose roundings may differ.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.unequal = False
        self.sums = 0
        self.collectives = 0
        self.nbytes = 0
        self._last: mx.array | None = None

    def sum(self, *arrays: mx.array) -> tuple[mx.array, ...]:
        """Each array [T, H] summed over all ranks, in one collective."""
        joined = arrays[0] if len(arrays) == 1 else mx.stack(list(arrays))
        self.sums += 1
        total = self._in_turn(mx.distributed.all_sum, joined)
        return (total,) if len(arrays) == 1 else tuple(total[i] for i in range(len(arrays)))

    def share(self, x: mx.array) -> mx.array:
        """Rank 0's x, on every rank bit for bit; the others give an array of its shape and dtype,
        which is not computed."""
        own = x if self.rank == 0 else mx.zeros(x.shape, x.dtype)
        return self._in_turn(mx.distributed.all_sum, own)

    def gather(self, x: mx.array) -> mx.array:
        """[ranks, ...]: everybody's x, of one shape."""
        return self._in_turn(mx.distributed.all_gather, x[None])

    def _in_turn(self, collective: Callable[..., mx.array], x: mx.array) -> mx.array:
        """The collective of x, after the one before it: all ranks must run them in one order, and
        MLX keeps to none where neither needs the other's result."""
        self.collectives += 1
        self.nbytes += x.nbytes
        if self._last is not None:
            x = mx.depends([x], [self._last])[0]
        self._last = collective(x, group=self.group)
        return self._last


class Leader(Team):
    """Rank 0's view.

    announce: how a sentence reaches the user when all processes end for it.
    """

    def __init__(
        self,
        group: mx.distributed.Group,
        channels: dict[int, Channel],
        names: dict[int, str],
        processes: dict[int, int],
    ) -> None:
        """channels, names: by rank, to the other processes and of their machines. processes: ids
        of those on this machine."""
        super().__init__(group)
        self.announce: Callable[[str], object] = _print_error
        self._channels, self._names, self._processes = channels, names, processes
        self._replies: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._later: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._asking = False
        self._ended = threading.Event()
        self._failing = threading.Lock()
        for rank, channel in channels.items():
            threading.Thread(target=self._listen, args=(rank, channel), daemon=True).start()
        threading.Thread(target=_beat, args=(list(channels.values()),), daemon=True).start()
        self._shown = sys.excepthook
        sys.excepthook = self._show  # of a program that uses the model in Python

    def tell(self, op: str, payload: bytes = b"", *, to: int | None = None, **fields: Any) -> None:
        """Asks all others, or the rank `to`, for something that has no answer but what collectives
        carry."""
        while not self._later.empty():
            with suppress(queue.Empty):
                self._send(None, **self._later.get_nowait())
        self._send(to, op, payload, **fields)

    def later(self, op: str, **fields: Any) -> None:
        """The same together with the next message; from any thread, such as the garbage
        collector's."""
        self._later.put({"op": op, **fields})

    def ask(self, op: str, payload: bytes = b"", **fields: Any) -> dict[int, Message]:
        """The answers of all others, by rank. Raises ResourceError with the sentence of the first
        that cannot do it, which names the rank."""
        self._asking = True
        try:
            self.tell(op, payload, **fields)
            found: dict[int, Message] = {}
            while len(found) < len(self._channels):
                rank, message = self._replies.get()
                found[rank] = message
            for rank, message in sorted(found.items()):
                if message.op == "failed":
                    raise ResourceError(f"{self.name(rank)}: {message.fields['why']}")
            return found
        finally:
            self._asking = False

    def name(self, rank: int) -> str:
        """ "Rank 1 (studio.local)" """
        return f"Rank {rank} ({self._names[rank]})"

    def end(self) -> None:
        """The work is done: the other processes end, and this one goes on alone."""
        if self._ended.is_set():
            return
        self._ended.set()
        for channel in self._channels.values():
            with suppress(LostError):
                channel.send("end", at_once=False)

    def fail(self, why: str) -> NoReturn:
        """Says why in one sentence and ends all processes, this one included."""
        with self._failing:  # the first to come here ends the process; others wait for that
            self._ended.set()
            with suppress(OSError):  # what MLX's threads still say of their sockets
                errors = os.dup(2)
                sys.stderr = os.fdopen(errors, "w", buffering=1)  # so it is said at once
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            self.announce(why)
            for rank, channel in self._channels.items():
                self._end_here(rank)
                channel.last_word("end", at_once=True)
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(FAILED)

    def wait_for_verdict(self, error: BaseException) -> None:
        """After an error of MLX's collectives: who is missing is known within `SILENCE`, and is the
        better sentence. Returns where nobody is, and for any other error."""
        if not _is_of_collectives(error):
            return
        time.sleep(_BETWEEN_BEATS)
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            now = time.monotonic()
            if all(now - channel.heard < 2 * _BETWEEN_BEATS for channel in self._channels.values()):
                return
            time.sleep(_BETWEEN_BEATS / 4)

    def _show(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.wait_for_verdict(error)
        self._shown(kind, error, trace)

    def _send(self, to: int | None, op: str, payload: bytes = b"", **fields: Any) -> None:
        for rank, channel in self._channels.items():
            if to not in (None, rank):
                continue
            try:
                channel.send(op, payload, **fields)
            except LostError:
                self._lost(rank, "the connection ended")

    def _listen(self, rank: int, channel: Channel) -> None:
        while True:
            try:
                message = channel.receive(SILENCE)
            except LostError as error:
                self._lost(rank, str(error))
                return
            if message.op == "failed" and not self._asking:
                self.fail(f"{self.name(rank)}: {message.fields['why']}")
            self._replies.put((rank, message))

    def _lost(self, rank: int, why: str) -> None:
        if not self._ended.is_set():
            how = "ended" if "ended" in why or "reset" in why.lower() else "does not answer"
            self.fail(f"{self.name(rank)} {how}: see what its machine says, and start all again.")

    def _end_here(self, rank: int) -> None:
        """A process of this machine that hears nothing any more is ended by its id."""
        process = self._processes.get(rank)
        if process is not None and time.monotonic() - self._channels[rank].heard > SILENCE / 2:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)


class Follower(Team):
    """The view of every other rank."""

    def __init__(self, group: mx.distributed.Group, channel: Channel) -> None:
        super().__init__(group)
        self._channel = channel
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=_beat, args=([channel],), daemon=True).start()

    def messages(self) -> Iterator[Message]:
        """What rank 0 asks for, one thing after the other, until it ends."""
        while (message := self._messages.get()) is not None:
            yield message

    @property
    def idle(self) -> bool:
        """Whether nothing more was asked for yet."""
        return self._messages.empty()

    def answer(self, payload: bytes = b"", **fields: Any) -> None:
        with suppress(LostError):  # then `_listen` ends this process
            self._channel.send("answer", payload, **fields)

    def wait_for_verdict(self, error: BaseException) -> None:
        """After an error of MLX's collectives: rank 0 knows who is missing, and ends this process.
        Returns where nobody is, and for any other error."""
        if _is_of_collectives(error):
            time.sleep(SILENCE)

    def refuse(self, why: str) -> None:
        """Answers that this process cannot do what was asked, and why; it goes on."""
        with suppress(LostError):
            self._channel.send("failed", why=why)

    def fail(self, why: str) -> NoReturn:
        """Tells rank 0 that this process cannot go on, and why, and ends it."""
        self.refuse(why)
        time.sleep(_LEAVING)  # rank 0 ends this process, once it has said so
        os._exit(FAILED)

    def _listen(self) -> None:
        while True:
            try:
                message = self._channel.receive(SILENCE)
            except LostError:
                os._exit(FAILED)  # rank 0 says why, where it still can
            if message.op == "end":
                if not message.fields["at_once"]:
                    self._messages.put(None)
                    time.sleep(_LEAVING)  # the main thread may be in a collective for ever
                os._exit(0)
            self._messages.put(message)


def _is_of_collectives(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(_COLLECTIVES.search(str(error)))


def _beat(channels: list[Channel]) -> None:
    while True:
        for channel in channels:
            with suppress(LostError):
                channel.send(BEAT)
        time.sleep(_BETWEEN_BEATS)


def _print_error(why: str) -> None:
    with suppress(Exception):
        # A drawing under way hides the cursor; MLX's threads may have left half a line.
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{cursor}\nerror: {why}", file=sys.stderr)


def machine_name() -> str:
    return socket.gethostname()
