"""The OpenAPI document of the server, written from the records that check its requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_dgemma.server.accepted import Known, object_schema

_SUMMARIES = {
    "/v1/chat/completions": "A reply to a conversation, in OpenAI's dialect",
    "/v1/completions": "A text continued, or filled between prompt and suffix",
    "/v1/responses": "A reply in the dialect of OpenAI's Responses",
    "/v1/messages": "A reply in Anthropic's dialect",
    "/v1/messages/count_tokens": "The number of tokens of a conversation",
    "/v1/systemone": "Decisions about a state",
}
_STRING = {"type": "string"}
_OBJECT = {"type": "object"}
# Of everything that only reads: path -> (summary, media type, schema).
_READ = {
    "/health": ("Whether the server runs", "application/json", _OBJECT),
    "/metrics": ("Counters in Prometheus' text form", "text/plain", _STRING),
    "/v1/models": ("The names that requests may give", "application/json", _OBJECT),
    "/openapi.json": ("This document", "application/json", _OBJECT),
}
# Of everything that was answered before: path -> the methods and their summaries.
_KEPT = {
    "/v1/responses/{id}": {"get": "A response that is still kept", "delete": "Forgets a response"},
    "/v1/responses/{id}/input_items": {"get": "The conversation that a response answers"},
}


def document(known: Mapping[str, Known], version: str, *, keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1. known: the fields of each endpoint that takes a JSON object. keyed: whether
    requests need a key."""
    paths: dict[str, Any] = {path: {"get": _get(*about)} for path, about in _READ.items()}
    name = {"name": "name", "in": "path", "required": True, "schema": _STRING}
    one = _get("One of them", "application/json", _OBJECT)
    paths["/v1/models/{name}"] = {"get": {**one, "parameters": [name]}}
    for path, methods in _KEPT.items():
        paths[path] = {
            method: {
                **_get(summary, "application/json", _OBJECT),
                "parameters": [{**name, "name": "id"}],
            }
            for method, summary in methods.items()
        }
    for path, fields in known.items():
        paths[path] = {"post": _post(path, fields)}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mlx_dgemma", "version": version},
        "paths": paths,
        "components": {
            "schemas": {
                "OpenAIError": _error({"error": _named("message", "type", "param", "code")}),
                "AnthropicError": _error({"type": {"const": "error"}, "error": _named("message")}),
                "SystemOneError": _error({"detail": {"type": ["array", "object"]}}),
            }
        },
    }
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _get(summary: str, media: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    right = {"description": "Right", "content": {media: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": right, "default": _refusal("/")}}


def _post(path: str, fields: Known) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if "stream" in fields:
        content["text/event-stream"] = {}
    return {
        "summary": _SUMMARIES[path],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": object_schema(fields)}},
        },
        "responses": {
            "200": {"description": "Right", "content": content},
            "default": _refusal(path),
        },
    }


def _refusal(path: str) -> dict[str, Any]:
    """An error, in the form of the endpoint's dialect."""
    name = "OpenAIError"
    if path.startswith("/v1/messages"):
        name = "AnthropicError"
    elif path == "/v1/systemone":
        name = "SystemOneError"
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {
        "description": "One sentence that says what is wrong, and what to do",
        "content": {"application/json": {"schema": schema}},
    }


def _error(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _named(*names: str) -> dict[str, Any]:
    properties = {name: {"type": ["string", "null"]} for name in names}
    return {"type": "object", "properties": properties | {"message": _STRING},
            "required": list(names)}  # fmt: skip
