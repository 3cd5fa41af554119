"""/v1/responses/{id}: to read, list and delete what this server has answered and still keeps."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.stored import Item, Stored, StoredResponses
from mlx_dgemma.server.wire import JsonResponse

_MOST_LISTED = 100


def _found(stored: StoredResponses, request: Request) -> Stored:
    identity = request.path_params["id"]
    response = stored.get(identity)
    if response is None:
        raise ApiError(
            404,
            f"Response with id {identity!r} not found: this server keeps them for a while, and "
            "none with store=false.",
            param="response_id",
        )
    return response


async def retrieve(stored: StoredResponses, request: Request) -> Response:
    response = _found(stored, request)
    if request.query_params.get("stream") == "true":
        raise ApiError(400, "A kept response is not streamed: leave stream out.", param="stream")
    return JsonResponse(response.body)


async def delete(stored: StoredResponses, request: Request) -> Response:
    identity = _found(stored, request).body["id"]
    stored.delete(identity)
    return JsonResponse({"id": identity, "object": "response", "deleted": True})


async def input_items(stored: StoredResponses, request: Request) -> Response:
    """The conversation that a response answers, in pages. limit, order and after: as OpenAI's."""
    response = _found(stored, request)
    items = _numbered(response)
    if request.query_params.get("order", "desc") != "asc":
        items.reverse()
    after = request.query_params.get("after")
    if after is not None:
        names = [item["id"] for item in items]
        if after not in names:
            raise ApiError(400, f"after names {after!r}, which is no item here.", param="after")
        items = items[names.index(after) + 1 :]
    page = items[: _limit(request)]
    return JsonResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(page) < len(items),
        }
    )


_ONE = "/v1/responses/{id}"
# Each with its method and what answers it.
ROUTES = (
    (_ONE, ("GET", retrieve)),
    (_ONE, ("DELETE", delete)),
    (f"{_ONE}/input_items", ("GET", input_items)),
)


def _limit(request: Request) -> int:
    given = request.query_params.get("limit", "20")
    if not given.isdecimal() or not 1 <= int(given) <= _MOST_LISTED:
        raise ApiError(
            400, f"limit must be a whole number from 1 to {_MOST_LISTED}.", param="limit"
        )
    return int(given)


def _numbered(response: Stored) -> list[Item]:
    """The input's items, those without an id named by their place; strings as parts."""
    stem = response.body["id"].removeprefix("resp_")
    items = []
    for i, item in enumerate(response.input):
        whole = {"type": "message", "id": f"in_{stem}_{i}", "status": "completed", **item}
        if isinstance(whole.get("content"), str):
            kind = "output_text" if whole.get("role") == "assistant" else "input_text"
            part: Item = {"type": kind, "text": whole["content"]}
            whole["content"] = [part | ({"annotations": []} if kind == "output_text" else {})]
        items.append(whole)
    return items
