"""Middleware over a request's address: the names the server answers to, and doubled slashes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_dgemma.server.errors import ApiError

log = logging.getLogger("mlx_dgemma.server")


class KnownHosts:
    """Refuses requests for other names: a page of another site may point its own name at
    127.0.0.1, and the Host header gives it away."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        name = re.sub(r":\d*$", "", host).lower()
        if name in self._names:
            await self._app(scope, receive, send)
            return
        log.warning(
            json.dumps({"event": "refused", "host": host[:200], "path": scope["path"][:200]})
        )
        error = ApiError(
            400,
            f"This server does not answer to the name {name[:200]!r}: start it with "
            "--allowed-host NAME if the name is yours.",
            code="host_not_allowed",
        )
        anthropic = scope["path"].startswith("/v1/messages")
        body = error.anthropic() if anthropic else error.openai()
        await JSONResponse(body, status_code=error.status)(scope, receive, send)


class SingleSlashes:
    """Reads `/v1//models`, which a base URL ending in a slash gives, as `/v1/models`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "//" in scope["path"]:
            path = re.sub("/{2,}", "/", scope["path"])
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)
