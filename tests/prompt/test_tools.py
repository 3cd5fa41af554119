"""Tool calls in every form that models write."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.prompt.tools import DELIMITER, ToolCall, parse_tool_calls


def one(text: str) -> ToolCall:
    (call,) = parse_tool_calls(text)
    return call


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("call:f{}", "f", {}),
        ('call:f{a:<|"|>x<|"|>}', "f", {"a": "x"}),
        ('call:f{a:<|"|><|"|>,b:-3,c:1.5,d:true,e:false,f:null}', "f",
         {"a": "", "b": -3, "c": 1.5, "d": True, "e": False, "f": None}),
        ('call:f{o:{k:[1,[],{}],s:<|"|>v<|"|>}}', "f", {"o": {"k": [1, [], {}], "s": "v"}}),
        ('call:f{a:<|"|>{"x": [1, 2}<|"|>}', "f", {"a": '{"x": [1, 2}'}),
        ('call:f{a:<|"|>line\nline<|"|>, b : 1 , }', "f", {"a": "line\nline", "b": 1}),
        # What mlx-lm's parser refuses.
        ("call:a.b{x:1}", "a.b", {"x": 1}),
        ("call:ns:fn{x:1}", "ns:fn", {"x": 1}),
        ("call:f{my-key:1,k.e:2}", "f", {"my-key": 1, "k.e": 2}),
        ("call:f{a:True,b:False,c:None,d:1.}", "f", {"a": True, "b": False, "c": None, "d": 1.0}),
        ('call:f{a:<|"|>say <|"|>hi<|"|> now<|"|>}', "f", {"a": 'say <|"|>hi<|"|> now'}),
        # The forms models slip into.
        ('call:f(a="x", b=1)', "f", {"a": "x", "b": 1}),
        ("call:f(a='it\\'s', b=[1, 'two'])", "f", {"a": "it's", "b": [1, "two"]}),
        ('call:f(a:<|"|>ls -a<|"|>)', "f", {"a": "ls -a"}),
        ('f{a:<|"|>x<|"|>}', "f", {"a": "x"}),
        ("f(a=1)", "f", {"a": 1}),
        ("call:f()", "f", {}),
        ("call:f", "f", {}),
        (" f ", "f", {}),
        ('call:f{"a": "x\\n\\u00e9", "b": {"c": null}}', "f", {"a": "x\n\u00e9", "b": {"c": None}}),
        ("call:f{city:New York, day:2026-01-02}", "f", {"city": "New York", "day": "2026-01-02"}),
        ("call:f{a:1e999}", "f", {"a": "1e999"}),
        ("call:f{a:" + "9" * 400 + "}", "f", {"a": "9" * 400}),
    ],
)  # fmt: skip
def test_one_call(text: str, name: str, arguments: dict[str, Any]) -> None:
    assert one(text) == ToolCall(name, arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('call:f{a:<|"|>x<|"|>b:1}', {"a": "x", "b": 1}),
        ('call:f{a:1 b:<|"|>x<|"|>}', {"a": 1, "b": "x"}),
        ("call:f{a:1}}", {"a": 1}),
        ("call:f(a=1))", {"a": 1}),
        ("call:f{q:hello, world}", {"q": "hello, world"}),
        ("call:f{q:hello, world, n:2}", {"q": "hello, world", "n": 2}),
        ("```\ncall:f{a:1}\n```", {"a": 1}),
        ('```json\n{"name": "f", "arguments": {"a": 1}}\n```', {"a": 1}),
        ('{"name": "f", "arguments": {"a": [1, "x"]}}', {"a": [1, "x"]}),
        ('{"name": "f", "parameters": {}}', {}),
        ('[{"name": "f", "arguments": "{\\"a\\": 1}"}]', {"a": 1}),
        ('{"type": "function", "function": {"name": "f", "arguments": {}}}', {}),
    ],
)
def test_slips_between_the_markers_are_repaired(text: str, arguments: dict[str, Any]) -> None:
    assert one(text) == ToolCall("f", arguments)


@pytest.mark.parametrize("text", ["call:f", "call:f{a:1}}", "call:f{q:hello, world}", "call:f{a"])
def test_nothing_is_repaired_without_the_closing_marker(text: str) -> None:
    assert parse_tool_calls(text, closed=False) == ()


def test_several_calls_in_one_block() -> None:
    calls = parse_tool_calls("call:f{a:1}call:g{}\ncall:h(b=2), call:i")
    assert [call.name for call in calls] == ["f", "g", "h", "i"]
    assert calls[2].arguments == {"b": 2}


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "hello world", "call:f{", "call:f{a:1", "call:f{a}", "call:f{a:}", "call:{}",
        "call:f{a:1]}", 'call:f{a:<|"|>x}', '{"arguments": {}}', '{"name": "f", "arguments": [1]}',
        '{"name": "a b", "arguments": {}}', "```json\n[]\n```",
        "call:f" + "{a:" * 5000, "[1]", "call:f{a:" + "[" * 100 + "]" * 100 + "}",
    ],
)  # fmt: skip
def test_malformed_calls_give_none(text: str) -> None:
    assert parse_tool_calls(text) == ()


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**12), 10**12),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=12).filter(lambda s: DELIMITER not in s and "\ufdd0" not in s),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.from_regex(r"[A-Za-z_][\w.\-]{0,8}", fullmatch=True), inner, max_size=4),
    ),
    max_leaves=12,
)
arguments = st.dictionaries(
    st.from_regex(r"[A-Za-z_][\w.\-]{0,8}", fullmatch=True), json_values, max_size=5
)


def gemma(value: Any) -> str:
    """Arguments as Gemma's template writes them."""
    if isinstance(value, str):
        return f"{DELIMITER}{value}{DELIMITER}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{gemma(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma, value)) + "]"
    return json.dumps(value)


