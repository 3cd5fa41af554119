"""The server's OpenAPI document says what the server does, field by field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route
from starlette.testclient import TestClient

from mlx_dgemma.server.app import PAGE

from . import bounds
from .conftest import Script, user
from .test_clients import running

# A sound request of every endpoint, to which fields are added one by one.
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": user()},
    "/v1/completions": {"prompt": "Once"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": user(), "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": user()},
    "/v1/systemone": {
        "state": "s",
        "questions": {"q": {"type": "choice", "criteria": {"a": None, "b": None}}},
    },
}


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    with bounds.scripted_app() as made:
        yield made


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as entered:
        yield entered


@pytest.fixture(scope="module")
def described(client: TestClient) -> dict[str, Any]:
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    return dict(answer.json())


def test_every_route_is_described(app: Any, described: dict[str, Any]) -> None:
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.path not in (*PAGE, "/favicon.ico")
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert served == {
        (path, method) for path, methods in described["paths"].items() for method in methods
    }
    assert {path for path, method in served if method == "post"} == SOUND.keys()


def test_a_key_is_described_where_there_is_one(serve: Any) -> None:
    assert "security" in serve(Script("x"), api_key="k").get("/openapi.json").json()
    assert "security" not in serve(Script("x")).get("/openapi.json").json()


def schema_of(described: dict[str, Any], path: str) -> dict[str, Any]:
    content = described["paths"][path]["post"]["requestBody"]["content"]
    return dict(content["application/json"]["schema"])


def fields_of(schema: dict[str, Any], where: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """(path of names, alternatives of its schema) of every field, those inside objects included."""
    for name, one in schema.get("properties", {}).items():
        ways = [way for way in one.get("anyOf", [one]) if way.get("type") != "null"]
        yield (*where, name), ways
        for way in ways:
            if way.get("type") == "object":
                yield from fields_of(way, (*where, name))


def values_of(ways: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Values that these alternatives allow, and some that they do not."""
    right: list[Any] = []
    wrong: list[Any] = []
    for way in ways:
        kind = way.get("type")
        if kind in ("integer", "number"):
            right += [way["minimum"], way["maximum"]]
            wrong += [way["minimum"] - 1, way["maximum"] + 1, "1", True, [1]]
            wrong += [1.5] if kind == "integer" else []
        elif kind == "boolean":
            right += [True, False]
            wrong += [1, "true", {}]
        elif kind == "string" and "enum" in way:
            right += way["enum"]
            wrong += ["none of them", 3]
        elif kind == "array" and way.get("items") == {"type": "string"}:
            right += [["x"] * way["maxItems"]]
            wrong += [["x"] * (way["maxItems"] + 1), [3]]
        elif kind in ("object", "array", "string"):
            wrong += [3, True]
    wrong = [value for value in wrong if value != -1 or not any("const" in way for way in ways)]
    return right, wrong


@pytest.mark.parametrize("path", SOUND)
def test_every_field_is_what_the_document_says(
    client: TestClient, described: dict[str, Any], path: str
) -> None:
    schema = schema_of(described, path)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert client.post(path, json=SOUND[path]).status_code == 200
    for name in schema.get("required", ()):
        without = {key: value for key, value in SOUND[path].items() if key != name}
        assert client.post(path, json=without).status_code in (400, 422), name
    checked = 0
    for where, ways in fields_of(schema):
        right, wrong = values_of(ways)
        if any(not way for way in ways):  # anything, or what is described elsewhere
            continue
        for value in right:
            answer = client.post(path, json=with_(path, where, value))
            assert f"{'.'.join(where)} must be" not in answer.text, (where, value, answer.text)
            assert answer.status_code < 500
        for value in wrong:
            answer = client.post(path, json=with_(path, where, value))
            assert answer.status_code in (400, 422), (where, value, answer.text)
            assert where[0] in answer.text, (where, value, answer.text)
            checked += 1
    assert checked >= (70 if "stream" in schema["properties"] else 5)


def with_(path: str, where: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The sound request of a path with one value more, and what makes that value be read."""
    # In every dialect at once: tool_choice is read where there are tools.
    tool = {"name": "look", "input_schema": {}} | (
        {}
        if path.startswith("/v1/messages")
        else {"type": "function", "function": {"name": "look"}}
    )
    body = {**SOUND[path], "tools": [tool]}
    inside = body
    for name in where[:-1]:
        inside[name] = inside = {**_BESIDE.get(name, {})}
    inside[where[-1]] = value
    return body


# What a nested field is read beside: without it, nobody asks for it.
_BESIDE: dict[str, dict[str, Any]] = {
    **{key: {"type": "json_schema"} for key in ("response_format", "format", "output_format")},
    "json_schema": {"schema": {}},
    "tool_choice": {"type": "tool"},
}


# Schemathesis, from the document alone. Its examples are the same every time.

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
GENERATED = [(path, "POST", mode) for path in SOUND for mode in GenerationMode]
GENERATED += [
    ("/v1/models/{name}", "GET", GenerationMode.POSITIVE),
    ("/v1/models", "GET", GenerationMode.POSITIVE),
    ("/health", "GET", GenerationMode.POSITIVE),
    ("/metrics", "GET", GenerationMode.POSITIVE),
]


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    with bounds.scripted_model() as script, running(script, prefix_cache_bytes=0) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), GENERATED)
def test_generated_requests_are_answered_as_described(
    api: Any, path: str, method: str, mode: GenerationMode
) -> None:
    """No status 500, and every answer has the status, the type and the form that are documented."""
    statuses = Counter[int]()
    # Most generated responses have no input, which only a previous response makes up for.
    most = 90 if path == "/v1/responses" else 30

    @settings(
        max_examples=most if method == "POST" else 10,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(api[path][method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        answer = case.call()
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    check()
    print(path, mode.value, dict(statuses))
    assert statuses[200] > 0 or mode is GenerationMode.NEGATIVE or "{" in path
