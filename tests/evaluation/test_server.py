"""lm-evaluation-harness's own clients, unmodified, against this server with the demo model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness: pip install -e '.[evaluate]'")
pytest.importorskip("aiohttp", reason="lm-eval's clients: pip install 'lm-eval[api]'")
pytest.importorskip("tenacity", reason="lm-eval's clients: pip install 'lm-eval[api]'")
pytest.importorskip("transformers", reason="its tokenizer: pip install -e '.[dev]'")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from mlx_dgemma import Runtime
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.scoring import prompt_scores
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.connections import Server, configure
from mlx_dgemma.server.settings import ServerSettings


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as opened:
        yield opened


@pytest.fixture(scope="module")
def url(runtime: Runtime) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    app = create_app(runtime, ServerSettings())
    server = Server(configure(app), app.state.stop)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def evaluated(kind: str, tasks: Path, name: str, chat: bool, **options: Any) -> Any:
    """lm-eval's evaluator, with its own client of this kind."""
    model = get_model(kind).create_from_arg_obj({"model": "default", **options})
    loaded = TaskManager(include_path=str(tasks), include_defaults=False).load([name])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    return lm_eval.evaluate(model, loaded, apply_chat_template=chat, bootstrap_iters=0)


@pytest.mark.parametrize(("batch", "ids"), [(3, True), (1, False)], ids=["ids", "texts"])
def test_local_completions_scores_multiple_choice(
    url: str, runtime: Runtime, tasks: Path, batch: int, ids: bool
) -> None:
    found = evaluated(
        "local-completions",
        tasks,
        "orders",
        False,
        base_url=f"{url}/completions",
        tokenizer=str(CHECKPOINT),
        tokenized_requests=ids,
        add_bos_token=False,
        batch_size=batch,
        max_retries=1,
    )
    tokenizer = runtime.tokenizer
    for sample in found["samples"]["orders"]:
        for (question, answer), (scored,) in zip(sample["arguments"], sample["resps"], strict=True):
            before = [] if ids else [tokenizer.ids["bos"]]  # a text gets its own
            start = len(before) + len(tokenizer.encode(question))
            tokens = [*before, *tokenizer.encode(question + answer)]
            own = runtime.call(lambda t=tokens: prompt_scores(runtime.model, t, top_logprobs=1))
            assert scored[0] == pytest.approx(float(own.logprobs[start:].sum()), abs=1e-3)
            assert scored[1] == bool((own.top_ids[start:, 0] == tokens[start:]).all())
    assert set(found["results"]["orders"]) >= {"acc,none", "acc_norm,none"}


def test_local_chat_completions_writes_replies(url: str, tasks: Path) -> None:
    found = evaluated(
        "local-chat-completions",
        tasks,
        "letters",
        True,
        base_url=f"{url}/chat/completions",
        max_retries=1,
        num_concurrent=2,
    )
    assert found["results"]["letters"]["exact_match,none"] == 1.0
