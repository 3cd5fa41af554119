"""Requests that agents' programs sent, recorded from runs of theirs against this server.

Texts are shortened to what kind they are of; everything else is as it came. The programs are run
by test_agent_runs.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from .client_scripts import rendered
from .conftest import Open, Script
from .test_agent_requests import events

LINES = Path(__file__).with_name("recorded_agents.jsonl").read_text(encoding="utf-8").splitlines()
RECORDED = [json.loads(line) for line in LINES]
SEARCH = "a web search"
COUNTED = "tokens counted"
ANSWERED = [one for one in RECORDED if one["situation"] not in (SEARCH, COUNTED)]
# What the user of each program may be told; everything else is understood.
KNOWN_WARNINGS = (
    "a tool of type web_search was left out",
    "max_tokens was cut to",
    "is document, which this server cannot read",
    "answers a tool call that is not in the conversation",
)


def name(one: dict[str, Any]) -> str:
    return f"{one['program']}: {one['situation']}"


def spoken(path: str, stream: list[dict[str, Any]]) -> str:
    """The text of a stream, in the words of its dialect."""
    if path.endswith("/messages"):
        return "".join(e["delta"].get("text", "") for e in stream if "delta" in e)
    if path.endswith("/responses"):
        return "".join(e["delta"] for e in stream if e["type"] == "response.output_text.delta")
    deltas = [choice["delta"] for chunk in stream for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def warnings(stream: list[dict[str, Any]]) -> list[str]:
    found = [e.get("response", e).get("x_warnings") or [] for e in stream]
    return [warning for some in found for warning in some]


@pytest.mark.parametrize("one", ANSWERED, ids=name)
def test_a_recorded_request_is_answered(serve: Open, one: dict[str, Any]) -> None:
    script = Script("It is done.")
    answer = serve(script, any_model=True).post(one["path"], json=one["body"])
    assert answer.status_code == 200, answer.text
    assert one["body"]["stream"] is True
    stream = events(answer.text)
    assert spoken(one["path"], stream) == "It is done."
    unknown = [w for w in warnings(stream) if not any(known in w for known in KNOWN_WARNINGS)]
    assert unknown == []
    tools = script.seen[0].get("tools")
    assert ("constraint" in script.seen[0]) == bool(tools)  # calls are held to the tools


@pytest.mark.parametrize("one", ANSWERED, ids=name)
def test_a_recorded_conversation_is_whole_for_the_model(serve: Open, one: dict[str, Any]) -> None:
    """Each turn ends before the next begins, and results follow their calls in order."""
    script = Script("It is done.")
    assert serve(script, any_model=True).post(one["path"], json=one["body"]).status_code == 200
    text = rendered(script)
    turns = text.split("<|turn>")
    assert all(turn.endswith("<turn|>\n") for turn in turns[1:-1])
    assert turns[-1].startswith("model\n")
    calls = [part.partition("{")[0] for part in text.split("<|tool_call>call:")[1:]]
    results = [part.partition("{")[0] for part in text.split("<|tool_response>response:")[1:]]
    assert calls == results


def test_results_that_came_out_of_order_stand_by_their_calls(serve: Open) -> None:
    """Claude Code sends what is done first, first; the template knows results by tool alone."""
    (one,) = [one for one in RECORDED if "out of order" in one["situation"]]
    script = Script("It is done.")
    assert serve(script, any_model=True).post(one["path"], json=one["body"]).status_code == 200
    text = rendered(script)
    calls = text.index("cat calc.py"), text.index('command:<|"|>ls')
    shown = text.index("def add(a, b):\n    return a + b<"), text.index('value:<|"|>calc.py<')
    assert calls == tuple(sorted(calls))
    assert shown == tuple(sorted(shown))


def test_claude_codes_search_gets_a_sentence(serve: Open) -> None:
    (one,) = [one for one in RECORDED if one["situation"] == SEARCH]
    answer = serve(Script("x"), any_model=True).post(one["path"], json=one["body"])
    assert answer.status_code == 400
    assert "which this server does not run" in answer.json()["error"]["message"]


def test_claude_codes_count(serve: Open) -> None:
    (one,) = [one for one in RECORDED if one["situation"] == COUNTED]
    answer = serve(Script("x"), any_model=True).post(one["path"], json=one["body"])
    assert answer.json()["input_tokens"] > 0
