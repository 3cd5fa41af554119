"""A reply as a row of segments, thought, text, call, for dialects whose streams open and close
each of them. A block's thought precedes its text, and its text its calls."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

from mlx_dgemma.decoding.events import Commit, Draft
from mlx_dgemma.server.engine import Call, Engine
from mlx_dgemma.server.replies import Reply, interleave

Kind = Literal["thinking", "text", "call"]


@dataclass
class Segment:
    """One stretch. id, name: of a call, whose text is its arguments as JSON."""

    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Step:
    """What happened to a segment: it opened, grew by `delta`, or closed. draft: or none did."""

    change: Literal["open", "grow", "close", "draft"]
    index: int = 0
    segment: Segment | None = None
    delta: str = ""
    draft: Draft | None = None


class Segments:
    """Builds the row from a reply's pieces; each method returns the steps it took."""

    def __init__(self) -> None:
        self.row: list[Segment] = []
        self._open = False

    def words(self, kind: Kind, text: str) -> list[Step]:
        if not text:
            return []
        steps = []
        if not self._open or self.row[-1].kind != kind:
            steps += self.close()
            self.row.append(Segment(kind))
            self._open = True
            steps.append(self._step("open"))
        self.row[-1].text += text
        return [*steps, self._step("grow", text)]

    def call(self, id_: str, name: str, arguments: str) -> list[Step]:
        steps = self.close()
        self.row.append(Segment("call", "", id_, name))
        self._open = True
        steps.append(self._step("open"))
        self.row[-1].text = arguments
        return [*steps, self._step("grow", arguments), *self.close()]

    def close(self) -> list[Step]:
        if not self._open:
            return []
        self._open = False
        return [self._step("close")]

    def _step(self, change: Literal["open", "grow", "close"], delta: str = "") -> Step:
        return Step(change, len(self.row) - 1, self.row[-1], delta)


async def follow(
    engine: Engine, call: Call, reply: Reply, segments: Segments
) -> AsyncGenerator[Step, None]:
    """The steps of one call as they come; `reply` and `segments` are filled on the way."""
    async with contextlib.aclosing(interleave(engine, [call])) as events:
        async for _, event in events:
            calls = reply.add(event)
            if isinstance(event, Draft):
                yield Step("draft", draft=event)
            if not isinstance(event, Commit):
                continue
            for step in segments.words("thinking", event.thinking):
                yield step
            for step in segments.words("text", event.text):
                yield step
            for tool_call in calls:
                arguments = json.dumps(tool_call["arguments"], ensure_ascii=False)
                for step in segments.call(tool_call["id"], tool_call["name"], arguments):
                    yield step
    for step in segments.close():
        yield step
