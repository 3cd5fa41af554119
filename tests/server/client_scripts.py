"""What the tests of client libraries share: scripted replies behind a real server and socket.

The demo model answers its own puzzles alone. Where a client needs particular words, the ids that
the network would commit are scripted; the server, the socket, the prompt and the client are real.
Where a client needs a reply that fits its schema, the demo model gives it.
"""

import base64
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mlx_dgemma.prompt.encode import encode_prompt
from mlx_dgemma.runtime import Runtime
from tests.prompt.drawings import photograph, saved

from .conftest import Script, tokenizer
from .test_clients import running

PICTURE = base64.b64encode(saved(photograph(50, 40))).decode()
PICTURE_URL = f"data:image/png;base64,{PICTURE}"
PLACE = '{"city": "Oslo", "country": "Norway"}'
LONG = "word " * 600  # more than the servers of these tests take
CUT = 'I look.<|tool_call>call:look{q:<|"|>a long question<|"|>}<tool_call|>'
CUT_AT = len(tokenizer().encode(CUT, special=True)) - 6  # inside the call's string


def call(argument: str, text: str = "", name: str = "look") -> str:
    return f'{text}<|tool_call>call:{name}{{q:<|"|>{argument}<|"|>}}<tool_call|>'


def three_rounds() -> Script:
    """Three calls, the second with text before it, then the answer."""
    return Script(call("one"), call("two", "Next."), call("three"), "All done.", block=4)


def rendered(script: Script, index: int = -1) -> str:
    """The prompt of a request as the model reads it."""
    seen = script.seen[index]
    ids = encode_prompt(tokenizer(), seen["prompt"], tools=seen.get("tools"))
    return tokenizer().decode(ids)


def check_three_rounds(script: Script, answers: list[str]) -> None:
    """The fourth prompt holds every call and result in order, in one open turn of the model."""
    assert answers == ["one", "two", "three"]
    assert len(script.seen) == 4
    text = rendered(script)
    turn = text[text.rindex("<|turn>model\n") :]
    assert "<turn|>" not in turn
    spoken = ["", "Next.", ""]
    expected = "".join(
        f'{said}<|tool_call>call:look{{q:<|"|>{q}<|"|>}}<tool_call|>'
        f'<|tool_response>response:look{{value:<|"|>found {q}<|"|>}}<tool_response|>'
        for said, q in zip(spoken, answers, strict=True)
    )
    assert turn == f"<|turn>model\n{expected}"


@contextmanager
def serving(script: Script | Runtime, **settings: Any) -> Iterator[str]:
    """The address of a server that takes prompts of 400 tokens and knows Claude's names."""
    defaults = {"prefix_cache_bytes": 0, "max_prompt_tokens": 400, "any_model": True}
    with ExitStack() as opened:
        yield opened.enter_context(running(script, **{**defaults, **settings}))


def check_held(script: Script, *replies: str) -> None:
    """Each request came with a language, and its scripted reply is one the model may give."""
    assert len(script.seen) == len(replies)
    for seen, reply in zip(script.seen, replies, strict=True):
        automaton = seen["constraint"].automaton
        state = automaton.after(automaton.start, tokenizer().encode(reply, special=True))
        assert automaton.accepting[state]
