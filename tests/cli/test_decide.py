"""`mlx_dgemma.decide` on the demo checkpoint: how questions are written, and mistakes."""

import io
import json
import re
import sys

import pytest

from mlx_dgemma.cli.decide import main, parse_question


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_questions_in_short_form():
    assert parse_question("Is it urgent?") == {"type": "noul", "instructions": "Is it urgent?"}
    assert parse_question("Which? [a | b c]") == {
        "type": "choice",
        "instructions": "Which?",
        "criteria": ["a", "b c"],
    }
    assert parse_question("How? [low < high]")["type"] == "score"
    assert parse_question('{"type": "noul", "instructions": "x"}')["instructions"] == "x"


def test_a_line_for_each_question_when_piped(capsys):
    code, out, _ = run(
        capsys, "--state", "Hello.", "-q", "Is it a greeting?", "-q", "tone=Tone? [warm | cold]"
    )
    assert code == 0
    first, second = out.splitlines()
    assert re.fullmatch(r"q1\t(yes|no) [01]\.\d\d ± 0\.\d\d", first)
    assert re.fullmatch(r"tone\t(warm|cold) [01]\.\d\d ± 0\.\d\d, (warm|cold) [01]\.\d\d", second)


def test_json_repeats_exactly(capsys, tmp_path, monkeypatch):
    file = tmp_path / "q.json"
    file.write_text(json.dumps({"s": {"type": "score", "criteria": ["low", "high"]}}))
    outputs = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"a": 1}')))
        code, out, _ = run(capsys, "--state", "-", "--questions", str(file), "--json")
        assert code == 0
        outputs.append(json.loads(out))
    assert outputs[0]["answers"] == outputs[1]["answers"]
    assert outputs[0]["answers"]["s"]["legend"] == {"0": "low", "1": "high"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give a state"),
        (("--state", "x"), "Ask something"),
        (("--state", "x", "--state-file", "y", "-q", "a?"), "Give the state once"),
        (("--state", "x", "-q", "Which? [a]"), "has one answer"),
        (("--state", "x", "-q", "{bad"), "--question is not valid JSON ("),
        (("--state", "x", "-q", "How? [a < b | c]"), "mixes | and <"),
        (("--state", "x", "-q", "a=b?", "-q", "a=c?"), "Two questions are named a"),
        (("--state-file", "/nowhere", "-q", "a?"), "Cannot read /nowhere"),
        (("--state", "x", "-q", "Which? [a | a]"), "names an option twice"),
        (("--state", "x", "-q", "a?", "--orders", "0"), "orders=0 is not possible"),
    ],
)
def test_mistakes_get_one_sentence(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert message in err
    assert "Traceback" not in err
