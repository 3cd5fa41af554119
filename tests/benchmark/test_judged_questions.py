"""The judges of the questions for large models, and two presets asked the same ones."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.benchmark import code_judge
from mlx_dgemma.benchmark.against import Pair, side_by_side, summary
from mlx_dgemma.benchmark.code_judge import is_harmless, passes
from mlx_dgemma.benchmark.costs import expert_rows, step_costs
from mlx_dgemma.benchmark.judged_questions import QUESTIONS, questions
from mlx_dgemma.benchmark.quality import Answer
from mlx_dgemma.benchmark.synthetic import synthetic_config
from mlx_dgemma.cli.benchmark.flags import main
from mlx_dgemma.cli.benchmark.quality import verdict
from mlx_dgemma.evaluation.significance import compare
from mlx_dgemma.model.config import ModelConfig


def asked(task, number=0, seed=1):
    example = questions(task, number + 1, seed)[number]
    return example.messages[0]["content"], example.verify


@pytest.mark.parametrize("task", QUESTIONS)
def test_questions_repeat_themselves_and_refuse_nonsense(task):
    first, again, other = (
        [one.messages for one in questions(task, 12, seed)] for seed in (1, 1, 2)
    )
    assert first == again != other
    for example in questions(task, 12, 1):
        for text in ("", "I do not know.", "```\n```", "[" * 5000, "0"):
            assert not example.verify(text)


def test_the_last_number_is_the_answer():
    prompt, judge = asked("arithmetic")
    a, b, c = map(int, re.findall(r"\d+", prompt))
    right = a * b + c
    assert judge(str(right))
    assert judge(f"{a} * {b} + {c} = {right:,}.")
    assert not judge(str(right + 1))
    assert not judge(f"{right} or {right + 1}")


def test_json_is_compared_with_what_was_asked():
    prompt, judge = asked("json object")
    name = prompt.split("about ")[1].split(",")[0]
    age, count = (int(one) for one in re.findall(r"\d+", prompt))
    town = prompt.split("lives in ")[1].split(",")[0]
    hobbies = ["chess", "rowing", "knitting", "opera"][:count]
    right = {"name": name, "age": age, "town": town, "hobbies": hobbies}
    assert judge(json.dumps(right))
    assert judge(f"```json\n{json.dumps(right)}\n```")
    for wrong in (
        {**right, "age": str(age)},
        {**right, "hobbies": hobbies[:-1]},
        {**right, "hobbies": [hobbies[0]] * count},
        {**right, "more": 1},
    ):
        assert not judge(json.dumps(wrong))


def test_a_list_has_its_length_and_order():
    prompt, judge = asked("alphabet")
    count = int(prompt.split()[1])
    names = ["adder", "bear", "cat", "dog", "eel", "fox", "gnu", "hare", "ibis"][:count]
    assert judge("\n".join(names))
    assert not judge("\n".join(reversed(names)))
    assert not judge("\n".join(names[:-1]))
    assert not judge("\n".join(f"- {name}" for name in names))
    assert not judge("\n".join([names[0], *names[:-1]]))


def test_code_is_run():
    prompt, judge = asked("code")
    k = int(prompt.split("multiples of ")[1].split()[0])
    right = f"def f(n):\n    return sum(x for x in range(1, n + 1) if x % {k} == 0)"
    assert judge(right)
    assert judge(f"```python\nimport math\nprint('hello')\n{right}\n```")
    assert not judge(right.replace("n + 1", "n"))
    assert not judge(right.replace("return", "yield"))


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef f(n): return n",
        "from subprocess import run\ndef f(n): return n",
        "def f(n): return open('/etc/passwd').read()",
        "def f(n): return ().__class__.__base__.__subclasses__()",
        "def f(n): return __import__('os').getcwd()",
        "def f(n): return getattr(n, 'real')",
        "from . import x",
        "def f(n):",
        "f = eval('lambda n: n')",
    ],
)
def test_code_that_reaches_out_is_not_run(code, monkeypatch):
    monkeypatch.setattr(code_judge.subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    assert not is_harmless(code)
    assert not passes(code, [(1, 1)])


@pytest.mark.parametrize(
    "body", ["while True: pass", "return 'x' * (1 << 32)", "return f(n)", "raise SystemExit"]
)
def test_code_that_does_not_end_is_stopped(body, monkeypatch):
    monkeypatch.setattr(code_judge, "SECONDS", 1)
    assert not passes(f"def f(n):\n    {body}", [(1, 1)])


def answer(right, text="a", tokens=10, computed=(32, 32)):
    return Answer(right, (len(computed),), tokens, 0.5, computed, 0, text)


def test_a_summary_counts_who_was_right():
    pairs = [
        Pair("sort", 0, answer(True), answer(True, computed=(32,))),
        Pair("sort", 1, answer(True), answer(False, "b")),
        Pair("sort", 2, answer(False), answer(True, "b")),
        Pair("list", 0, answer(False), answer(False)),
    ]
    found = summary(pairs)
    assert found["all"]["both"] == found["all"]["first_alone"] == found["all"]["neither"] == 1
    assert found["all"]["same_text"] == 2
    assert found["tasks"]["sort"]["first"]["right"] == pytest.approx(2 / 3)
    assert found["tasks"]["sort"]["first"]["positions_per_token"] == pytest.approx(6.4)
    assert found["tasks"]["sort"]["second"]["positions_per_token"] == pytest.approx(160 / 30)
    assert '"text"' not in json.dumps(found["questions"])  # a report holds no answer


def test_presets_are_asked_the_same_by_turns():
    model, tokenizer = load()
    pairs = side_by_side(
        model, tokenizer, ("reference", "turbo"), prompts=2, tasks=["count", "list"]
    )
    assert [(pair.task, pair.question) for pair in pairs] == [
        ("count", 0), ("count", 1), ("list", 0), ("list", 1),
    ]  # fmt: skip
    for pair in pairs:
        assert pair.first.right
        assert pair.second.right
        assert set(pair.first.computed) == {model.config.canvas_length}
        assert sum(pair.second.computed) < sum(pair.first.computed)


def test_the_command_compares_two_presets(capsys, tmp_path):
    path = tmp_path / "report.json"
    ask = ["--quality", "--preset", "turbo", "--against", "reference", "--prompts", "2"]
    assert main([*ask, "--task", "count", "--report", str(path)]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "turbo beside reference: +0.000 right, judged alike in all questions" in words
    assert "with 2 of them, up to 77.6% of such questions" in words
    assert "…" not in shown  # in the 80 columns of no terminal
    assert re.search("count +reference +1.000 ± 0.000 ", shown)
    found = json.loads(path.read_text())
    assert (found["kind"], found["preset"]) == ("quality", "turbo")
    assert found["quality"]["against"] == "reference"
    assert found["quality"]["difference"]["n"] == 2
    assert "Count from" not in path.read_text()


def test_a_verdict_on_questions_that_were_judged_differently():
    both = asdict(compare([1, 1, 1, 0], [1, 0, 1, 0]))
    assert verdict(both, "turbo", "reference").startswith("turbo beside reference: -0.250 right")
    assert "better in 0 questions and worse in 1, p = 1 (McNemar" in verdict(both, "a", "b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--against", "turbo"], "give --quality with it"),
        (["--quality", "--against", "reference"], "are both reference"),
        (["--quality", "--against", "turbo", "--preset", "turbo"], "are both turbo"),
        (
            ["--quality", "--preset", "turbo", "--against", "reference", "--task", "chess"],
            "no task",
        ),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(given, words, capsys):
    assert main(given) == 2
    assert words in capsys.readouterr().err


# What steps over some positions cost


@pytest.fixture(scope="module")
def published():
    return ModelConfig.from_dict(synthetic_config("26b-4bit"))


@pytest.mark.parametrize("rows", [1, 32, 64, 256])
@pytest.mark.parametrize("tile", [1, 8, 16])
def test_rows_of_an_expert_are_those_of_a_drawn_routing(published, rows, tile):
    text, rng = published.text, np.random.default_rng(rows)
    means = []
    for _ in range(40):
        chosen = np.concatenate(
            [rng.permutation(text.num_experts)[: text.top_k_experts] for _ in range(rows)]
        )
        counts = np.bincount(chosen, minlength=text.num_experts)
        means.append((-(-counts // tile) * tile).mean())
    error = 4 * np.std(means) / np.sqrt(len(means)) + 1e-9
    assert abs(np.mean(means) - expert_rows(text, rows, tile)) < error


def test_a_step_over_some_positions_costs_their_share_and_the_whole_weights(published):
    whole = step_costs(published, 1024)
    assert whole == step_costs(published, 1024, positions=published.canvas_length)
    quarter = step_costs(published, 1024, positions=published.canvas_length // 4)
    for name in ("dense", "router", "head", "attention"):
        assert quarter[name].flops == pytest.approx(whole[name].flops / 4)
    assert quarter["dense"].nbytes == whole["dense"].nbytes
    tiled = step_costs(published, 1024, positions=published.canvas_length // 4, tile=16)
    of_whole = step_costs(published, 1024, tile=16)["experts"].flops
    # Few rows leave most of a tile empty: a quarter of the positions is far from a quarter here.
    assert tiled["experts"].flops > 0.5 * of_whole
