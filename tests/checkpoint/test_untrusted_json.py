"""JSON from outside: what is refused, in which words, and at what cost."""

import json
import os
import socket
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import read_json, read_text
from mlx_dgemma.untrusted_json import (
    _STRING,
    Limits,
    UntrustedJSONError,
    _outside_strings,
    parse,
    printable,
    shown,
)

REFUSED = {
    "deep": ("[" * 100_000, "deeper than 64"),
    "deep and whole": ("[" * 100_000 + "]" * 100_000, "deeper than 64"),
    "deep objects": ('{"a":' * 100 + "1" + "}" * 100, "deeper than 64"),
    "digits": ("1" * 5000, "5,000 digits"),
    "negative digits": ("-" + "1" * 100, "101 digits"),
    "infinite": ("[1e999]", "out of range"),
    "long fraction": ("0." + "1" * 5000, "out of range"),
    "constant": ("[NaN]", "NaN"),
    "infinity": ('{"a": -Infinity}', "-Infinity"),
    "surrogate": ('{"a": ["\\ud800"]}', "half a character"),
    "surrogate key": ('{"\\uDFFF": 1}', "half a character"),
    "parts": ("[" + "[]," * 600_000 + "[]]", "more than 500,000"),
    "strings": ("[" * 65 + '""' * 3_000_000, "more than 500,000"),
    "size": (" " * (17 << 20), "larger than"),
    "encoding": (b'{"a": "\xff"}', "UTF-8"),
    "syntax": ("{", "not valid JSON"),
    "nothing": ("", "not valid JSON"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_costs_little(kind):
    text, words = REFUSED[kind]
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(UntrustedJSONError, match=words) as caught:
        parse(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - began < 5
    assert peak < 64 << 20
    assert "\n" not in str(caught.value)


def test_brackets_and_commas_in_strings_do_not_count():
    text = json.dumps({"a": "[{," * 1_000_000, "b": '\\"[['})
    assert parse(text) == json.loads(text)
    assert parse(text.encode()) == json.loads(text)


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(_values, st.booleans())
def test_everything_else_is_read_as_python_reads_it(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse(text) == json.loads(text)
    bare = json.dumps(_without_strings(value))
    parts = sum(map(bare.count, "[{,"))
    depth = max(np.cumsum([(c in "[{") - (c in "]}") for c in bare]))
    assert parse(text, Limits(depth=depth, parts=parts)) == json.loads(text)
    if depth:
        with pytest.raises(UntrustedJSONError, match="deeper"):
            parse(text, Limits(depth=depth - 1, parts=parts))
        with pytest.raises(UntrustedJSONError, match="more than"):
            parse(text, Limits(depth=depth, parts=parts - 1))


def _without_strings(value):
    """The same nesting and as many members, and no bracket or comma in a string."""
    if isinstance(value, dict):
        return {str(i): _without_strings(inner) for i, inner in enumerate(value.values())}
    if isinstance(value, list):
        return [_without_strings(inner) for inner in value]
    return 0


def test_messages_show_a_value_on_one_short_line():
    for value in ("x" * 1000, "a\nb", {"a": 1}, [], list(range(99)), 10**60, None, 1.5, object):
        text = shown(value)
        assert len(text) <= 60
        assert text.isprintable()
    assert shown({}) == "{}"
    assert printable("a\x1b[31m\n" * 50).isprintable()
    assert len(printable("b" * 500)) <= 120


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    kinds = {"pipe": "a pipe", "folder": "a folder", "link": "a pipe", "socket": "a socket"}
    for name, kind in kinds.items():
        with pytest.raises(CheckpointError, match=f"it is {kind}, not a file"):
            read_json(tmp_path / name)
    listening.close()
    with pytest.raises(CheckpointError, match="it is a device, not a file"):
        read_json("/dev/zero")
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="null"):
        read_json(f"{tmp_path}/a\0b")


def test_text_files_are_bounded(tmp_path):
    (tmp_path / "long").write_text("x" * 100)
    assert read_text(tmp_path / "long", 100) == "x" * 100
    with pytest.raises(OSError, match="it is larger than 99 bytes"):
        read_text(tmp_path / "long", 99)


@given(st.lists(st.sampled_from(['"', '"', "\\", "\\\\", "a", "[", "]", "{", ",", "\n", "\u00e9"])))
def test_strings_are_left_out_piece_by_piece(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert "".join(_outside_strings(text)) == _STRING.sub("", text)


@pytest.mark.parametrize("text", ['"' + "\\\\" * 300_000 + '"]', '"a",' * 2000, '"' + "\\n" * 9000])
def test_long_and_many_strings_are_left_out_whole(text: str) -> None:
    assert "".join(_outside_strings(text)) == _STRING.sub("", text)


def test_a_text_of_many_strings_is_read_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read by Python's own reader, between whose steps other threads get their turns."""
    texts = ['{"a": [1, -2.5e3, "\\u00e9\\n"], "a": null, "b": {}}', "[1, 2", '{"a" 1}', '["\\x"]',
             "[1e999]", "\ufeff[]", '"\\ud800"', "", "NaN", "[truee]"]  # fmt: skip

    def outcome(text: str) -> Any:
        try:
            return parse(text)
        except UntrustedJSONError as error:
            return str(error)

    usual = [outcome(text) for text in texts]
    monkeypatch.setattr("mlx_dgemma.untrusted_json._MOST_AT_ONCE", -1)
    assert [outcome(text) for text in texts] == usual
