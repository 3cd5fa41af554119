"""The ASGI application: routes, keys, limits, and one shape for every error."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlx_dgemma._version import __version__
from mlx_dgemma.server.accepted import Bounds, Known
from mlx_dgemma.server.addresses import KnownHosts, SingleSlashes
from mlx_dgemma.server.bodies import Bodies
from mlx_dgemma.server.endpoints import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_responses,
    stored_responses,
    systemone,
)
from mlx_dgemma.server.engine import Engine, Model
from mlx_dgemma.server.errors import ApiError, as_api_error
from mlx_dgemma.server.fields import Fields
from mlx_dgemma.server.metrics import Metrics
from mlx_dgemma.server.openapi import document
from mlx_dgemma.server.replies import new_id
from mlx_dgemma.server.settings import LOOPBACK_NAMES, ServerSettings
from mlx_dgemma.server.sse import EventStream
from mlx_dgemma.server.stored import StoredResponses
from mlx_dgemma.server.wire import JsonResponse

_PAGE = Path(__file__).parent / "page"
PAGE = {"/": "index.html"} | {
    f"/{path.relative_to(_PAGE)}": str(path.relative_to(_PAGE))
    for path in sorted(_PAGE.rglob("*"))
    if path.suffix in (".js", ".css")
}
log = logging.getLogger("mlx_dgemma.server")
Handler = Callable[[Engine, Fields, Request], Awaitable[Any]]


def create_app(runtime: Model, settings: ServerSettings | None = None) -> Starlette:
    """An application that owns `runtime` and closes it when it shuts down.

    `app.state.stop()`, called on its event loop, ends every request within a denoising step.
    """
    settings = settings or ServerSettings()
    metrics = Metrics()
    engine = Engine(runtime, settings, metrics)
    created = int(time.time())

    async def health(_: Request) -> Response:
        return JsonResponse({"status": "ok", "model": settings.model_name, "version": __version__})

    async def no_icon(_: Request) -> Response:
        return Response(status_code=204)

    async def models(_: Request) -> Response:
        names = (settings.model_name, *settings.aliases)
        return JsonResponse(
            {
                "object": "list",
                "data": [_model_card(engine, name, created) for name in names],
                "models": [_system_one_card(settings, created)],
                "first_id": names[0],
                "last_id": names[-1],
                "has_more": False,
            }
        )

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if not settings.serves(name):
            raise ApiError(404, f"This server has no model {name!r}.", code="model_not_found")
        return JsonResponse(_model_card(engine, name, created))

    async def render_metrics(_: Request) -> Response:
        return PlainTextResponse(metrics.render(engine.door.admitted), media_type="text/plain")

    async def describe(_: Request) -> Response:
        return JsonResponse(document(known, __version__, keyed=settings.api_key is not None))

    stored = StoredResponses()
    endpoints: dict[str, tuple[Handler, Callable[[Bounds], Known]]] = {
        "/v1/chat/completions": (openai_chat.chat_completions, openai_chat.accepted),
        "/v1/completions": (openai_completions.completions, openai_completions.accepted),
        "/v1/responses": (
            partial(openai_responses.responses, stored),
            openai_responses.accepted,
        ),
        "/v1/messages": (anthropic_messages.messages, anthropic_messages.accepted),
        "/v1/messages/count_tokens": (anthropic_messages.count_tokens, anthropic_messages.counted),
        systemone.PATH: (systemone.system_one, systemone.accepted),
    }
    bounds = Bounds(
        settings.max_choices, runtime.model.config.canvas_length, len(runtime.tokenizer)
    )
    known = {path: accepted(bounds) for path, (_, accepted) in endpoints.items()}
    bodies = Bodies(settings.max_body_bytes)
    guard = _Guard(engine, bodies)
    routes = [
        *(Route(path, guard(_page(name), open_to_all=True)) for path, name in PAGE.items()),
        Route("/favicon.ico", guard(no_icon, open_to_all=True)),
        Route("/health", guard(health, open_to_all=True)),
        Route("/metrics", guard(render_metrics)),
        Route("/v1/models", guard(models)),
        Route("/v1/models/{name:path}", guard(model)),
        Route("/openapi.json", guard(describe, open_to_all=True)),
        *(
            Route(
                path,
                guard.json(handler, known[path], forms=path == systemone.PATH),
                methods=["POST"],
            )
            for path, (handler, _) in endpoints.items()
        ),
        *(
            Route(path, guard(partial(endpoint, stored)), methods=[method])
            for path, (method, endpoint) in stored_responses.ROUTES
        ),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        stop()
        await asyncio.to_thread(engine.close)

    def stop() -> None:
        engine.stop()
        bodies.close()

    app = Starlette(
        routes=routes,
        middleware=_middleware(settings),
        exception_handlers={404: _no_such_route, 405: _no_such_route},
        lifespan=lifespan,
    )
    app.state.stop = stop
    return app


def _page(name: str) -> Callable[[Request], Awaitable[Response]]:
    """One file of the page, which loads nothing from anywhere else and sits in no frame."""

    async def file(_: Request) -> Response:
        headers = {
            "content-security-policy": "default-src 'self'; img-src 'self' data:; "
            "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }
        return FileResponse(_PAGE / name, headers=headers)

    return file


def _middleware(settings: ServerSettings) -> list[Middleware]:
    middleware = [Middleware(SingleSlashes)]
    if settings.loopback:
        hosts = [*LOOPBACK_NAMES, "[::1]", settings.host, *settings.allowed_hosts]
        middleware.append(Middleware(KnownHosts, names=hosts))
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
        middleware.append(cors)
    return middleware


def _model_card(engine: Engine, name: str, created: int) -> dict[str, Any]:
    """A model in OpenAI's, vLLM's and Anthropic's words."""
    served = engine.settings.model_name
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": created,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "display_name": served.rsplit("/", 1)[-1],
        "owned_by": "mlx_dgemma",
        "context_length": engine.room,
        "max_model_len": engine.room,
        "max_input_tokens": engine.room,
        "max_tokens": engine.settings.max_output_tokens,
    }


