"""JSON on its way out: always valid UTF-8, whatever a model wrote into it."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def encode(value: Any) -> bytes:
    """A value as JSON. Half characters (lone surrogates), which a tool call's escapes can spell,
    become question marks: UTF-8 cannot carry them."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class JsonResponse(Response):
    """A whole answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)
