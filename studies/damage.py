"""Damage to files that knows what they are: JSON by its values, safetensors by their headers.

The same number gives the same damage, so that a case can be repeated by its number.
"""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Written as they stand into the JSON text, which Python's writer could not write.
RAW = (
    "9" * 5000,
    "-" + "9" * 400,
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "1." + "1" * 5000,
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "[" + "0," * 300_000 + "0]",
    '"\\ud800"',
    '"\\u0000"',
    "0x10",
    "1e400000000",
    "",
)
VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    10**18,
    10**30,
    -(2**63),
    0.0,
    -0.5,
    0.5,
    1e-320,
    1e30,
    1e308,
    -1e308,
    "",
    "a",
    "x" * 100_000,
    "two\nlines\x1b[31m",
    "\u202e",
    "../../etc/passwd",
    "/dev/zero",
    "float32",
    "(a+)+$",
    "(.*)*(.*)*(.*)*x",
    "(?P<a>",
    "{{ 1/0 }}",
    [],
    {},
    [None],
    [[]],
    [-1],
    [0, 0],
    [2**62, 2**62],
    [0] * 200,
    [2**31] * 4,
    {"a": 1},
    {"content": None},
    {"": ""},
)


def damage_json(text: str, chance: random.Random) -> str:
    """The text of a JSON value after one to three changes."""
    value = json.loads(text)
    raw: dict[str, str] = {}
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _change(value, chance, raw)
    changed = json.dumps(value)
    for mark, piece in raw.items():
        changed = changed.replace(f'"{mark}"', piece)
    return _damage_text(changed, chance) if chance.random() < 0.1 else changed


def _change(value: Any, chance: random.Random, raw: dict[str, str]) -> Any:
    places = list(_places(value))
    if not places:
        return _anything(chance, raw)
    holder, key = chance.choice(places)
    kind = chance.random()
    if kind < 0.55:
        holder[key] = _anything(chance, raw)
    elif kind < 0.65:
        del holder[key]
    elif kind < 0.75:
        other, place = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[place])) if place in _keys(other) else None
    elif kind < 0.85 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * chance.choice((2, -1, 0.5, 10**6, 3)) + chance.choice((0, 1))
    elif kind < 0.92 and isinstance(holder, dict):
        name = chance.choice((f"{key}x", "", str(10**25), "0", "a.b", key.upper(), "\u0661"))
        holder[name] = holder.pop(key)
    else:
        holder[key] = [holder[key]] * chance.choice((1, 2, 50))
    return value


def _keys(holder: Any) -> Any:
    return range(len(holder)) if isinstance(holder, list) else holder


def _places(value: Any) -> Any:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            for key in list(_keys(one))[:400]:
                yield one, key
                waiting.append(one[key])


def _anything(chance: random.Random, raw: dict[str, str]) -> Any:
    if chance.random() < 0.25:
        mark = f"@{len(raw)}@"
        raw[mark] = chance.choice(RAW)
        return mark
    return json.loads(json.dumps(chance.choice(VALUES)))


def _damage_text(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    if chance.random() < 0.5:
        return text[:at]
    return text[:at] + chance.choice(("[", "}", ",", '"', "\x00", "\\", "{" * 3000)) + text[at:]


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """A file cut short, made longer, or with some bytes changed."""
    kind = chance.random()
    if kind < 0.4:
        return content[: chance.randrange(len(content) + 1)]
    if kind < 0.5:
        return content + bytes(chance.randrange(1, 300))
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 9)):
        at = chance.randrange(min(len(changed), chance.choice((16, 400, len(changed)))))
        changed[at] = chance.randrange(256)
    return bytes(changed)


def damage_safetensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with a changed header, length or body."""
    kind = chance.random()
    length = int.from_bytes(content[:8], "little")
    if kind < 0.15:
        return damage_bytes(content, chance)
    if kind < 0.22:
        claimed = chance.choice((0, 1, 2, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + content[8:]
    text, data = content[8 : 8 + length].decode(), content[8 + length :]
    text = _damage_entries(json.loads(text), chance) if kind < 0.55 else damage_json(text, chance)
    header = text.encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % chance.choice((1, 8)))
    return len(header).to_bytes(8, "little") + header + data


def _damage_entries(header: dict[str, Any], chance: random.Random) -> str:
    """Byte ranges that overlap, leave holes or lie elsewhere; shapes and dtypes that still fit."""
    names = [name for name in header if name != "__metadata__"]
    entry = header[chance.choice(names)]
    begin, end = entry["data_offsets"]
    other = header[chance.choice(names)]
    kind = chance.randrange(9)
    if kind == 0:
        entry["data_offsets"] = list(other["data_offsets"])
    elif kind == 1:
        shift = chance.choice((-8, -1, 1, 8, 2**40, -(2**40)))
        entry["data_offsets"] = [begin + shift, end + shift]
    elif kind == 2:
        entry["data_offsets"] = [end, begin]
    elif kind == 3:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 4:
        entry["shape"] = [*entry["shape"], chance.choice((0, 1, 2**62, -1, 1.0, True))]
    elif kind == 5:
        entry["dtype"] = chance.choice(("F64", "I8", "F4", "F8_E4M3", "bf16", "BOOL", "U32"))
    elif kind == 6:
        entry["shape"], entry["data_offsets"] = [0, chance.choice((3, 2**40))], [begin, begin]
    elif kind == 7:
        header[chance.choice(("surprise", "a\nb", "", "x" * 9999))] = dict(other)
    else:
        entry["data_offsets"] = chance.choice(([], [0], [0.0, 1.5], [0, 1, 2], "01", None))
    return json.dumps(header)


def replace_by_special(path: Path, chance: random.Random) -> None:
    """A pipe, a folder, a socket or a device under a file's name."""
    path.unlink()
    kind = chance.randrange(7)
    if kind == 6:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            with socket.socket(socket.AF_UNIX) as bound:
                before = os.getcwd()
                os.chdir(folder)  # a socket's whole path may have a hundred characters
                bound.bind("s")
                os.chdir(before)
            os.rename(Path(folder) / "s", path)
    elif kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        targets = ("/dev/zero", "/dev/full", path.name, "/nowhere")
        path.symlink_to(targets[kind - 2])


def damage_file(path: Path, chance: random.Random) -> None:
    """Damages a file by what its name says it is."""
    content = path.read_bytes()
    path.unlink()  # it may be a link to the whole file
    path.write_bytes(content)
    kind = chance.random()
    if kind < 0.03:
        replace_by_special(path, chance)
    elif kind < 0.06:
        path.write_bytes(damage_bytes(content, chance))
    elif path.suffix == ".safetensors":
        path.write_bytes(damage_safetensors(content, chance))
    elif path.suffix == ".json":
        text = damage_json(content.decode(), chance)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(damage_bytes(content, chance))


Damage = Callable[[Path, random.Random], None]
