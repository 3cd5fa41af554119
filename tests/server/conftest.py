"""A server over a scripted model, for everything but the network itself.

The script stands in for `Runtime.submit`: it answers a prompt with given replies, cut into
blocks, through the real tokenizer, chat template and reply reader.
"""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.prompt import ReplyReader, Tokenizer, load_tokenizer
from mlx_dgemma.server import sampling
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import ServerSettings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@functools.cache
def config() -> ModelConfig:
    return ModelConfig.from_folder(CHECKPOINT)


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT, config().stop_ids)


class Script:
    """Replies in order, then the last one for ever. block: ids per canvas. pause: per step."""

    def __init__(self, *replies: str | Exception, block: int = 8, pause: float = 0.0) -> None:
        self.model = SimpleNamespace(config=config())
        self.tokenizer = tokenizer()
        self.replies = list(replies)
        self.block = block
        self.pause = pause
        self.seen: list[dict[str, Any]] = []
        self.cancelled = threading.Semaphore(0)
        self.closed = False

    def submit(
        self, prompt: Any, deliver: Callable[[Any], None], **options: Any
    ) -> threading.Event:
        self.seen.append({"prompt": prompt, **options})
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        threading.Thread(
            target=self._answer, args=(prompt, reply, deliver, options), daemon=True
        ).start()
        return options["cancel"]

    def take_turns(
        self, steps: Iterable[Any], deliver: Callable[[Any], None], cancel: threading.Event
    ) -> None:
        def work() -> None:
            try:
                for step in steps:
                    deliver(step)
            except Exception as error:
                deliver(error)
            deliver(None)

        threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self.closed = True

    def _answer(
        self, prompt: Any, reply: str | Exception, deliver: Callable[[Any], None], options: Any
    ) -> None:
        try:
            if isinstance(reply, Exception):
                raise reply
            for event in self._events(prompt, reply, options):
                deliver(event)
        except Exception as error:
            deliver(error)
        deliver(None)

    def _events(self, prompt: Any, reply: str, options: Any) -> Iterator[Any]:
        keywords = {k: options[k] for k in ("tools", "enable_thinking") if k in options}
        prompt_ids = encode_prompt(self.tokenizer, prompt, **keywords)
        names = [tool["function"]["name"] for tool in options.get("tools") or ()]
        reader = ReplyReader(self.tokenizer, stop=options.get("stop", ()), tools=names)
        ids = self.tokenizer.encode(reply, special=True)
        limit = options["max_tokens"]
        reason, stopped, given, block = "stop", False, 0, 0
        for start in range(0, min(len(ids), limit), self.block):
            part = ids[start : min(start + self.block, limit)]
            for step in (1, 2):
                time.sleep(self.pause)
                if options["cancel"].is_set():
                    self.cancelled.release()
                    yield self._finish("cancelled", block, given, prompt_ids, options, reader)
                    return
                if options["drafts"]:
                    drafted = np.array(part if step == 2 else part[::-1], np.int32)
                    yield Draft(
                        drafted, self.tokenizer.decode(drafted), np.ones(len(part), bool),
                        np.full(len(part), 0.5 / step, np.float32), step, block,
                    )  # fmt: skip
            got = reader.feed(part)
            given += len(part)
            scores = tuple(-0.25 for _ in part) if options.get("logprobs") else ()
            yield Commit(
                tuple(part), got.text, block, got.thinking, got.tool_calls, got.malformed_calls,
                got.cut_call, scores,
            )  # fmt: skip
            block += 1
            stopped = got.stopped
            if stopped:
                break
        held = reader.finish()
        if not held.empty:
            yield Commit(
                (), held.text, max(block - 1, 0), held.thinking, held.tool_calls,
                held.malformed_calls, held.cut_call,
            )  # fmt: skip
        if len(ids) > limit and not stopped:
            reason = "length"
        yield self._finish(reason, block, given, prompt_ids, options, reader)

    @staticmethod
    def _finish(
        reason: Any,
        blocks: int,
        given: int,
        prompt_ids: list[int],
        options: Any,
        reader: ReplyReader,
    ) -> Finish:
        return Finish(
            reason=reason, seed=options["seed"], blocks=blocks, steps_per_block=(2,) * blocks,
            converged=(True,) * blocks, tokens_per_forward=1.0, prompt_tokens=len(prompt_ids),
            generated_tokens=given, prefill_seconds=0.0, denoise_seconds=0.0,
            peak_memory_bytes=0, stop_string=reader.stop_string,
        )  # fmt: skip


Open = Callable[..., TestClient]


@pytest.fixture
def conversations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages of every chat that the server encodes, in the chat template's form."""
    seen: list[Any] = []
    encode = sampling.encode_messages

    def noting(tokenizer: Tokenizer, messages: Any, **keywords: Any) -> list[int]:
        seen.append(messages)
        return encode(tokenizer, messages, **keywords)

    monkeypatch.setattr(sampling, "encode_messages", noting)
    return seen


@pytest.fixture
def serve() -> Iterator[Open]:
    """serve(script, **settings) -> a client of a running application."""
    clients: list[TestClient] = []

    def open_client(script: Script, **settings: Any) -> TestClient:
        settings = {"prefix_cache_bytes": 0, **settings}
        app = create_app(script, ServerSettings(**settings))
        client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        clients.append(client.__enter__())
        return client

    yield open_client
    for client in clients:
        client.__exit__(None, None, None)


def user(text: Any = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]
