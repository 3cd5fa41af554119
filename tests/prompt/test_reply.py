"""Replies as a reader gets them: stop strings at any block edge, calls and their failures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.reply import ReplyReader, StopStrings
from mlx_dgemma.prompt.tokenizer import Tokenizer

CALL = "<|tool_call>call:f{a:1}<tool_call|>"


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_the_cut(text: str, strings: list[str]) -> None:
    whole = StopStrings(strings)
    expected = whole.feed(text) + ("" if whole.met else whole.finish())
    assert not any(string in expected for string in strings)
    for size in (1, 2, 3):
        pieces = StopStrings(strings)
        fed = "".join(pieces.feed(text[i : i + size]) for i in range(0, len(text), size))
        assert fed + ("" if pieces.met else pieces.finish()) == expected
        assert pieces.met == whole.met


def test_a_stop_string_ends_the_answer_and_is_named(demo: Tokenizer) -> None:
    reader = ReplyReader(demo, stop=["END", "zz"])
    ids = demo.encode("one EN"), demo.encode("D two")
    first, second = (reader.feed(part) for part in ids)
    assert (first.text + second.text, second.stopped) == ("one ", True)
    assert reader.stop_string == "END"
    assert reader.finish().text == ""


def test_stop_strings_are_not_looked_for_in_thoughts_or_calls(demo: Tokenizer) -> None:
    reader = ReplyReader(demo, stop=["call"])
    thought = "<|channel>thought\na call\n<channel|>"
    got = reader.feed(demo.encode(thought + CALL + "x", special=True))
    assert (got.thinking, got.text, got.stopped) == ("a call", "x", False)
    assert got.tool_calls == ({"name": "f", "arguments": {"a": 1}},)


def test_a_malformed_call_is_content_with_a_flag(demo: Tokenizer) -> None:
    got = ReplyReader(demo).feed(demo.encode("<|tool_call>call:f{a<tool_call|>", special=True))
    assert (got.text, got.malformed_calls, got.tool_calls) == ("call:f{a", ("call:f{a",), ())


def test_an_empty_stop_string_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(InputError, match="at least one character"):
        ReplyReader(demo, stop=[""])