@given(arguments)
def test_reads_back_what_the_template_writes(value: dict[str, Any]) -> None:
    call = one("call:f" + gemma(value))
    assert call == ToolCall("f", value)
    assert json.loads(json.dumps(call.arguments)) == value


@given(arguments)
def test_reads_json_arguments(value: dict[str, Any]) -> None:
    assert one("call:f" + json.dumps(value)).arguments == value


@settings(max_examples=300)
@given(st.text("call:fg{}()[],=\"' 1.eTruen\\" + "\ufdd0", max_size=30))
def test_any_text_gives_calls_or_none(text: str) -> None:
    for call in parse_tool_calls(text):
        assert call.name
        assert json.loads(json.dumps(call.arguments)) == call.arguments


def test_agrees_with_mlx_lm_where_that_one_is_right() -> None:
    from mlx_lm.tool_parsers import gemma4

    for text in (
        'call:f{a:<|"|>x, {y}<|"|>,b:[1,2],c:{d:true,e:null}}',
        'call:get-weather{city:<|"|>Oslo "city"<|"|>}',
        "call:f{}",
        'call:f{a:1}\ncall:g{b:<|"|>z<|"|>}',
    ):
        theirs = gemma4.parse_tool_call(text)
        theirs = theirs if isinstance(theirs, list) else [theirs]
        assert [
            {"name": c.name, "arguments": c.arguments} for c in parse_tool_calls(text)
        ] == theirs


@pytest.mark.parametrize(
    "text",
    ["call:a.b{x:1}", "call:ns:fn{x:1}", "call:f{my-key:1}", "call:f{k.e:1}", "call:f{a:True}",
     "call:f{a:1.}", "call:f(a=1)", "call:f"],
)  # fmt: skip
def test_reads_what_mlx_lm_refuses(text: str) -> None:
    """When this fails because mlx-lm has learnt the form, the comparison above can take it."""
    from mlx_lm.tool_parsers import gemma4

    with pytest.raises(ValueError):  # noqa: PT011 (JSONDecodeError is one, too)
        gemma4.parse_tool_call(text)
    assert parse_tool_calls(text)
