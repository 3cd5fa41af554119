"""Token ids that the vocabulary has not, at every door: refused before they reach a gather, which
would read foreign memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_dgemma import generate, load, stream_generate
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.decoding.canvas import CanvasRequest, Pins, Start
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.replaying import replay
from mlx_dgemma.scoring import continuation_scores, prompt_score_turns

FOREIGN = (-1, -(2**31), 2**31 - 1, 2**31, 2**63, 2**64)
SIZE = 896  # of the demo's vocabulary
Demo = tuple[Any, Any]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load()


def _trace(demo: Demo, id_: int) -> Any:
    path = Path("trace.json")
    if not path.exists():
        generate(*demo, "Hi", max_tokens=4, seed=1, trace=path)
    told = json.loads(path.read_text())
    told["prompt"][1] = id_
    path.write_text(json.dumps(told))
    return replay(*demo, path)


def _canvas(pins: Pins | None = None, start: Start | None = None, **held: Any) -> Any:
    draws = SeededDraws(1)
    return CanvasRequest(draws, pins, start, **held).initial(Place(0, 0, 0), 3, SIZE)


DOORS: dict[str, Callable[[Demo, int], Any]] = {
    "prompt": lambda demo, id_: generate(*demo, [2, id_, 5], max_tokens=4),
    "streamed prompt": lambda demo, id_: list(stream_generate(*demo, [id_], max_tokens=4)),
    "cached prompt": lambda demo, id_: generate(
        *demo, [2, id_], max_tokens=4, cache=PromptCache(demo[0])
    ),
    "prefill": lambda demo, id_: demo[0].prefill([2, id_], PromptCache(demo[0]).cache),
    "scores": lambda demo, id_: list(prompt_score_turns(demo[0], [2, id_, 5], top_logprobs=1)),
    "last score": lambda demo, id_: list(prompt_score_turns(demo[0], [2, 5, id_])),
    "context": lambda demo, id_: continuation_scores(demo[0], [2, id_], [[5]]),
    "continuation": lambda demo, id_: continuation_scores(demo[0], [2, 5], [[5], [6, id_]]),
    "trace": _trace,
    "pins": lambda demo, id_: _canvas(Pins.from_template([None, id_, None])),
    "draft": lambda demo, id_: _canvas(start=Start(np.array([1, id_, 3]), 0.5)),
    "allowed": lambda demo, id_: _canvas(allowed={1: np.array([4, id_])}),
}


@pytest.mark.parametrize("door", DOORS)
def test_an_id_outside_the_vocabulary_is_refused(
    door: str, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo[0].config.text.vocab_size == SIZE
    for id_ in (*FOREIGN, SIZE):
        with pytest.raises(DGemmaError) as raised:
            DOORS[door](demo, id_)
        assert str(raised.value).endswith("."), (id_, raised.value)
