"""`mlx_dgemma.decide`: questions with fixed answers about a text or picture, from single passes."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command, read_stdin, stop_on_interrupt
from mlx_dgemma.cli.draft_view import printable
from mlx_dgemma.cli.exit_codes import INTERRUPTED
from mlx_dgemma.cli.session import open_session
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.files import read_argument
from mlx_dgemma.untrusted_json import parse

if TYPE_CHECKING:
    from mlx_dgemma.decisions import Answer, Decision

_BRACKETS = re.compile(r"(?P<text>.*?)\s*\[(?P<answers>[^\[\]]*)\]\s*$", re.DOTALL)
_NAMED = re.compile(r"(?P<name>[\w-]+)=(?P<question>.*)$", re.DOTALL)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.decide",
        description="Answers questions about a text without generating any: probabilities from "
        "one decoder pass a question. 'Is it urgent?' is answered yes or no, 'Which team? "
        "[Billing | Sales]' by one of the options, 'How angry? [calm < annoyed < furious]' on a "
        "scale.",
    )
    state = parser.add_argument_group("what the questions are about")
    state.add_argument("--state", metavar="TEXT", help="a text, or JSON; '-' reads stdin")
    state.add_argument("--state-file", metavar="FILE", help="read it from a file")
    state.add_argument(
        "--image", action="append", metavar="FILE", help="a picture before the text (repeatable)"
    )
    state.add_argument("--system-prompt", metavar="TEXT", help="instructions before the state")
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--question",
        "-q",
        action="append",
        default=[],
        metavar="[NAME=]TEXT",
        help="a question as above, or a JSON object with type, instructions and criteria "
        "(repeatable)",
    )
    asked.add_argument("--questions", metavar="FILE", help="a JSON object: name -> question")
    asked.add_argument(
        "--orders",
        type=int,
        default=2,
        metavar="N",
        help="in how many orders the answers are listed (default: 2); more cost time",
    )
    flags.add_model(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)"
    )
    flags.add_setting(parser, "kv_bits")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    flags.add_version(parser)
    parser.set_defaults(pace=0.0, **dict.fromkeys(set(flags.SETTINGS) - {"kv_bits"}))
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    console, messages = (
        Console(highlight=False, markup=False),
        Console(stderr=True, highlight=False, markup=False),
    )
    state = _read_state(arguments)
    questions = _read_questions(arguments)

    from mlx_dgemma.decisions import decide
    from mlx_dgemma.decisions.label_passes import check_orders
    from mlx_dgemma.decisions.questions import read_questions

    # Before the weights: a faulty question should not take a minute.
    read_questions(questions)
    check_orders(arguments.orders)
    session = open_session(arguments, messages, context=len(str(state)) + 256)
    with stop_on_interrupt() as cancel:
        try:
            decision = decide(
                session.model,
                session.tokenizer,
                state,
                questions,
                images=arguments.image,
                orders=arguments.orders,
                seed=arguments.seed,
                system_prompt=arguments.system_prompt,
                kv_bits=arguments.kv_bits,
                cancel=cancel,
            )
        except CancelledError:
            return INTERRUPTED
    if arguments.json:
        print(json.dumps(record(decision, session.name), ensure_ascii=False))
    elif console.is_terminal:
        console.print(table(decision))
        messages.print(
            f"{decision.forwards} decoder passes · {decision.prompt_tokens} tokens read · "
            f"{decision.seconds:.1f} s",
            style="dim",
        )
    else:
        for name, answer in decision.answers.items():
            print(f"{name}\t{summary(answer)}")
    return 0


def parse_question(text: str) -> dict[str, Any]:
    """'Is it urgent?', 'Which? [a | b]' or 'How much? [low < high]' in its JSON form."""
    if text.lstrip().startswith("{"):
        return _object(text, "--question")
    found = _BRACKETS.match(text)
    if found is None:
        return {"type": "noul", "instructions": text}
    if {"<", "|"} <= set(found["answers"]):
        raise InputError(f"--question {text!r} mixes | and <: separate options by |, levels by <.")
    for separator, kind in (("<", "score"), ("|", "choice")):
        if separator in found["answers"]:
            answers = [answer.strip() for answer in found["answers"].split(separator)]
            return {"type": kind, "instructions": found["text"], "criteria": answers}
    raise InputError(f"--question {text!r} has one answer: separate options by | or levels by <.")


def _read_questions(arguments: argparse.Namespace) -> dict[str, Any]:
    questions: dict[str, Any] = {}
    if arguments.questions is not None:
        questions |= _object(read_argument(arguments.questions), arguments.questions)
    for number, text in enumerate(arguments.question, start=len(questions) + 1):
        named = _NAMED.match(text)
        name, question = (named["name"], named["question"]) if named else (f"q{number}", text)
        if name in questions:
            raise InputError(f"Two questions are named {name}: give each a name of its own.")
        questions[name] = parse_question(question)
    if not questions:
        raise InputError("Ask something: --question 'Is it urgent?', or --questions FILE.")
    return questions


def _read_state(arguments: argparse.Namespace) -> Any:
    if arguments.state is not None and arguments.state_file is not None:
        raise InputError("Give the state once: with --state or with --state-file.")
    if arguments.state_file is not None:
        text = read_argument(arguments.state_file)
    elif arguments.state == "-":
        text = read_stdin()
    else:
        text = arguments.state
    if text is None and not arguments.image:
        raise InputError("Give a state: --state TEXT, --state-file FILE or --image FILE.")
    return text or ""


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = parse(text)
    except ValueError as error:
        raise InputError(f"{where} {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} must hold a JSON object.")
    return value


def record(decision: Decision, model: str) -> dict[str, Any]:
    """The JSON form: the answers and what they cost."""
    return {
        "model": model,
        "answers": decision.to_json(),
        "prompt_tokens": decision.prompt_tokens,
        "forwards": decision.forwards,
        "seconds": round(decision.seconds, 3),
    }


def table(decision: Decision) -> Table:
    """A line for each question, as a terminal shows it."""
    rows = Table(box=None, show_header=False, pad_edge=False)
    for name, answer in decision.answers.items():
        rows.add_row(printable(name), printable(summary(answer)))
    return rows


def summary(answer: Answer) -> str:
    """An answer in a few words, the most probable first."""
    from mlx_dgemma.decisions import ChoiceAnswer, NoulAnswer

    if isinstance(answer, NoulAnswer):
        word, p = ("yes", answer.p) if answer.p >= 0.5 else ("no", 1 - answer.p)
        return f"{word} {p:.2f} ± {answer.stderr:.2f}"
    if isinstance(answer, ChoiceAnswer):
        shares = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])
        rest = "".join(f", {name} {p:.2f}" for name, p in shares[1:4])
        return f"{shares[0][0]} {shares[0][1]:.2f} ± {answer.stderr:.2f}{rest}"
    level = max(range(len(answer.levels)), key=lambda i: answer.probabilities[i])
    top = len(answer.levels) - 1
    return f"{answer.score:.2f} of {top} ± {answer.stderr:.2f}, most likely {answer.levels[level]}"
