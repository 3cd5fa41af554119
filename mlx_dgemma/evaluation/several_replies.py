"""Several replies to one prompt: it is read once, and their first canvases are denoised together.

After its first canvas a reply has a context of its own, so the rest of it is denoised alone. A
reply is what `stream_generate` gives for the same seed, to the rounding of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.decoding.blocks import Request, generate_blocks, never_empty
from mlx_dgemma.decoding.canvas import CanvasRequest
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.events import Commit, Finish
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.model import ContextCache, Model
from mlx_dgemma.prompt import ReplyReader, Tokenizer


@dataclass(frozen=True)
class Answer:
    """A whole reply without its thoughts, and its account.

    finish.prefill_seconds and the seconds of the first canvases are shared out evenly.
    """

    text: str
    finish: Finish


def replies(
    model: Model,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    seeds: Sequence[int],
    settings: DecodingSettings,
    *,
    stop: Sequence[str] = (),
    batch: int = 8,
) -> list[Answer]:
    """A reply to the prompt's ids for every seed, `batch` first canvases at a time."""
    cache = model.make_cache(settings.kv_bits)
    started = time.perf_counter()
    with explained():
        model.prefill(list(ids), cache)
    before = cache.snapshot()
    reading = (time.perf_counter() - started) / len(seeds)
    found = []
    for start in range(0, len(seeds), batch):
        some = seeds[start : start + batch]
        started = time.perf_counter()
        firsts = _first_canvases(model, tokenizer, cache, some, settings)
        together = (time.perf_counter() - started) / len(some)
        for seed, first in zip(some, firsts, strict=True):
            cache.restore(before)
            request = Request(
                prompt=(),
                settings=settings,
                draws=SeededDraws(seed),
                seed=seed,
                stop_ids=tokenizer.stop_ids,
                first=first,
            )
            answer = _rest(model, tokenizer, cache, request, stop)
            finish = replace(
                answer.finish,
                prompt_tokens=len(ids),
                prefill_seconds=reading,
                denoise_seconds=answer.finish.denoise_seconds + together,
            )
            found.append(replace(answer, finish=finish))
    return found


def _first_canvases(
    model: Model,
    tokenizer: Tokenizer,
    cache: ContextCache,
    seeds: Sequence[int],
    settings: DecodingSettings,
) -> list[BlockResult]:
    canvases = [CanvasRequest(SeededDraws(seed)) for seed in seeds]
    if settings.empty_reply == "suppress":
        canvases = [never_empty(model.config, one, tokenizer.stop_ids) for one in canvases]
    steps = denoise_block(model, cache, settings, canvases, stop_ids=tokenizer.stop_ids)
    with explained():
        while True:
            try:
                next(steps)
            except StopIteration as ended:
                results: list[BlockResult] = ended.value
                return results


def _rest(
    model: Model,
    tokenizer: Tokenizer,
    cache: ContextCache,
    request: Request,
    stop: Sequence[str],
) -> Answer:
    """The reply after its first canvas."""
    reader, text, stopped = ReplyReader(tokenizer, stop=stop), "", None
    blocks = generate_blocks(model, cache, request)
    with explained():
        while True:
            event = blocks.send(stopped)
            stopped = None
            if isinstance(event, Commit):
                part = reader.feed(event.ids)
                text, stopped = text + part.text, part.stopped or None
            elif isinstance(event, Finish):
                blocks.close()
                finish = replace(event, stop_string=reader.stop_string)
                return Answer(text + reader.finish().text, finish)
