"""Small requests that ask for much: schemas that multiply, patterns that backtrack, pictures that
unpack to gigabytes. Seeded; a case is (name, method, path, headers, body).
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from .bounds import JSON, Request

CHAT = "/v1/chat/completions"
PATTERNS = (
    *("^(a+)+$", "(a|a)*b", "(.*)*(.*)*x", "(a|aa)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y"),
    *("(?:a{0,99}){0,99}", "a{1,1000}{1,1000}", "[a-z]{99999999}", "(?=a+)(?<=b)c", "(a)\\1*"),
    *("\\p{L}{1,5000}", "(" * 500 + "a" + ")" * 500, "a?" * 300 + "a" * 300, "[" * 400, "(?R)"),
    *("|".join(f"{i:x}y" for i in range(20_000)), "^.{0,4095}$", "(?i)" + "\u0130" * 200, "(?"),
)


def schema(rng: random.Random) -> Any:
    """A schema of at most a few kilobytes that means very much."""
    kind = rng.randrange(16)
    depth, wide = rng.choice((3, 8, 30, 63, 70, 400)), rng.choice((2, 5, 64, 500))
    leaf: Any = rng.choice(({"type": "integer"}, {"type": "string"}, {"enum": list(range(40))}, {}))
    if kind == 0:  # arrays of a fixed length, one in another
        return _nested(leaf, min(depth, 60), lambda s: {
            "type": "array", "items": s, "minItems": wide, "maxItems": wide})  # fmt: skip
    if kind == 1:
        return _nested(leaf, min(depth, 60), lambda s: {"anyOf": [s, s]})
    if kind == 2:  # a chain of references that doubles at every link
        links = {f"d{i}": {"type": "object", "properties": {n: {"$ref": f"#/$defs/d{i + 1}"}
                 for n in "ab"}, "required": ["a", "b"]} for i in range(depth)}  # fmt: skip
        return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{depth}": leaf}}
    if kind == 3:  # and one without an end
        return {"$ref": "#", "allOf": [{"$ref": "#"}] * min(wide, 9)}
    if kind == 4:
        return {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    if kind == 5:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 6:
        pattern, other = rng.choice(PATTERNS), {"type": "string", "pattern": rng.choice(PATTERNS)}
        return {"type": "object", "patternProperties": {pattern: leaf},
                "additionalProperties": other}  # fmt: skip
    if kind == 7:
        count = rng.choice((10**3, 10**6, 10**12, 2**63))
        return {"type": rng.choice(("string", "array")), "minLength": count, "maxLength": count,
                "minItems": count, "maxItems": count, "items": leaf}  # fmt: skip
    if kind == 8:
        return {"type": "object", "properties": {f"k{i}": leaf for i in range(wide)},
                "required": [f"k{i}" for i in range(0, wide, 2)]}  # fmt: skip
    if kind == 9:
        return {"enum": [rng.choice(("x", [], {})) for _ in range(20)] + ["y" * 3000] * 20}
    if kind == 10:
        bound = rng.choice((10**18, 10**300, 1e308, 5e-324, 0.1))
        return {"type": rng.choice(("integer", "number")), "minimum": -bound, "maximum": bound,
                "multipleOf": rng.choice((1e-300, 3, 10**15 + 1, 0.1))}  # fmt: skip
    if kind == 11:
        parts = [{"type": "object", "properties": {f"p{i}{j}": leaf for j in range(9)}}
                 for i in range(min(wide, 60))]  # fmt: skip
        return {rng.choice(("allOf", "oneOf", "anyOf")): parts}
    if kind == 14:  # a long chain of references, in place or through properties
        length = rng.choice((60, 300, 4000))
        wrap = rng.choice((lambda r: r, lambda r: {"properties": {"a": r}}, lambda r: {"not": r}))
        links = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
        return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": leaf}}
    if kind == 15:  # references to what stands in no schema's place, or oddly written
        inner: Any = rng.choice(
            (
                {"properties": 3},
                {"type": 5},
                {"$ref": "#/x y"},
                {"minimum": []},
                {"allOf": [{"$ref": "#/x y"}] * 2},
                leaf,
                "text",
                None,
                True,
                [],
            )
        )
        name = rng.choice(("x y", "x%20y", "", "a/b", "~1"))
        reference = rng.choice(
            (
                "#/x y",
                "#/x%20y",
                "#/x%2520y",
                "#/",
                "#/a~1b",
                "#/~01",
                "#/%",
                "#",
                "#x",
                "x",
                "#/title/0",
                "#/properties/a",
                "#//",
            )
        )
        return {
            "type": "object",
            name: inner,
            "title": "t",
            "not": {"required": ["z"]},
            "properties": {"a": {rng.choice(("$ref", "$dynamicRef")): reference}},
        }
    if kind == 12:
        return _nested(leaf, depth, lambda s: {"type": "object", "properties": {"a": s}})
    return _nested(leaf, min(depth, 40), lambda s: {"not": s, "if": s, "then": s, "else": s})


def _nested(inner: Any, depth: int, wrap: Any) -> Any:
    """Nested without copying; what would be written to more than a few kilobytes ends earlier."""
    for _ in range(depth):
        outer = wrap(inner)
        if len(json.dumps(outer)) > 20_000:
            break
        inner = outer
    return inner


def schema_requests(seed: int) -> Iterator[Request]:
    """Every place of a request that takes a schema or a pattern, without an end."""
    rng = random.Random(seed)
    base: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    while True:
        one = schema(rng)
        form = {"type": "json_schema", "json_schema": {"schema": one}}
        tool = {"type": "function", "function": {"name": "f", "parameters": one}}
        path, more = rng.choice(
            [
                (CHAT, {"response_format": form}),
                (CHAT, {"structured_outputs": {"json": one}}),
                (CHAT, {"structured_outputs": {"regex": rng.choice(PATTERNS)}}),
                (CHAT, {"structured_outputs": {"choice": ["x" * 999, "y"] * 30}}),
                (CHAT, {"tools": [tool]}),
                (CHAT, {"tools": [tool] * 5, "tool_choice": "required"}),
                ("/v1/messages", {"tools": [{"name": "f", "input_schema": one}]}),
                ("/v1/messages", {"output_format": {"type": "json_schema", "schema": one}}),
                ("/v1/responses", {"input": "a", "text": {
                    "format": {"type": "json_schema", "name": "s", "schema": one}}}),
            ]
        )  # fmt: skip
        yield "POST", path, JSON, json.dumps({**base, **more}).encode()


# Much of everything


def large_requests(_: int) -> Iterator[Request]:
    """Tens of thousands of messages, items, tools, assets and fields in one request each."""
    turn = {"role": "user", "content": "a"}
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    answered = {"role": "tool", "tool_call_id": "c", "content": "1"}
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    question = {"q": {"type": "noul", "instructions": "a"}}
    many = {f"k{i}": 1 for i in range(200_000)}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [turn] * 80_000}),
        (CHAT, {"messages": [*[asked, answered] * 15_000, turn]}),
        (CHAT, {"messages": [turn], "tools": [function] * 40_000}),
        (CHAT, {"messages": [turn], "tools": [function] * 1000, "tool_choice": "required"}),
        ("/v1/messages", {"messages": [turn], "max_tokens": 5, "tools": [
            {"name": f"f{i}", "input_schema": {"type": "object"}} for i in range(50_000)]}),
        ("/v1/responses", {"input": [turn] * 70_000}),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}] * 70_000}),
        ("/v1/responses", {"input": "a", "tools": [{"type": "custom", "name": "f"}] * 70_000}),
        ("/v1/responses", {"input": "a", "metadata": many}),
        ("/v1/systemone", {"state": "a", "questions": question, "assets": {
            f"q{i}": {"data_base64": "A"} for i in range(70_000)}}),
        ("/v1/completions", {"prompt": "a", **many}),
    ]  # fmt: skip
    for path, body in bodies:
        yield "POST", path, JSON, json.dumps(body).encode()
    for inner in _much_json():
        yield "POST", CHAT, JSON, b'{"messages": [{"role": "user", "content": "a"}], "x": ' + inner


def _much_json() -> Iterator[bytes]:
    """Values of nearly the largest size that is read, each much of one thing; many are no JSON."""
    size = (16 << 20) - 4096
    nested = b"[" * 65  # more than may be: it is looked at more closely
    for piece in (b'""', b'"\\""', b'"\\\\"', b"]", b'"abcdefgh",'):
        yield nested + piece * (size // len(piece))
    yield nested + b'"' + b"\\\\" * (size // 2)
    yield b"[" * size
    for piece in (b"\\u0041", b"\\ud83d\\ude00", "\u00e9".encode(), "\U0001f600".encode(), b"<"):
        yield b'"' + piece * (size // len(piece)) + b'"}'
    yield b" " * size + b"1}"
    yield b"1" * size + b"}"
    for piece in (b'"abcdefgh",', b"[],", b'{"a":""},', b"1,", b"1.5,"):
        yield b"[" + piece * (298_000 // (2 if b'"' in piece or b"[" in piece else 1)) + b"1]}"
    yield b"{" + b",".join(b'"k%d":""' % number for number in range(298_000)) + b"}}"


# Pictures


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes | None = None, colour: int = 2) -> bytes:
    """A PNG of any size; without data it is black, and compresses a thousand times."""
    if data is None:
        channels = {0: 1, 2: 3, 6: 4}[colour]
        squeeze = zlib.compressobj(9)
        row = b"\0" * (width * channels + 1)
        data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    )


def saved(form: str, size: tuple[int, int], **options: Any) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, (9, 200, 3)).save(held, form, **options)
    return held.getvalue()


def pictures(rng: random.Random) -> Iterator[bytes]:
    """Bombs first, then whole ones that are cut or changed, without an end."""
    nothing = zlib.compress(b"\0" * 999)
    yield png(9_000, 9_000, colour=0)  # 81 million pixels in 80 kB
    yield png(89_000_000, 1, nothing)
    yield png(1, 89_000_000, nothing)
    yield png(89_000_000, 1, zlib.compress(b"\0" * 267_000_001, 9))
    yield png(2**31 - 1, 2**31 - 1, nothing)
    yield png(0, 0, nothing)
    yield png(30, 30, zlib.compress(b"\0" * 50_000_000, 9))  # more data than pixels
    text = zlib.compress(b"\0" * 60_000_000, 9)
    yield png(3, 3)[:-12] + _chunk(b"zTXt", b"k\0\0" + text) + _chunk(b"IEND", b"")
    yield png(3, 3)[:-12] + _chunk(b"iCCP", b"k\0\0" + text) + _chunk(b"IEND", b"")
    yield saved("TIFF", (4000, 4000), compression="tiff_lzw")
    yield saved("GIF", (64, 64), save_all=True, append_images=[Image.new("P", (64, 64))] * 500)
    yield b"<svg xmlns='http://www.w3.org/2000/svg' width='99999999' height='99999999'/>"
    yield b"P6 99999 99999 255 " + b"\0" * 99
    whole = [saved(form, (40, 30)) for form in
             ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "JPEG2000", "PPM")]  # fmt: skip
    while True:
        content = bytearray(rng.choice(whole))
        for _ in range(rng.choice((0, 1, 1, 4))):
            at = rng.randrange(min(len(content), rng.choice((30, len(content)))))
            size = rng.choice((1, 1, 2, 4))
            content[at : at + size] = rng.choice((rng.randbytes(1), b"\xff", b"\0")) * size
        yield bytes(content[: rng.choice((None, rng.randrange(1, len(content))))])


def picture_requests(seed: int) -> Iterator[Request]:
    """Each picture alone, and now and then many of them in one request."""
    rng = random.Random(seed)
    for number, content in enumerate(pictures(rng)):
        count = rng.choice((1, 1, 1, 3, 64, 65)) if number > 12 else 1
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        part = {"type": "image_url", "image_url": {"url": url}}
        turn = {"role": "user", "content": [part] * count}
        yield "POST", CHAT, JSON, json.dumps({"messages": [turn], "max_tokens": 9}).encode()
