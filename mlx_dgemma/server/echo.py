"""A prompt at the beginning of its own completion (`echo`), with its scores where they are wanted;
and completions of no token at all, which only ask for those."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from mlx_dgemma.decoding.events import Commit, Draft, Finish, listed
from mlx_dgemma.server.engine import Call, Ended, Engine, Source
from mlx_dgemma.server.replies import FIRST_BLOCK


@dataclass(frozen=True)
class Echo:
    """What comes before the reply: the prompt's text as a first commit.

    hidden: ids at the prompt's beginning that are no part of the text, such as the bos that every
    text gets. alternatives: score the tokens and list so many likely ones; None scores none.
    """

    text: str
    hidden: int
    alternatives: int | None

    async def commit(self, engine: Engine, call: Call, deadline: float) -> Commit:
        if self.alternatives is None:
            return Commit(ids=(), text=self.text, block=FIRST_BLOCK - 1)
        found = await engine.score(call.prompt_ids, self.alternatives, deadline)
        return Commit(
            ids=tuple(call.prompt_ids[self.hidden :]),
            text=self.text,
            block=FIRST_BLOCK - 1,
            logprobs=tuple(found.logprobs[self.hidden :].tolist()),
            alternatives=listed(found, len(call.prompt_ids))[self.hidden :],
        )


def beginning_with(echo: Echo | None, then: Source | None) -> Source:
    """The echo, if there is one, and the events of `then`; None generates nothing."""

    async def source(
        engine: Engine, call: Call, deadline: float
    ) -> AsyncGenerator[Draft | Commit | Ended, None]:
        started = time.monotonic()
        if echo is not None:
            yield await echo.commit(engine, call, deadline)
        if then is None:
            finish = _nothing_generated(call, time.monotonic() - started)
            engine.metrics.finished(finish, 0)
            yield Ended(finish, cached_tokens=0, timed_out=False)
            return
        async with contextlib.aclosing(then(engine, call, deadline)) as events:
            async for event in events:
                yield event

    return source


def _nothing_generated(call: Call, seconds: float) -> Finish:
    return Finish(
        reason="length",
        seed=call.options["seed"],
        blocks=0,
        steps_per_block=(),
        converged=(),
        tokens_per_forward=0.0,
        prompt_tokens=len(call.prompt_ids),
        generated_tokens=0,
        prefill_seconds=seconds,
        denoise_seconds=0.0,
        peak_memory_bytes=0,
    )
