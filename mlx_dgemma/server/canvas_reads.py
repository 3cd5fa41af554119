"""vLLM's read-only form of a chat: one pass over a canvas that the request brings, no reply.

A request says it in `vllm_xargs`; what it gets back are log-probabilities at every position.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from mlx_dgemma.decisions.canvas_read import MOST_LISTED, CanvasForm
from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.server.accepted import Accepts, Bounds
from mlx_dgemma.server.engine import Call, Ended, Engine, Source
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.fields import Fields

_ARGUMENTS = "vllm_xargs"


def accepted(bounds: Bounds) -> dict[str, Accepts]:
    """The fields of a read."""
    id_ = {"type": "integer", "minimum": 0, "maximum": bounds.vocabulary - 1}
    place = {"type": "integer", "minimum": 0, "maximum": bounds.canvas - 1}
    return {
        _ARGUMENTS: Accepts(
            "object",
            inside={
                "diffusion_read_only": Accepts("flag", about="One pass over the canvas, no reply."),
                "diffusion_seed_canvas": Accepts(
                    "list", schema=id_, about="The canvas, an id for each position."
                ),
                "diffusion_canvas_length": Accepts("integer", 1, bounds.canvas),
                "diffusion_max_steps": Accepts("integer", 1, 1),
                "diffusion_pinned": Accepts(
                    "list", schema=place, about="Changes nothing: one pass changes no position."
                ),
                "diffusion_constrained": Accepts(
                    "flag", about="logprob_token_ids alone can stand at a position."
                ),
            },
        ),
        "logprob_token_ids": Accepts(
            "list",
            schema=id_,
            about=f"Listed at each position in place of the likeliest; at most {MOST_LISTED}.",
        ),
        "return_tokens_as_token_ids": Accepts("flag", about="'token_id:5' in place of the text."),
    }


@dataclass(frozen=True)
class CanvasRequest:
    """What a request asks to read; rows and alternatives come with its call."""

    ids: tuple[int, ...]
    among: tuple[int, ...]
    only_among: bool

    @property
    def source(self) -> Source:
        """The read as the events of a reply."""

        async def events(
            engine: Engine, call: Call, deadline: float
        ) -> AsyncGenerator[Draft | Commit | Ended, None]:
            started = time.monotonic()
            form = CanvasForm(
                self.ids,
                vocabulary=engine.runtime.model.config.text.vocab_size,
                rows=min(call.options["max_tokens"], len(self.ids)),
                top=call.options.get("top_logprobs", 0),
                among=self.among,
                only_among=self.only_among,
            )
            found = await engine.read_canvas(call, form, deadline)
            text = engine.tokenizer.decode(found.ids, skip_special=True)
            yield Commit(
                found.ids, text, 0, logprobs=found.logprobs, alternatives=found.alternatives
            )
            finish = _finish(call, len(found.ids), time.monotonic() - started)
            engine.metrics.finished(finish, found.cached_tokens)
            yield Ended(finish, found.cached_tokens, timed_out=False)

        return events


def read_canvas_request(engine: Engine, fields: Fields) -> CanvasRequest | None:
    """The read that a request asks for; None where it wants a reply."""
    listed = _whole_numbers(fields, "logprob_token_ids", len(engine.tokenizer))
    if len(listed) > MOST_LISTED or len(set(listed)) < len(listed):
        raise fields.fail("logprob_token_ids", f"at most {MOST_LISTED} ids, each once")
    asked = fields.object(_ARGUMENTS) or Fields({})
    length = asked.integer("diffusion_canvas_length")
    asked.integer("diffusion_max_steps")
    seed = _whole_numbers(asked, "diffusion_seed_canvas", len(engine.tokenizer))
    pinned = _whole_numbers(asked, "diffusion_pinned", len(seed))
    constrained = asked.flag("diffusion_constrained") or False
    if not asked.flag("diffusion_read_only"):
        given = [name for name in asked.body if str(name).startswith("diffusion_")]
        if seed or pinned or constrained or set(given) - {"diffusion_read_only"}:
            raise asked.fail("diffusion_read_only", "true, or no other diffusion_ field be given")
        if listed:
            raise fields.fail("logprob_token_ids", "given with vllm_xargs.diffusion_read_only")
        return None
    wanted = length or engine.runtime.model.config.canvas_length
    if len(seed) != wanted:
        expected = f"{wanted} token ids, as many as the canvas is long (diffusion_canvas_length)"
        raise asked.fail("diffusion_seed_canvas", expected)
    if constrained and not listed:
        raise fields.fail("logprob_token_ids", "given with diffusion_constrained")
    return CanvasRequest(tuple(seed), tuple(listed), constrained)


def refuse_forms(call: Call) -> None:
    """A read generates nothing, so that nothing can hold it to a form or end it."""
    if call.source is not None or "constraint" in call.options or call.options.get("stop"):
        raise ApiError(
            400,
            "vllm_xargs.diffusion_read_only generates no reply: leave out response_format, "
            "structured_outputs, forced tools and stop.",
            param=_ARGUMENTS,
        )


def _whole_numbers(fields: Fields, name: str, end: int) -> list[int]:
    found: list[Any] = fields.items(name) or []
    if not all(type(number) is int and 0 <= number < end for number in found):
        raise fields.fail(name, f"a list of whole numbers from 0 to {end - 1}")
    return found


def _finish(call: Call, rows: int, seconds: float) -> Finish:
    return Finish(
        reason="stop",
        seed=call.options["seed"],
        blocks=1,
        steps_per_block=(1,),
        converged=(True,),
        tokens_per_forward=float(rows),
        prompt_tokens=len(call.prompt_ids),
        generated_tokens=rows,
        prefill_seconds=0.0,
        denoise_seconds=seconds,
        peak_memory_bytes=0,
    )
