"""Replies are split exactly, whatever the block edges, and markers never show."""

import json
from collections.abc import Collection, Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.prompt.channels import ChannelParser, Piece, join, parse
from mlx_dgemma.prompt.chat_template import encode_messages
from mlx_dgemma.prompt.tokenizer import Tokenizer
from mlx_dgemma.prompt.tools import ToolCall

shared = settings(max_examples=150)


def read(tokenizer: Tokenizer, reply: str, *tools: str) -> list[tuple[str, str]]:
    """The pieces of a reply given as text, the same for every way of cutting it in blocks."""
    ids = tokenizer.encode(reply, special=True)
    whole = parse(tokenizer, ids, tools=tools)
    for size in (1, 2, 3):
        assert _in_blocks(tokenizer, ids, range(0, len(ids), size), tools) == whole
    return [(piece.kind, piece.text) for piece in whole]


def _in_blocks(
    tokenizer: Tokenizer, ids: list[int], cuts: Iterable[int], tools: Collection[str]
) -> list[Piece]:
    parser = ChannelParser(tokenizer, tools=tools)
    pieces: list[Piece] = []
    for start, end in pairwise([0, *cuts, len(ids)]):
        pieces += parser.feed(ids[start:end])
    return join(pieces + parser.finish())


@pytest.mark.parametrize(
    ("reply", "pieces"),
    [
        ("", []),
        ("Hello\n\n", [("text", "Hello\n\n")]),
        ("<|channel>thought\nhm\n<channel|>Yes", [("thinking", "hm"), ("text", "Yes")]),
        ("<|channel>thought\nhm<channel|>Yes", [("thinking", "hm"), ("text", "Yes")]),
        ("<|channel>thought\n<channel|>Yes", [("text", "Yes")]),
        ("<|channel>thought\n\n<channel|>Yes", [("text", "Yes")]),
        ("<|channel>thought<channel|>Yes", [("text", "Yes")]),
        ("<|channel><channel|>Yes", [("text", "Yes")]),
        ("<|channel>thoughtful<channel|>", [("thinking", "thoughtful")]),
        (
            "<|channel>no header\n\nhere<channel|>x",
            [("thinking", "no header\n\nhere"), ("text", "x")],
        ),
        ("<|channel>thought\nthought\nthought\n\n", [("thinking", "thought\nthought\n\n")]),
        ("<|channel>thought", []),
        ("<|channel>thought\nnever ends", [("thinking", "never ends")]),
        ("a thought\n\nthought\nof mine", [("text", "a thought\n\nthought\nof mine")]),
        ("a<channel|>b<tool_call|>c<|turn>d<bos>e<|image|>f", [("text", "abcdef")]),
        ('say <|"|>hi<|"|>', [("text", 'say "hi"')]),
        (
            "<|channel>thought\na<|channel>thought\nb<channel|>c",
            [("thinking", "ab"), ("text", "c")],
        ),
        ("<|tool_call>call:f{}<tool_call|>", [("tool_call", "call:f{}")]),
        ("a<|tool_call>call:f{}", [("text", "a"), ("tool_call", "call:f{}")]),
        ("<|tool_call><tool_call|>a", [("text", "a")]),
        (
            "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|>",
            [("tool_call", "call:f{}"), ("tool_call", "call:g{}")],
        ),
        (
            "<|tool_call>call:f{}<|channel>thought\nx<channel|>",
            [("tool_call", "call:f{}"), ("thinking", "x")],
        ),
    ],
)
def test_pieces(tokenizer: Tokenizer, reply: str, pieces: list[tuple[str, str]]) -> None:
    assert read(tokenizer, reply) == pieces


def test_spelled_markers_are_text(tokenizer: Tokenizer) -> None:
    for spelling in tokenizer.spellings:
        ids = tokenizer.encode(f"a{spelling}b")
        assert parse(tokenizer, ids) == [Piece("text", f"a{spelling}b")]


def test_a_string_may_spell_its_own_delimiter(tokenizer: Tokenizer) -> None:
    quote = tokenizer.ids["escape"]
    head, tail = (
        tokenizer.encode(s, special=True) for s in ("<|tool_call>call:f{a:", "}<tool_call|>")
    )
    ids = [*head, quote, *tokenizer.encode('}<|"|>,{'), quote, *tail]
    (piece,) = parse(tokenizer, ids)
    assert piece.calls == (ToolCall("f", {"a": '}<|"|>,{'}),)


