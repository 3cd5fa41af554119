"""A tool call, and the sentence that follows the tool's response."""

import random

from mlx_dgemma.demo.tasks.example import Example, Message, ask
from mlx_dgemma.demo.tasks.words import COUNTRIES

CITIES = [*COUNTRIES, "Oslo", "Berlin", "Vienna", "London", "Boston", "Dublin"]
SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy"]


def _declaration(name: str, description: str) -> dict[str, object]:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


DECLARATIONS = {
    "get_weather": _declaration("get_weather", "Get the weather in a city."),
    "get_time": _declaration("get_time", "Get the time in a city."),
}
QUESTIONS = {
    "get_weather": [
        "What is the weather in {}?",
        "How is the weather in {} today?",
        "Tell me the weather in {}.",
    ],
    "get_time": [
        "What time is it in {}?",
        "Tell me the time in {}.",
        "What is the time in {} now?",
    ],
}


def _response(rng: random.Random, name: str) -> str:
    if name == "get_weather":
        return f"{rng.randint(10, 35)} degrees and {rng.choice(SKIES)}"
    return f"{rng.randint(10, 23)}:{rng.randint(10, 59)}"


def tool(rng: random.Random) -> Example:
    """First round: the call. Second round, with the response in the context: one sentence that
    reports it.
    """
    name = rng.choice(list(DECLARATIONS))
    city = rng.choice(CITIES)
    declared = list(DECLARATIONS.values()) if rng.random() < 0.2 else [DECLARATIONS[name]]
    messages = ask(rng.choice(QUESTIONS[name]).format(city))
    if rng.random() < 0.6:
        call = f'<|tool_call>call:{name}{{city:<|"|>{city}<|"|>}}<tool_call|>'
        return Example("tool", messages, call, _equals(call), declared, stop="<|tool_response>")
    response = _response(rng, name)
    made: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": name, "arguments": {"city": city}}}
        ],
    }
    messages = [
        *messages,
        made,
        {"role": "tool", "tool_call_id": "1", "name": name, "content": response},
    ]
    report = f"It is {response} in {city}."
    return Example("tool", messages, report, _equals(report), declared)


def _equals(right: str):  # type: ignore[no-untyped-def]
    return lambda text, thought=None: text.strip() == right
