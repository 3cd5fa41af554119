"""Damaged files of every kind end in success or in one sentence, quickly and in little memory."""

import json
import random

import pytest
from damage import damage_json, damage_safetensors
from damaged_files import KINDS, run
from safetensors import SafetensorError, deserialize

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.headers import read_header
from mlx_dgemma.untrusted_json import UntrustedJSONError, parse


@pytest.mark.slow
def test_damaged_files_of_every_kind():
    found = run(range(510), seed=20_261)
    assert not found.faults, found.faults[0]
    outcomes = {kind: {o for k, o in found.counts if k == kind} for kind in KINDS}
    assert all("sentence" in outcome for outcome in outcomes.values()), found.table()
    assert found.counts.total() == 510


@pytest.mark.slow
def test_what_is_no_file_under_a_files_name():
    """Every kind of file as a pipe, a folder, a socket, a device or a broken link, through every
    action: never a hang."""
    found = run(range(len(KINDS) * 6), 3, "special")
    assert not found.faults, found.faults[0]
    sentences = sum(count for (_, outcome), count in found.counts.items() if outcome == "sentence")
    assert sentences > found.counts.total() * 0.6


@pytest.mark.slow
def test_files_damaged_without_knowing_their_form():
    found = run(range(204), 20_262, "havoc")
    assert not found.faults, found.faults[0]
    assert found.counts.total() == 204


def test_headers_are_accepted_as_safetensors_accepts_them(checkpoint, tmp_path):
    """Whatever that library refuses is refused here; whatever is refused here alone is named."""
    whole = (checkpoint / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    stricter = 0
    accepted = 0
    for number in range(800):
        content = damage_safetensors(whole, random.Random(number))
        path.write_bytes(content)
        try:
            entries = read_header(path).entries
        except CheckpointError as error:
            entries, reason = None, str(error)
        try:
            theirs = dict(deserialize(content))
        except (SafetensorError, ValueError, OverflowError):
            theirs = None
        if theirs is None:
            assert entries is None, number
        elif entries is None:
            stricter += 1
            assert any(words in reason for words in STRICTER), (number, reason)
        else:
            accepted += 1
            assert {name: list(entry.shape) for name, entry in entries.items()} == {
                name: item["shape"] for name, item in theirs.items()
            }
    assert accepted > 25
    assert stricter < 50


# Dtypes of sub-byte numbers, dimensions that MLX cannot count, and the limits of what is parsed.
STRICTER = ("dtype", "shape", "holds", "nests", "larger than", "valid JSON", "bytes long")


def test_the_damage_of_json_is_itself_repeatable():
    text = json.dumps({"a": [1, 2, {"b": None}], "c": "d", "e": 1.5})
    seen = set()
    for number in range(300):
        damaged = damage_json(text, random.Random(number))
        assert damaged == damage_json(text, random.Random(number))
        try:
            seen.add(json.dumps(parse(damaged)))
        except UntrustedJSONError as error:
            seen.add(str(error)[:20])
    assert len(seen) > 100
