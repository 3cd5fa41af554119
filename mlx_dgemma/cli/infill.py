"""`mlx_dgemma.infill`: fill the holes of a text, or rewrite parts of it, seeing both sides."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import exp
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command, read_stdin, stop_on_interrupt
from mlx_dgemma.cli.constraint import add_constraint, read_constraint
from mlx_dgemma.cli.draft_view import printable
from mlx_dgemma.cli.exit_codes import INTERRUPTED
from mlx_dgemma.cli.session import open_session
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.files import read_argument

if TYPE_CHECKING:
    from mlx_dgemma.constraints import Constraint
    from mlx_dgemma.infilling import Infill

ADDED, REMOVED, DOUBTFUL = "green", "red strike", "yellow underline"
REFINE_BELOW = 0.5


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.infill",
        description="Fill every <hole> of a text. <hole:3> asks for three tokens, <hole:1-4> for "
        r"one to four; \<hole> is the word itself. Piped, the filled text comes out alone.",
    )
    text = parser.add_argument_group("text")
    text.add_argument("text", nargs="?", help="text with holes ('-' or nothing reads stdin)")
    text.add_argument("--file", metavar="FILE", help="read the text from a file")
    text.add_argument("--prefix", metavar="TEXT", help="what stands before one hole")
    text.add_argument("--suffix", metavar="TEXT", help="the text after the hole")
    text.add_argument(
        "--edit",
        type=span,
        action="append",
        metavar="START:END",
        help="rewrite these characters of the text instead of filling holes (repeatable)",
    )
    text.add_argument(
        "--length",
        type=length,
        metavar="N[-M]",
        help="tokens of each edit, or of the hole between --prefix and --suffix",
    )
    text.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="S",
        help="with --edit: 1 starts from noise (default), 0 keeps the text",
    )
    text.add_argument("--prompt", "-p", metavar="TEXT", help="what the text is an answer to")
    text.add_argument("--system-prompt", metavar="TEXT", help="instructions before the prompt")
    text.add_argument(
        "--open-end", action="store_true", help="the text continues after what is given"
    )
    flags.add_model(parser)
    add_constraint(parser, "each hole")
    decoding = parser.add_argument_group("decoding (defaults: the checkpoint's generation config)")
    decoding.add_argument("--n", type=int, default=1, help="alternatives (default: 1)")
    decoding.add_argument("--seed", type=int, metavar="N", help="repeats a filling")
    flags.add_preset(decoding)
    for name in _GIVEN:
        flags.add_setting(decoding, name)
    decoding.add_argument(
        "--refine",
        type=probability,
        nargs="?",
        const=REFINE_BELOW,
        metavar="P",
        help=f"then redo the tokens less probable than P (default: {REFINE_BELOW})",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    output.add_argument(
        "--fill-only", action="store_true", help="print what was filled in, one line per hole"
    )
    flags.add_version(parser)
    parser.set_defaults(pace=0.0, **dict.fromkeys(set(flags.SETTINGS) - {"preset", *_GIVEN}))
    return parser


_GIVEN = ("temp", "max_denoising_steps", "entropy_bound", "kv_bits")


def span(text: str) -> tuple[int, int]:
    """START:END in characters."""
    start, _, end = text.partition(":")
    return int(start), int(end)


def probability(text: str) -> float:
    """0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def length(text: str) -> int | tuple[int, int]:
    """N or N-M tokens."""
    low, dash, high = text.partition("-")
    return (int(low), int(high)) if dash else int(low)


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    console, messages = (
        Console(highlight=False, markup=False),
        Console(stderr=True, highlight=False, markup=False),
    )
    text = _read_text(arguments)
    if not arguments.edit and arguments.strength != 1.0:
        raise InputError("--strength belongs to --edit: a hole holds nothing to keep.")
    sided = arguments.prefix is not None or arguments.suffix is not None
    if arguments.length is not None and not (arguments.edit or sided):
        raise InputError("--length is for --edit, --prefix and --suffix: write <hole:N> instead.")

    constraint = read_constraint(arguments)
    if constraint is not None and (arguments.edit or arguments.refine is not None):
        raise InputError("--regex, --choice and --json-schema are for holes, not for rewriting.")

    from mlx_dgemma.infilling import refine

    session = open_session(arguments, messages, context=len(text))
    options: dict[str, Any] = {
        name: value
        for name in ("prompt", "system_prompt", "n", "seed", "preset", *_GIVEN)
        if (value := getattr(arguments, name)) is not None
    }
    options["final"] = not arguments.open_end
    with stop_on_interrupt() as cancel:
        options["cancel"] = cancel
        try:
            result = _run(session, text, arguments, options, constraint)
            if arguments.refine is not None:
                result = refine(
                    session.model,
                    session.tokenizer,
                    result,
                    min_probability=arguments.refine,
                    **options,
                )
        except CancelledError:
            return INTERRUPTED

    if arguments.json:
        print(json.dumps(record(result, session.name), ensure_ascii=False))
    elif arguments.fill_only:
        for filling in result.fillings:
            print(filling.text)
    elif console.is_terminal:
        _show(result, console)
    else:
        sys.stdout.write(result.text if result.text.endswith("\n") else result.text + "\n")
    if result.unseen and not arguments.json:
        messages.print(
            f"{result.unseen} tokens of right context did not fit on a canvas and were not seen.",
            style="dim",
        )
    return 0


