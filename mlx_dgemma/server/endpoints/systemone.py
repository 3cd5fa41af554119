"""POST /v1/systemone: decisions about a state, in the request form of Jev-compatible servers."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from mlx_dgemma.decisions.questions import (
    MAX_LEVELS,
    MAX_OPTIONS,
    QuestionError,
    as_text,
    read_questions,
)
from mlx_dgemma.errors import InputError
from mlx_dgemma.server.accepted import Accepts, Bounds
from mlx_dgemma.server.engine import Engine
from mlx_dgemma.server.errors import ApiError, as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.request_images import MAX_IMAGES, count_images
from mlx_dgemma.server.sampling import check_length, check_model
from mlx_dgemma.server.sse import unless_gone
from mlx_dgemma.server.wire import JsonResponse

PATH = "/v1/systemone"
_PART = re.compile(r"messages\[0\]\.content(?=\[)")
_FORMATS = ("png", "jpg", "jpeg")
ALIASES = ("jev-latest",)  # what clients of this interface call the model by default


def accepted(_: Bounds) -> dict[str, Accepts]:
    """What `/v1/systemone` accepts."""
    text = {"type": ["string", "null"]}
    question = {
        "anyOf": [
            _question("noul", {"type": "object", "properties": {"true": text, "false": text},
                               "additionalProperties": False}),
            _question("choice", {"type": "object", "additionalProperties": text,
                                 "minProperties": 2, "maxProperties": MAX_OPTIONS}),
            _question("score", {"type": "array", "items": {"type": "string", "minLength": 1},
                                "minItems": 2, "maxItems": MAX_LEVELS}),
        ]
    }  # fmt: skip
    image = {"data_base64": {"type": "string"}, "format": {"enum": list(_FORMATS)}}
    return {
        "model": Accepts("text"),
        "state": Accepts(schema={"type": ["string", "object", "array"]}, required=True),
        "questions": Accepts(
            schema={"type": "object", "additionalProperties": question, "minProperties": 1},
            required=True,
        ),
        "assets": Accepts(
            "object",
            schema={"type": "object", "properties": image, "required": ["data_base64"]},
            about="Images, by the placeholder in the state; in a form, `part` names the file's.",
        ),
        "x_orders": Accepts("integer", 1, 20, about="In how many orders options are shown."),
    }


def _question(kind: str, criteria: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of one kind of question."""
    properties = {
        "type": {"const": kind},
        "instructions": {"type": "string", "minLength": 1},
        "criteria": criteria,
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


async def system_one(engine: Engine, fields: Fields, request: Request) -> JsonResponse:
    """Answers every question; unknown fields are ignored, as the interface demands."""
    asked = fields.body.get("model")
    model = engine.settings.model_name if asked in ALIASES else check_model(engine, fields)
    if fields.raw("state") is None:
        raise ApiError(
            422, "state is missing: give a string, an object or an array.", param="state"
        )
    state = fields.raw("state")
    if not isinstance(state, str | dict | list):
        raise ApiError(422, "state must be a string, an object or an array.", param="state")
    questions = read_questions(fields.raw("questions"))
    orders = fields.integer("x_orders") or 2
    state = await asyncio.to_thread(with_assets, state, fields.object("assets"))
    check_length(engine, state, "state")
    with _named_as_the_state():
        images = count_images([{"content": state}])
        if images > MAX_IMAGES:
            why = f"The state has {images} images; {MAX_IMAGES} are the most."
            raise ApiError(422, why, param="state")
        decision = await unless_gone(
            request, engine.decide(state, questions, orders=orders, hold=fields.hold)
        )
    usage: dict[str, Any] = {
        "input_tokens": decision.prompt_tokens,
        "output_tokens": 0,
        "x_cached_tokens": decision.cached_tokens,
        "x_forwards": decision.forwards,
    }
    return JsonResponse({"model": model, "answers": decision.to_json(), "usage": usage})


@contextlib.contextmanager
def _named_as_the_state() -> Iterator[None]:
    """What is said of a message's parts inside is said of the state's, which became them."""
    try:
        yield
    except QuestionError:
        raise
    except (ApiError, InputError) as error:
        told = as_api_error(error)
        told.message = _PART.sub("state", told.message)
        told.param = told.param and _PART.sub("state", told.param)
        raise told from None


def with_assets(state: Any, assets: Fields | None) -> Any:
    """A state as message parts, in which every asset's placeholder is replaced by its image."""
    if assets is None or not assets.body:
        return state
    if len(assets.body) > MAX_IMAGES:
        why = f"The request has {len(assets.body)} assets; {MAX_IMAGES} are the most."
        raise ApiError(422, why, param="assets")
    images = {}
    for name in assets.body:
        if not name:
            raise ApiError(422, "An asset needs a name: its placeholder.", param="assets")
        asset = assets.object(name)
        content = None if asset is None else asset.text("data_base64")
        if asset is None or content is None:
            raise assets.fail(name, "an image with data_base64")
        kind = asset.text("format", _FORMATS) or "png"
        images[name] = {
            "type": "image_url",
            "image_url": {"url": f"data:image/{kind};base64,{content}"},
        }
    text = as_text(state) or ""
    names = sorted(images, key=len, reverse=True)  # image-10 is not image-1 and a zero
    placeholder = re.compile("|".join(map(re.escape, names)))
    pieces, found = placeholder.split(text), placeholder.findall(text)
    parts: list[dict[str, Any]] = []
    for piece, name in zip(pieces, [*found, None], strict=True):
        if piece.strip():
            parts.append({"type": "text", "text": piece})
        if name is not None:
            parts.append(images[name])
    return parts
