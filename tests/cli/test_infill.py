"""`mlx_dgemma.infill`, piped as an editor would use it, and its mistakes."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest

from mlx_dgemma.cli.infill import main, paint
from mlx_dgemma.infilling.filled import Filling, Infill, TokenInfo
from mlx_dgemma.model import Model

QUICK = ["--seed", "1", "--max-denoising-steps", "2"]


def test_piped_output_is_the_text_alone(capsys):
    assert main(["the old <hole:2> sings.", *QUICK]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("the old ")
    assert captured.out.endswith(" sings.\n")
    assert "demo checkpoint" in captured.err


def test_standard_input_to_standard_output(capsys, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO("über <hole:1> Ω\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["-", *QUICK]) == 0
    out = capsys.readouterr().out
    assert out.startswith("über ")
    assert out.endswith(" Ω\n")
    assert "<hole" not in out


def test_a_preset_is_one_of_those_there_are(capsys):
    assert main(["the old <hole:2> sings.", "--preset", "balanced", "--seed", "1"]) == 0
    assert capsys.readouterr().out.endswith(" sings.\n")
    with pytest.raises(SystemExit) as ended:
        main(["the <hole:1>", "--preset", "fast"])
    assert ended.value.code == 2
    assert "turbo" in capsys.readouterr().err


def test_prefix_and_suffix_give_the_fill_alone(capsys):
    call = ["--prefix", "the <hole> ", "--suffix", " sings.", "--length", "2", "--fill-only"]
    assert main([*call, *QUICK]) == 0
    out = capsys.readouterr().out
    assert "sings." not in out
    assert out.endswith("\n")


def test_json_tells_each_token_and_alternative(capsys):
    assert main(["the <hole:2> sings.", "--n", "2", "--json", *QUICK]) == 0
    record = json.loads(capsys.readouterr().out)
    (filling,) = record["fillings"]
    assert len(filling["tokens"]) == filling["length"]
    assert filling["length"] in (2, 3)  # the space before the hole may need a place of its own
    assert {"logprob", "entropy", "settled", "span"} <= set(filling["tokens"][0])
    assert [alternative["seed"] for alternative in record["alternatives"]]
    assert {record["seed"], record["alternatives"][0]["seed"]} == {1, 2}


def test_edit_rewrites_a_span_and_says_what_it_replaced(capsys):
    call = ["the old dog sings.", "--edit", "8:11", "--length", "1", "--json"]
    assert main([*call, *QUICK]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"].startswith("the old ")
    assert record["text"].endswith(" sings.")
    assert record["fillings"][0]["replaced"] == "dog"


def test_refine_keeps_what_stands_outside(capsys):
    assert main(["the <hole:2> sings.", "--refine", "1.0", *QUICK]) == 0
    assert capsys.readouterr().out.endswith(" sings.\n")


def test_a_filling_can_be_told_without_colour():
    tokens = (TokenInfo("brown", (4, 9), -0.01, 0.0, 1), TokenInfo(" dog", (9, 13), -3.0, 1.0, 2))
    filling = Filling("brown dog", (4, 13), 2, tokens, replaced="cat")
    result = Infill("the brown dog sings", (filling,), -1.5, 0, 2, True, 2)
    painted = paint(result)
    assert painted.plain == "the [cat]«brown dog» sings"
    styles = {painted.plain[span.start : span.end]: str(span.style) for span in painted.spans}
    assert "underline" in styles[" dog"]
    assert "strike" in styles["[cat]"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["no hole"], "no hole"),
        (["<hole:9-1>"], "not possible"),
        (["<hole:99>"], "longer than the canvas"),
        (["<hole>", "--prefix", "a"], "once"),
        (["<hole>", "--strength", "0.5"], "--edit"),
        (["<hole>", "--length", "2"], "write <hole:N> instead"),
        (["text", "--edit", "3:99"], "span"),
        (["--file", "/nowhere/at/all"], "Cannot read"),
        (["<hole>", "--n", "0"], "n=0"),
        (["word " * 9000 + "<hole>"], "fit into the context beside a canvas of 32: shorten them"),
        (["<hole>", "--prompt", "word " * 9000], "fit into the context beside a canvas of 32"),
        (["<hole>", "--model", "/nowhere/at/all"], "no folder"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(call, words, capsys):
    assert main(call) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("value", ["-1", "1.5", "nan"])
def test_a_probability_lies_between_0_and_1(value, capsys):
    with pytest.raises(SystemExit) as left:
        main(["<hole:1>", f"--refine={value}"])
    assert left.value.code == 2
    assert f"{value} is not between 0 and 1" in capsys.readouterr().err


def test_a_context_in_8_bits(capsys, monkeypatch):
    made = []
    monkeypatch.setattr(
        Model, "make_cache", lambda self, kv_bits=None, real=Model.make_cache: (
            made.append(kv_bits) or real(self, kv_bits)
        )
    )  # fmt: skip
    assert main(["the old <hole:2> sings.", "--kv-bits", "8", "--n", "2", *QUICK]) == 0
    assert capsys.readouterr().out.endswith(" sings.\n")
    assert set(made) == {8}