def _system_one_card(settings: ServerSettings, created: int) -> dict[str, str]:
    """The same model in the form that clients of /v1/systemone read; its date is the server's."""
    return {
        "name": settings.model_name,
        "description": "DiffusionGemma, read by single decoder passes",
        "release_date": time.strftime("%Y-%m-%d", time.gmtime(created)),
    }


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    path = request.url.path
    what = "allow this method" if status == 405 else "exist"
    return _error(request, ApiError(status, f"{path} does not {what}{_base_url_advice(request)}."))


def _base_url_advice(request: Request) -> str:
    """How to fix an address that was given to a client with /v1 twice, or without it."""
    path = request.url.path
    if path.startswith("/v1/v1/"):
        return ": leave /v1 out of the client's base URL"
    if f"/v1{path}" in (getattr(route, "path", None) for route in request.app.routes):
        return f": it is /v1{path}, so end the client's base URL in /v1"
    return ""


class _Guard:
    """Wraps endpoints: key, content type, body size, errors, metrics and the log."""

    def __init__(self, engine: Engine, bodies: Bodies) -> None:
        self._engine = engine
        self._bodies = bodies

    def __call__(
        self, endpoint: Callable[[Request], Awaitable[Any]], *, open_to_all: bool = False
    ) -> Callable[[Request], Awaitable[Any]]:
        async def guarded(request: Request) -> Any:
            started = time.perf_counter()
            identity = new_id("req")
            try:
                _check_framing(request)
                if not open_to_all:
                    self._check_key(request)
                response = await endpoint(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                self._engine.report(error)
                response = _error(request, as_api_error(error))
            response.headers["x-request-id"] = identity

            def note() -> None:
                self._note(request, identity, getattr(response, "status_code", 200), started)

            if isinstance(response, EventStream):
                response.when_over(note)
            else:
                note()
            return response

        return guarded

    def json(
        self, handler: Handler, known: Known, *, forms: bool
    ) -> Callable[[Request], Awaitable[Any]]:
        """An endpoint that takes a JSON object; it has a place from before its body is read.

        forms: whether the object may be a part of a form, with files beside it."""

        async def endpoint(request: Request) -> Any:
            place = self._engine.door.admit()
            request.state.place = place
            try:
                body = await self._bodies.read(request, place, forms=forms)
                if self._engine.settings.log_prompts:
                    log.info(json.dumps({"event": "body", "path": request.url.path, "body": body}))
                fields = Fields(body, known=known, hold=place.hold)
                response = await handler(self._engine, fields, request)
            except BaseException:
                place.release()
                raise
            if isinstance(response, EventStream):
                response.when_over(place.release)
            else:
                place.release()
            return response

        return self(endpoint)

    def _check_key(self, request: Request) -> None:
        key = self._engine.settings.api_key
        if key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")

    def _note(self, request: Request, identity: str, status: int, started: float) -> None:
        seconds = time.perf_counter() - started
        path = getattr(request.scope.get("route"), "path", "?")
        self._engine.metrics.add("requests_total", route=path, status=str(status))
        self._engine.metrics.add("request_seconds_total", seconds, route=path)
        entry = {
            "event": "request",
            "id": identity,
            "method": request.method,
            "route": path,
            "status": status,
            "seconds": round(seconds, 3),
        }
        log.info(json.dumps(entry))


def _check_framing(request: Request) -> None:
    """Refuses a body of two lengths: a proxy that takes the other one sees another request."""
    if {"content-length", "transfer-encoding"} <= set(request.headers):
        why = "A request has content-length or transfer-encoding, not both."
        raise ApiError(400, why, close=True)


def _error(request: Request, error: ApiError) -> JsonResponse:
    status = error.status
    if request.url.path.startswith("/v1/messages"):
        body = error.anthropic()
    elif request.url.path == "/v1/systemone":
        # There, a body that is no valid request is 422 whatever is wrong with it.
        error.status = status = 422 if status == 400 else status
        body = error.system_one()
    else:
        body = error.openai()
    return JsonResponse(body, status_code=status, headers=error.headers)
