"""`mlx_dgemma.evaluate` by lm-evaluation-harness's own evaluator, on task files of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness: pip install -e '.[evaluate]'")

from lm_eval.tasks import TaskManager

from mlx_dgemma.cli.evaluate import main
from mlx_dgemma.decoding.settings import PRESETS
from mlx_dgemma.evaluation import harness
from mlx_dgemma.evaluation import results as results_module
from mlx_dgemma.evaluation.harness import Asked, ChatPrompt, Harness, Manner, seed_of
from mlx_dgemma.machine.reports import read_report
from mlx_dgemma.prompt import encode_messages

OTHER = next(name for name in PRESETS if name != "reference")


@pytest.fixture(scope="module")
def results(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The results of two presets."""
    folder = tmp_path_factory.mktemp("results")
    common = ["--tasks", "letters", "--include-path", str(tasks), "--output-dir", str(folder)]
    assert main([*common, "--seeds", "2", "--preset", OTHER, "--log-samples"]) == 0
    assert main(common) == 0
    found = sorted(folder.glob("*.json"), key=lambda path: "reference" in path.name)
    assert len(found) == 2
    return found[0], found[1]


def test_a_result_says_what_was_right_and_what_it_cost(results: tuple[Path, Path]) -> None:
    found = read_report(results[0], ["evaluation"])
    task = found["tasks"]["letters"]
    assert (found["preset"], found["seeds"], found["chat_template"]) == (OTHER, 2, True)
    metric = task["metrics"]["exact_match,none"]
    assert len(metric["runs"]) == 2
    assert metric["value"] == sum(metric["runs"]) / 2
    assert metric["value"] >= 0.5  # the demo model knows this puzzle
    assert task["questions"] == 4
    for sample in found["samples"]:
        assert sample["steps"] >= 1
        assert sample["seconds"] > 0
        assert sample["tokens_per_forward"] == pytest.approx(sample["tokens"] / sample["steps"])
        assert len(sample["replies"]) == 2
    right = [sample["values"]["exact_match"] for sample in found["samples"]]
    assert sum(right) / 4 == pytest.approx(metric["value"])
    plain = read_report(results[1])
    assert all("replies" not in sample for sample in plain["samples"])
    assert "CANVAS" not in results[1].read_text()  # no text of a data set


def test_two_results_are_compared_question_by_question(
    results: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--compare", *map(str, results), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["differences"]
    assert (one["task"], one["metric"], one["n"]) == ("letters", "exact_match,none", 4)
    assert 0 < one["p"] <= 1
    assert found["a"]["preset"] == OTHER
    assert found["b"]["costs"]["letters"]["steps_per_block"] > 0
    assert main(["--compare", *map(str, results)]) == 0
    assert "paired by question" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        {"samples": None}, {"samples": "hello"}, {"samples": [1]}, {"samples": [{}]},
        {"tasks": None}, {"tasks": [1]}, {"tasks": {"letters": 3}},
        {"tasks": {"letters": {"cost": {"steps": 1}}}}, {"tasks": {"letters": {"cost": [1]}}},
    ],
)  # fmt: skip
def test_a_damaged_result_is_not_compared(
    results: tuple[Path, Path],
    damage: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({**json.loads(results[0].read_text()), **damage}))
    for pair in ((damaged, results[0]), (results[0], damaged)):
        assert main(["--compare", *map(str, pair)]) == 2
        told = capsys.readouterr().err
        assert told == f"error: {damaged} is no whole result: a task or a question in it is " \
            "damaged.\n"  # fmt: skip


