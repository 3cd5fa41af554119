"""Our chat template gives what the real one gives, conversation by conversation."""

from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest

ROOT = Path(__file__).parents[2]
OURS = ROOT / "mlx_dgemma/demo/checkpoint/chat_template.jinja"
REAL = ROOT.parent / "shared/assets/checkpoint-4bit/chat_template.jinja"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name, arguments, identity="1"):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(content, identity="1", **more):
    return {"role": "tool", "tool_call_id": identity, "content": content, **more}


def declare(name, parameters, **more):
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters, **more}
    return {"type": "function", "function": function}


WEATHER = declare(
    "get_weather",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
RICH = declare(
    "search",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for"},
            "mode": {"type": "string", "enum": ["fast", "deep"], "nullable": True},
            "order": {"type": "string", "description": "How", "enum": ["up", "down"]},
            "limit": {"type": "integer", "description": "How many"},
            "tags": {"type": "array", "description": "Labels", "items": {"type": "string"}},
            "any": {"type": "array"},
            "points": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "x": {"type": "number"},
                        "y": {"type": "number", "description": "up"},
                    },
                    "required": ["x", "y"],
                    "minItems": 2,
                },
            },
            "union": {
                "type": "array",
                "items": {"type": ["string", "number"], "default": None, "flag": True},
            },
            "filter": {
                "type": "object",
                "description": "Which",
                "properties": {
                    "from": {"type": "string"},
                    "deep": {"type": "object", "properties": {}},
                },
                "required": ["from"],
            },
            "loose": {"type": "object", "extra": {"type": "string", "description": "odd"}},
            "exact": {"type": "boolean", "nullable": True},
        },
        "required": ["query", "limit"],
    },
    response={"description": "Pages", "type": "object"},
)
BARE = declare("now", None)
EMPTY = declare("ping", {"type": "object", "properties": {}})
PARTS = [
    {"type": "text", "text": " Look: "},
    {"type": "image"},
    {"type": "video"},
    {"type": "text", "text": "what?"},
]

CONVERSATIONS = {
    "one turn": [user("  Hello there ")],
    "system": [{"role": "system", "content": " Be brief. "}, user("Hi")],
    "developer": [{"role": "developer", "content": "Be brief."}, user("Hi")],
    "system parts": [
        {
            "role": "system",
            "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}],
        }
    ],
    "several turns": [user("a"), assistant(" b "), user("c"), assistant("d"), user("e")],
    "two model turns": [user("a"), assistant("b"), assistant("c"), user("d")],
    "old thought in content": [
        user("a"),
        assistant("<|channel>thought\nhm<channel|>b<channel|>c"),
        user("d"),
    ],
    "old reasoning": [user("a"), assistant("b", reasoning="hm"), user("c")],
    "images and video": [
        user(PARTS),
        assistant([{"type": "text", "text": " a cat "}]),
        user("sure?"),
    ],
    "audio": [user([{"type": "audio"}])],
    "no content": [user("a"), assistant(None), user("b")],
    "open call": [user("a"), assistant("", tool_calls=[call("f", {"x": 1, "a": "two"})])],
    "call with text": [user("a"), assistant("Let me see.", tool_calls=[call("f", {})])],
    "string arguments": [user("a"), assistant("", tool_calls=[call("f", "x:1")])],
    "odd arguments": [
        user("a"),
        assistant(
            "",
            tool_calls=[
                call("f", {"l": [1, "b", True], "m": {"k": None, "j": {"i": 1.5}}, "n": False})
            ],
        ),
    ],
    "answered call": [user("a"), assistant("", tool_calls=[call("f", {"x": 1})]), answer("42")],
    "answered and told": [
        user("a"),
        assistant("", tool_calls=[call("f", {"x": 1})]),
        answer("42"),
        assistant("It is 42."),
        user("thanks"),
    ],
    "two calls": [
        user("a"),
        assistant("", tool_calls=[call("f", {}, "1"), call("g", {"y": "z"}, "2")]),
        answer("one", "1"),
        answer("two", "2"),
    ],
    "unknown call id": [
        user("a"),
        assistant("", tool_calls=[call("f", {})]),
        answer("x", "9", name="h"),
    ],
    "parts in a response": [
        user("a"),
        assistant("", tool_calls=[call("f", {})]),
        answer(
            [{"type": "text", "text": "see "}, {"type": "image"}, {"type": "text", "text": "this"}]
        ),
    ],
    "response on the turn": [
        user("a"),
        assistant(
            "", tool_calls=[call("f", {})], tool_responses=[{"name": "f", "response": {"ok": True}}]
        ),
    ],
    "response and content": [
        user("a"),
        assistant("done", tool_calls=[call("f", {})], tool_responses=[{"response": "fine"}]),
        user("b"),
    ],
    "reasoning in a tool loop": [
        user("a"),
        assistant("", reasoning="I should call f", tool_calls=[call("f", {})]),
        answer("1"),
        assistant("", reasoning_content="and g", tool_calls=[call("g", {})]),
        answer("2"),
    ],
    "two rounds of calls": [
        user("a"),
        assistant("", tool_calls=[call("f", {})]),
        answer("1"),
        assistant("", tool_calls=[call("g", {})]),
        answer("2"),
        assistant("Both."),
        user("again"),
    ],
}
TOOLS = {"no tools": None, "weather": [WEATHER], "rich": [RICH, BARE, EMPTY]}


def render(source: Path, **variables) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source.read_text()).render(bos_token="<bos>", **variables)


@pytest.mark.skipif(not REAL.exists(), reason=f"the real checkpoint's template is not at {REAL}")
@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_same_text_as_the_real_template(name, tools):
    for thinking in (None, False, True):
        for prompt in (False, True):
            variables = {
                "messages": CONVERSATIONS[name],
                "tools": TOOLS[tools],
                "add_generation_prompt": prompt,
            }
            if thinking is not None:
                variables["enable_thinking"] = thinking
            assert render(OURS, **variables) == render(REAL, **variables)


def test_a_plain_question():
    text = render(OURS, messages=[user("Hi")], add_generation_prompt=True)
    assert text == "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"


def test_a_tool_round():
    messages = [
        user("Weather?"),
        assistant("", tool_calls=[call("get_weather", {"city": "Rome"})]),
        answer("sunny"),
    ]
    text = render(OURS, messages=messages, add_generation_prompt=True)
    assert text == (
        "<bos><|turn>user\nWeather?<turn|>\n<|turn>model\n"
        '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'
        '<|tool_response>response:get_weather{value:<|"|>sunny<|"|>}<tool_response|>'
    )
