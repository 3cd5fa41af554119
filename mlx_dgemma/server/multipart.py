"""multipart/form-data with a JSON part `request` and image parts that its `assets` name (RFC 7578).

The images are written into the assets, so what follows reads one JSON object either way.
"""

from __future__ import annotations

import base64
import re
from typing import Any

from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.untrusted_json import Limits, UntrustedJSONError, parse

REQUEST = "request"
_MOST_PARTS = 64
_MOST_HEADER = 4096
_BOUNDARY = re.compile(r'boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(r';\s*name="([^"\r\n]*)"', re.IGNORECASE)


def joined(content_type: str, body: bytes, limits: Limits) -> Any:
    """The JSON value of the part `request`, its assets' parts in it as base64.

    ApiError 400 for a body that is not such a form, 422 for assets and parts that do not match.
    """
    parts = _split(content_type, body)
    if REQUEST not in parts:
        raise ApiError(400, "The form needs a part named request that holds the JSON object.")
    try:
        value = parse(parts.pop(REQUEST), limits)
    except UntrustedJSONError as error:
        raise ApiError(400, f"The part named request {error}.") from error
    assets = value.get("assets") if isinstance(value, dict) else None
    for name, asset in assets.items() if isinstance(assets, dict) else ():
        part = asset.get("part") if isinstance(asset, dict) else None
        if part is None:
            continue
        content = parts.pop(part, None) if isinstance(part, str) else None
        if content is None:
            where = f"assets.{name}.part"
            raise ApiError(422, f"{where} must name a part that no other asset has.", param=where)
        asset["data_base64"] = base64.b64encode(content).decode()
        del asset["part"]
    if parts:
        raise ApiError(422, f"No asset names the part {min(parts)!r:.60}.", param="assets")
    return value


def _split(content_type: str, body: bytes) -> dict[str, bytes]:
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise ApiError(400, "The content type must name the boundary of the form's parts.")
    line = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(b"\r\n" + line, _MOST_PARTS + 2)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise ApiError(400, f"The form must end and have at most {_MOST_PARTS} parts.")
    parts: dict[str, bytes] = {}
    for piece in pieces[1:-1]:
        header, blank, content = piece.partition(b"\r\n\r\n")
        name = _NAME.search(header[:_MOST_HEADER].decode("latin-1"))
        if not blank or name is None or name[1] in parts:
            raise ApiError(400, "Every part of the form must have a name of its own.")
        parts[name[1]] = content
    return parts
