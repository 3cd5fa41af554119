"""Gathers a call's events into a reply, and tells how it ended in the dialects' words."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_dgemma.decoding.events import Alternatives, Commit, Draft
from mlx_dgemma.server.admission import shutting_down
from mlx_dgemma.server.engine import Call, Ended, Engine

FIRST_BLOCK = 0  # an echoed prompt stands before it


class Scored(NamedTuple):
    """A token, its log-probability (nats; NaN where none is known), and the likeliest tokens there,
    if they were asked for. of_prompt: whether it is of an echoed prompt, not of the reply."""

    id: int
    logprob: float
    alternatives: Alternatives
    of_prompt: bool = False


def scored(event: Commit) -> list[Scored]:
    """What a Commit says of its ids; nothing where they were not scored."""
    alternatives = event.alternatives or ((),) * len(event.logprobs)
    listed = zip(event.ids, event.logprobs, alternatives, strict=False)
    return [Scored(*one, event.block < FIRST_BLOCK) for one in listed]


@dataclass
class Reply:
    """Everything one call has produced so far. one_call: tool calls after the first are dropped,
    with a warning."""

    one_call: bool = False
    text: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    malformed_calls: list[str] = field(default_factory=list)
    logprobs: list[Scored] = field(default_factory=list)
    dropped_calls: int = 0
    cut_call: str = ""
    ended: Ended | None = None

    def add(self, event: Draft | Commit | Ended) -> list[dict[str, Any]]:
        """Takes an event in; returns the tool calls it completed, each with an id of its own."""
        if isinstance(event, Ended):
            self.ended = event
            return []
        if isinstance(event, Draft):
            return []
        self.text += event.text
        self.thinking += event.thinking
        self.malformed_calls += event.malformed_calls
        self.cut_call += event.cut_call
        self.logprobs += scored(event)
        calls = [{"id": new_id("call"), **call} for call in event.tool_calls]
        if self.one_call:
            wanted = calls[: 0 if self.tool_calls else 1]
            self.dropped_calls += len(calls) - len(wanted)
            calls = wanted
        self.tool_calls += calls
        return calls

    @property
    def end(self) -> Ended:
        if self.ended is None:
            raise shutting_down()
        return self.ended

    @property
    def whole(self) -> bool:
        """Whether the reply ended by itself, and not inside a call."""
        return self.end.finish.reason == "stop" and not self.cut_call

    @property
    def openai_reason(self) -> str:
        if self.whole:
            return "tool_calls" if self.tool_calls else "stop"
        return "length"

    def warnings(self) -> list[str]:
        """What a client should know of how this reply came about."""
        found = list(self.end.notes)
        finish = self.end.finish
        unconverged = [i for i, converged in enumerate(finish.converged) if not converged]
        if unconverged:
            found.append(
                f"{len(unconverged)} of {finish.blocks} blocks used every denoising step without "
                "converging; raise max_denoising_steps if the text is poor"
            )
        if self.dropped_calls:
            found.append(f"tool calls left out after the first: {self.dropped_calls}")
        if self.cut_call:
            found.append("the reply ended inside a tool call, which was left out")
        if self.malformed_calls:
            found.append("a malformed tool call was returned as content")
        if self.end.timed_out:
            found.append("the server's time limit ended this reply")
        return found

    def facts(self) -> dict[str, Any]:
        """How the canvas resolved, for the `x_diffusion` field."""
        finish = self.end.finish
        return {
            "seed": finish.seed,
            "blocks": finish.blocks,
            "steps_per_block": list(finish.steps_per_block),
            "converged": list(finish.converged),
            "tokens_per_forward": round(finish.tokens_per_forward, 4),
            "prefill_seconds": round(finish.prefill_seconds, 4),
            "denoise_seconds": round(finish.denoise_seconds, 4),
        }


async def collect(engine: Engine, calls: Sequence[Call], *, one_call: bool = False) -> list[Reply]:
    """All replies, whole."""

    async def one(call: Call) -> Reply:
        reply = Reply(one_call=one_call)
        async with contextlib.aclosing(engine.run(call)) as events:
            async for event in events:
                reply.add(event)
        return reply

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(call)) for call in calls]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def interleave(
    engine: Engine, calls: Sequence[Call]
) -> AsyncGenerator[tuple[int, Draft | Commit | Ended], None]:
    """(index of the call, event) of several calls as they come."""
    arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def forward(index: int, call: Call) -> None:
        try:
            async with contextlib.aclosing(engine.run(call)) as events:
                async for event in events:
                    arrived.put_nowait((index, event))
        except Exception as error:
            arrived.put_nowait((index, error))
        else:
            arrived.put_nowait((index, None))

    tasks = [asyncio.create_task(forward(i, call)) for i, call in enumerate(calls)]
    try:
        open_calls = len(calls)
        while open_calls:
            index, event = await arrived.get()
            if event is None:
                open_calls -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def new_id(prefix: str, separator: str = "_") -> str:
    return f"{prefix}{separator}{secrets.token_hex(12)}"