@pytest.mark.parametrize("value", ["1", None, True])
def test_a_result_s_values_are_numbers(
    results: tuple[Path, Path], value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(results[0].read_text())
    found["samples"][0]["values"]["exact_match"] = value
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(found))
    assert main(["--compare", str(results[0]), str(damaged), "--json"]) == 2
    assert "is no whole result" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_task_s_name_is_text_and_no_markup(
    results: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "named.json"
    named.write_text(results[0].read_text().replace('"letters"', '"[/x]\\u001b[31m"'))
    assert main(["--compare", str(named), str(named)]) == 0
    shown = capsys.readouterr().out
    assert "[/x]" in shown
    assert "\x1b[31m" not in shown


def test_a_result_is_not_written_over(
    results: tuple[Path, Path], tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(results[0].parent)
    common = ["--tasks", "letters", "--include-path", str(tasks), "--output-dir", folder]
    assert main(common) == 2
    assert "exists: move it" in capsys.readouterr().err


def test_multiple_choice_and_raw_prompts(tasks: Path, tmp_path: Path) -> None:
    """The right answer is `acc` of the encoder's own scores, whatever these are."""
    from mlx_dgemma import load
    from mlx_dgemma.scoring import prompt_scores

    common = ["--tasks", "orders", "--include-path", str(tasks), "--output-dir", str(tmp_path)]
    assert main([*common, "--no-apply-chat-template", "--limit", "2"]) == 0
    found = read_report(next(iter(tmp_path.glob("*.json"))))
    assert found["tasks"]["orders"]["cost"] is None
    model, tokenizer = load()
    for sample, word in zip(found["samples"], ("CANVAS", "ORANGE"), strict=True):
        question = f"Reverse the letters {word}"
        start = 1 + len(tokenizer.encode(question))
        scores = [
            prompt_scores(model, [tokenizer.ids["bos"], *tokenizer.encode(question + answer)])
            .logprobs[start:]
            .sum()
            for answer in (word, word[::-1])
        ]
        assert sample["values"]["acc"] == float(scores[1] > scores[0])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Name the tasks: --tasks TASK"),
        (["--tasks", "no_such_task"], "lm-eval has no task 'no_such_task'"),
        (["--tasks", "x", "--include-path", "/none"], "--include-path /none is no folder"),
        (["--tasks", "x", "--chat-template-args", '{"a": 1}'], "--chat-template-args takes"),
        (
            ["--tasks", "x", "--chat-template-args", '{"enable_thinking": "yes"}'],
            "--chat-template-args takes",
        ),
        (["--tasks", "x", "--num-shots", "-1"], "--num-shots -1 is not possible"),
        (["--tasks", "x", "--seeds", str(10**14)], "is not possible: use at most 1,000"),
        (["--tasks", "x", "--limit", str(10**24)], "is not possible: leave it out"),
        (["--compare", "/none/a", "/none/b"], "/none/a cannot be read as a report"),
    ],
)
def test_mistakes_are_sentences(
    flags: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # lm-eval's own tasks are thousands of files; which of them there are is not looked at here.
    monkeypatch.setattr(
        results_module,
        "TaskManager",
        lambda include_path, include_defaults: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    assert main(flags) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("text", ["{bad", "[" * 100_000, '{"enable_thinking": NaN}'])
def test_template_arguments_that_are_no_json(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--tasks", "x", "--chat-template-args", text])
    assert ended.value.code == 2
    assert "argument --chat-template-args:" in capsys.readouterr().err


def test_data_that_cannot_be_fetched_is_a_sentence(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tasks / "letters.yaml").read_text().replace("task: letters", "task: absent")
    (tmp_path / "absent.yaml").write_text(text.replace("letters.json", "missing.json"))
    assert main(["--tasks", "absent", "--include-path", str(tmp_path)]) == 2
    assert "lm-eval cannot prepare absent: FileNotFoundError" in capsys.readouterr().err


def test_a_task_that_fails_while_it_runs_is_a_sentence(
    tmp_path: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (tasks / "letters.yaml").read_text().replace("task: letters", "task: sparkling")
    (tmp_path / "sparkling.yaml").write_text(text.replace("exact_match", "sparkle"))
    flags = ["--tasks", "sparkling", "--include-path", str(tmp_path), "--limit", "1"]
    flags += ["--output-dir", str(tmp_path / "out"), "--max-tokens", "4"]
    assert main(flags) == 2
    assert "lm-eval cannot evaluate sparkling: " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []

    def broken(*_: object, **__: object) -> list[Any]:
        raise ZeroDivisionError  # a bug of ours keeps its traceback

    monkeypatch.setattr(harness, "replies", broken)
    with pytest.raises(ZeroDivisionError):
        main(flags)


class Questions:
    """What the harness is asked, without a network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, Any]] = []
        monkeypatch.setattr(harness, "replies", self.replies)

    def replies(self, model: Any, _: Any, ids: list[int], seeds: list[int], settings: Any,
                **options: Any) -> list[Any]:  # fmt: skip
        self.seen.append({"ids": ids, "seeds": seeds, "settings": settings, **options})
        return [harness.Answer(str(seed), None) for seed in seeds]  # type: ignore[arg-type]


def instance(prompt: str, document: int = 0, **options: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, (prompt, options), 0, ("t", document, 1))


def test_repeats_and_runs_of_a_question_are_asked_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_dgemma import load
    from mlx_dgemma.decoding.settings import DecodingSettings

    model, tokenizer = load()
    asked = Questions(monkeypatch)
    manner = Manner(DecodingSettings(), seed=1, runs=2, thinking=True)
    lm = Harness(model, tokenizer, manner)
    history = [{"role": "user", "content": "A <turn|> b"}]
    chat = lm.apply_chat_template(history)
    begun = lm.apply_chat_template([*history, {"role": "assistant", "content": "Answer:"}])
    requests = [instance(chat, 0, until="x", max_gen_toks=7)] * 2 + [instance(begun, 1)]
    first = lm.generate_until(requests)
    lm.run = 1
    second = lm.generate_until(requests)
    assert len(asked.seen) == 2
    assert len(set(first + second)) == 6  # every reply has a seed of its own
    assert asked.seen[0]["seeds"] == [
        seed_of(1, Asked("t", 0, 0, repeat, run)) for repeat in (0, 1) for run in (0, 1)
    ]
    assert (asked.seen[0]["stop"], asked.seen[0]["settings"].max_tokens) == (["x"], 7)
    assert asked.seen[0]["ids"] == encode_messages(tokenizer, history, enable_thinking=True)
    begins = [*encode_messages(tokenizer, history), *tokenizer.encode("Answer:")]
    assert asked.seen[1]["ids"] == begins
    assert isinstance(chat, ChatPrompt)
    assert json.loads(chat) == history