@pytest.mark.parametrize(
    ("reply", "pieces"),
    [
        ("call:f{a:1}", [("tool_call", "call:f{a:1}")]),
        ("\n call:f(a=1)\nDone", [("tool_call", "call:f(a=1)"), ("text", "\nDone")]),
        (
            'call:f(a="(")call:f(a=2)',
            [("tool_call", 'call:f(a="(")'), ("tool_call", "call:f(a=2)")],
        ),
        ("<|channel>thought\nx<channel|>call:f{}", [("thinking", "x"), ("tool_call", "call:f{}")]),
        (
            "<|tool_call>call:f{}<tool_call|>\ncall:ff{}",
            [("tool_call", "call:f{}"), ("tool_call", "call:ff{}")],
        ),
        ("call:other{a:1}", [("text", "call:other{a:1}")]),
        ("call:\ncall:f", [("text", "call:\ncall:f")]),
        ("call:f is a call", [("text", "call:f is a call")]),
        ("  indented\n\n", [("text", "  indented\n\n")]),
        # Without the prefix: code, prose, whatever it is.
        ("f", [("text", "f")]),
        ("f()", [("text", "f()")]),
        ("f{}", [("text", "f{}")]),
        ("f(){ ... }", [("text", "f(){ ... }")]),
        ('f(a="Rome")', [("text", 'f(a="Rome")')]),
        ("f{a:1", [("text", "f{a:1")]),
        ("f(x) is even", [("text", "f(x) is even")]),
        ('f{a:<|"|>x<|"|>}', [("text", 'f{a:"x"}')]),
        # In running text, in a list, in a fence, on a line of its own: quoted, not meant.
        ("I call:f{a:1}", [("text", "I call:f{a:1}")]),
        ("Run it:\ncall:f{a:1}\nDone", [("text", "Run it:\ncall:f{a:1}\nDone")]),
        ("- call:f{a:1}", [("text", "- call:f{a:1}")]),
        ("> call:f{a:1}", [("text", "> call:f{a:1}")]),
        ("```\ncall:f{a:1}\n```", [("text", "```\ncall:f{a:1}\n```")]),
        ("```python\nf(a=1)\n```", [("text", "```python\nf(a=1)\n```")]),
        ("`call:f{a:1}`", [("text", "`call:f{a:1}`")]),
    ],
)
def test_calls_without_markers(
    tokenizer: Tokenizer, reply: str, pieces: list[tuple[str, str]]
) -> None:
    assert read(tokenizer, reply, "f", "ff") == pieces


@pytest.mark.parametrize(
    ("reply", "withheld"),
    [
        ("a<|tool_call>call:f{a:1", "call:f{a:1"),
        ("a<|tool_call>call:f", "call:f"),
        ("a<|tool_call>ca", "ca"),
        ('a<|tool_call>call:f{a:<|"|>}', 'call:f{a:<|"|>}'),
        ("a<|tool_call>call:f{}call:ff", "call:f{}call:ff"),
        ("call:f{a:1", "call:f{a:1"),
        ("call:f", "call:f"),
        ('call:f{a:<|"|>x', 'call:f{a:<|"|>x'),
    ],
)
def test_a_cut_call_is_neither_a_call_nor_text(
    tokenizer: Tokenizer, reply: str, withheld: str
) -> None:
    *_, last = parse(tokenizer, tokenizer.encode(reply, special=True), tools=("f", "ff"))
    assert last == Piece("tool_call", withheld, (), cut=True)
    assert read(tokenizer, reply, "f", "ff")[-1] == ("tool_call", withheld)


def test_a_channel_named_final_is_the_answer(tokenizer: Tokenizer) -> None:
    reply = "<|channel>thought\nhm\n<channel|><|channel>final\nYes\n<channel|>"
    assert read(tokenizer, reply) == [("thinking", "hm"), ("text", "Yes\n")]
    assert read(tokenizer, "<|channel>finally<channel|>x") == [
        ("thinking", "finally"),
        ("text", "x"),
    ]


def test_without_declared_tools_a_bare_call_is_prose(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, "call:f{a:1}") == [("text", "call:f{a:1}")]


@shared
@given(data=st.data())
def test_any_cut_gives_the_same_pieces_without_markers(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    words = st.sampled_from(
        [
            "thought",
            "\n",
            "\n\n",
            " ",
            "call:f",
            "f",
            "{",
            "}",
            "(",
            ")",
            "a:1",
            ",",
            '"',
            "\U0001f9e9",
            "x",
        ]
    )
    markers = st.sampled_from(sorted(tokenizer.spellings - {"<|turn>"}))
    parts = data.draw(st.lists(st.one_of(words, words, markers, st.text(max_size=5)), max_size=25))
    ids = [id_ for part in parts for id_ in tokenizer.encode(part, special=True)]
    tools = data.draw(st.sampled_from([(), ("f",)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), min_size=1, max_size=5)))
    whole = parse(tokenizer, ids, tools=tools)
    assert _in_blocks(tokenizer, ids, cuts, tools) == whole
    for piece in whole:
        assert piece.text
        assert piece.calls == () or piece.kind == "tool_call"


@shared
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=50))
def test_plain_replies_come_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    pieces = parse(tokenizer, tokenizer.encode(text))
    assert pieces == ([Piece("text", text)] if text else [])


@pytest.mark.parametrize("thought", ["Hm.", "thought\n", "two\n\nlines\n", "\u00e9\U0001f9e9"])
def test_a_tool_loop_round_trips(tokenizer: Tokenizer, thought: str) -> None:
    """What the model wrote and what the template replays of it are the same ids."""
    tokens = tokenizer.encode
    reply = [
        *tokens("<|channel>thought\n" + thought + "\n<channel|>", special=True),
        *tokens('<|tool_call>call:f{a:<|"|>x y<|"|>,n:{k:true}}<tool_call|>', special=True),
    ]
    thinking, called = parse(tokenizer, reply)
    (call,) = called.calls
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    messages = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": thinking.text,
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    prompt = encode_messages(tokenizer, messages[:1])
    replayed = encode_messages(tokenizer, messages)
    assert replayed[: len(prompt) + len(reply)] == prompt + reply