def _read_text(arguments: argparse.Namespace) -> str:
    sided = arguments.prefix is not None or arguments.suffix is not None
    if sum((arguments.text is not None, arguments.file is not None, sided)) > 1:
        raise InputError("Give the text once: as an argument, with --file, or --prefix/--suffix.")
    if sided:
        if arguments.edit:
            raise InputError("--edit needs the whole text, not --prefix and --suffix.")
        prefix, suffix = (
            (part or "").replace("<hole", r"\<hole")
            for part in (arguments.prefix, arguments.suffix)
        )
        return f"{prefix}{_hole(arguments.length)}{suffix}"
    if arguments.file is not None:
        return read_argument(arguments.file)
    if arguments.text in (None, "-"):
        return read_stdin()
    return str(arguments.text)


def _hole(asked: int | tuple[int, int] | None) -> str:
    if asked is None:
        return "<hole>"
    return f"<hole:{asked}>" if isinstance(asked, int) else f"<hole:{asked[0]}-{asked[1]}>"


def _run(
    session: Any,
    text: str,
    arguments: argparse.Namespace,
    options: dict[str, Any],
    constraint: Constraint | None,
) -> Infill:
    from mlx_dgemma.infilling import edit, infill
    from mlx_dgemma.prompt.holes import Hole, parse_holes

    if not arguments.edit:
        parts = [
            replace(part, constraint=constraint) if isinstance(part, Hole) else part
            for part in parse_holes(text)
        ]
        return infill(session.model, session.tokenizer, parts, **options)
    return edit(
        session.model,
        session.tokenizer,
        text,
        arguments.edit,
        length=arguments.length,
        strength=arguments.strength,
        **options,
    )


def record(result: Infill, model: str) -> dict[str, Any]:
    """The JSON form: the result, its tokens with their confidence, and the alternatives."""
    fields = asdict(result)
    alternatives = fields.pop("alternatives")
    for alternative in alternatives:
        alternative.pop("alternatives")
    return {"model": model, **fields, "alternatives": alternatives}


def _show(result: Infill, console: Console) -> None:
    console.print(paint(result), soft_wrap=True)
    for number, alternative in enumerate(result.alternatives, start=2):
        console.print(Text(f"\n{number}.", "dim"))
        console.print(paint(alternative), soft_wrap=True)
    lengths = " + ".join(str(filling.length) for filling in result.fillings)
    console.print(
        Text(
            f"\n{lengths} tokens · mean probability {exp(result.score):.2f} · {result.steps} steps"
            f" · {result.forwards} forwards · seed {result.seed}",
            "dim",
        )
    )


def paint(result: Infill) -> Text:
    """The text with its fillings between « and », doubtful tokens underlined.

    What an edit replaced stands before its filling in brackets.
    """
    painted = Text()
    end = 0
    for filling in result.fillings:
        start, stop = filling.span
        painted.append(printable(result.text[end:start]))
        if filling.replaced:
            painted.append(f"[{printable(filling.replaced)}]", REMOVED)
        painted.append("«", "dim")
        for token in filling.tokens:
            doubtful = exp(token.logprob) < REFINE_BELOW
            painted.append(printable(token.text), DOUBTFUL if doubtful else ADDED)
        painted.append("»", "dim")
        end = stop
    painted.append(printable(result.text[end:]))
    return painted
