"""A recorded generation run again, to see whether this machine repeats it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from mlx_dgemma.constraints import Constraint, Language
from mlx_dgemma.decoding.blocks import Request
from mlx_dgemma.decoding.events import Commit
from mlx_dgemma.decoding.step import Step
from mlx_dgemma.decoding.trace import Comparison, RecordedDraws, Trace, config_digest
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import language_of, stream_request
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import ReplyReader, Tokenizer
from mlx_dgemma.prompt.media import PreparedPrompt


@dataclass(frozen=True)
class Replay:
    """A trace run again.

    ids: of every committed block. text: theirs, stop strings not looked for. divergence: (block,
    attempt, step) of the first step whose draft or computed positions differ, or that only the
    record or only the replay has; else None.
    """

    ids: tuple[int, ...]
    text: str
    divergence: tuple[int, int, int] | None


def replay(model: Model, tokenizer: Tokenizer, trace: str | Path) -> Replay:
    """Runs a recorded generation again, taking every random number from the file.

    Raises InputError when the file is no trace or belongs to another network.
    """
    record = Trace.load(trace)
    if record.config_digest != config_digest(model.config):
        raise InputError(f"{trace} was recorded with another model: load that one to replay it.")
    comparison, ended = Comparison(record), threading.Event()
    commits: list[Commit] = []

    def end_where_the_record_does() -> None:
        if comparison.over(len(commits)):
            ended.set()

    def observe(step: Step) -> None:
        comparison.observe(step)
        end_where_the_record_does()

    request = Request(
        prompt=record.prompt,
        settings=record.decoding_settings(),
        draws=RecordedDraws(record),
        seed=record.seed,
        stop_ids=tokenizer.stop_ids,
        language=_language(model, tokenizer, record),
        cancel=ended,
        observe=observe,
    )
    end_where_the_record_does()
    for event in stream_request(
        model, tokenizer, request, ReplyReader(tokenizer), PreparedPrompt(record.prompt)
    ):
        if isinstance(event, Commit):
            commits.append(event)
            end_where_the_record_does()
    comparison.close()
    return Replay(
        ids=tuple(token for commit in commits for token in commit.ids),
        text="".join(commit.text for commit in commits),
        divergence=comparison.divergence,
    )


def _language(model: Model, tokenizer: Tokenizer, record: Trace) -> Language | None:
    if record.constraint is None:
        return None
    try:
        return language_of(model, tokenizer, Constraint.from_record(record.constraint))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError("The trace's constraint is none: record it again.") from None
