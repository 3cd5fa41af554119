"""`mlx_dgemma.generate`: one prompt, one reply, and the canvas while it resolves."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from mlx_dgemma.checkpoint.known_repositories import DEMO_NAME
from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli import media, summary
from mlx_dgemma.cli.command import Parser, command, read_stdin, stop_on_interrupt
from mlx_dgemma.cli.constraint import add_constraint, read_constraint
from mlx_dgemma.cli.exit_codes import INTERRUPTED, USER_ERROR
from mlx_dgemma.cli.session import (
    Session,
    open_session,
    prepared,
)
from mlx_dgemma.cli.show_reply import Reply, collect, print_summary, receive
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import check_writable, read_argument

if TYPE_CHECKING:
    from mlx_dgemma.demo.tasks import Example
    from mlx_dgemma.generate import Prompt
    from mlx_dgemma.prompt.media import PreparedPrompt

DEFAULT_TASK = "sudoku"
# Where a record is run, and how it is shown; all else is in the record.
_REPLAY_FLAGS = {
    *("replay", "model", "revision", "adapter_path", "dtype"),
    *("json", "drafts", "pace", "verbose"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.generate",
        description="Generate a reply with DiffusionGemma. Without --model and --prompt, the "
        "bundled demo checkpoint answers one of its own puzzles.",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", "-p", metavar="TEXT", help="the message ('-' reads stdin)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the message from a file")
    prompt.add_argument(
        "--demo",
        metavar="TASK",
        help="ask the demo checkpoint a held-out question: reverse, sort, count, repeat, "
        "sudoku, tool, think, grid, list, sentence, json or picture; the answer is checked",
    )
    prompt.add_argument(
        "--replay", metavar="FILE", help="run a recorded generation again from its trace"
    )
    flags.add_prompting(parser)
    media.add_media(parser)
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="take the prompt as raw text"
    )
    flags.add_model(parser)
    flags.add_decoding(parser)
    add_constraint(parser)
    flags.add_display(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    output.add_argument(
        "--logprobs",
        action="store_true",
        help="with --json: each token's log-probability, entropy and the step that settled it",
    )
    output.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory that the model would take, and load nothing",
    )
    output.add_argument("--trace", metavar="FILE", help="record seed, draws and drafts as JSON")
    output.add_argument(
        "--verbose",
        type=flags.truth,
        nargs="?",
        const=True,
        metavar="TRUE_OR_FALSE",
        help="print what it cost after the reply (default: on a terminal)",
    )
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    console, messages = (
        Console(highlight=False, markup=False),
        Console(stderr=True, highlight=False, markup=False),
    )
    if arguments.logprobs and not arguments.json:
        raise InputError("--logprobs are part of the JSON: add --json, or leave them out.")
    if arguments.replay is not None:
        _refuse_what_a_record_fixes(parser, arguments)
        return _replay(arguments, messages)

    # 1. What is asked, before anything slow
    constraint = read_constraint(arguments)
    if arguments.dry_run:
        return _plan(arguments)
    if arguments.trace is not None:
        check_writable(arguments.trace, "--trace")
    if arguments.prompt_cache_file is not None:
        check_writable(arguments.prompt_cache_file, "--prompt-cache-file")
    example = _example(arguments)
    shown = media.parts(arguments)
    prompt: Prompt = example.messages if example else _read_prompt(arguments)
    size = len(prompt) if isinstance(prompt, str) else 0
    size += media.guessed_tokens(arguments) + (arguments.max_tokens or 256)
    session = open_session(arguments, messages, context=size)
    options = _options(arguments, session, example)
    options["constraint"] = constraint
    if arguments.ignore_chat_template and isinstance(prompt, str):
        bos = session.model.config.text.bos_token_id
        prompt = [bos, *session.tokenizer.encode(prompt)]
    elif shown:
        prompt = [media.message(shown, str(prompt))]
    prepared = _prepare(prompt, example, arguments, session, options)

    # 2. The reply, shown as it comes
    on_terminal = console.is_terminal and not arguments.json
    live = on_terminal if arguments.drafts is None else arguments.drafts and on_terminal
    live = live and not console.is_dumb_terminal and arguments.verbose is not False
    if example and not arguments.json:
        _print_question(example, console if console.is_terminal else messages)
    with stop_on_interrupt() as cancel:
        from mlx_dgemma.generate import stream_generate

        events = stream_generate(
            session.model, session.tokenizer, prepared, drafts=live, cancel=cancel, **options
        )
        show = not arguments.json
        reply = receive(events, session, console, live=live) if show else collect(events)

    # 3. What came of it
    if arguments.prompt_cache_file is not None:
        options["cache"].save(arguments.prompt_cache_file)
    cancelled = reply.finish is not None and reply.finish.reason == "cancelled"
    right = None if example is None or cancelled else _is_right(example, reply, session)
    if arguments.json:
        print(json.dumps(_record(session, reply, right, prepared), ensure_ascii=False))
    else:
        if right is not None:
            _print_verdict(right, console if console.is_terminal else messages)
        if on_terminal if arguments.verbose is None else arguments.verbose:
            print_summary(reply, console if on_terminal else messages, prepared.media)
    if constraint is not None and reply.finish is not None and reply.finish.reason == "length":
        print(
            f"warning: The reply was cut at {reply.finish.generated_tokens} tokens, before it was "
            "what it must be: allow more with --max-tokens.",
            file=sys.stderr,
        )
    if reply.finish is not None and reply.finish.reason == "unconverged":
        if arguments.json:
            return USER_ERROR  # the record says it
        raise InputError(
            f"Block {reply.finish.blocks - 1} did not converge, and --on-unconverged is refuse: "
            "allow more --max-denoising-steps, or take the block with --on-unconverged warn."
        )
    return INTERRUPTED if cancelled else 0


def _plan(arguments: argparse.Namespace) -> int:
    _, plan = prepared(arguments, arguments.max_tokens or 0, weights=False)
    if arguments.json:
        print(json.dumps({"model": str(arguments.model or DEMO_NAME), **plan.record()}))
    else:
        print(f"{arguments.model or DEMO_NAME} needs {plan}")
    if plan.advice:
        print(plan.advice, file=sys.stderr)
    return 0


def _read_prompt(arguments: argparse.Namespace) -> str:
    prompt: str
    if arguments.prompt_file is not None:
        prompt = read_argument(arguments.prompt_file, "prompt file")
    elif arguments.prompt is None:
        raise InputError("There is no prompt: give one with --prompt, or --prompt - for stdin.")
    else:
        prompt = read_stdin() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise InputError("The prompt is empty: write something to answer.")
    return prompt


def _example(arguments: argparse.Namespace) -> Example | None:
    """A held-out question of the demo, when one is asked for or nothing else is given."""
    asked = arguments.prompt is not None or arguments.prompt_file is not None
    if arguments.image or arguments.video:
        if arguments.demo is not None:
            raise InputError("--demo brings its own picture: leave --image and --video out.")
        if arguments.ignore_chat_template:
            raise InputError("Images need the chat template: leave --ignore-chat-template out.")
        return None
    if arguments.demo is None and (asked or arguments.model is not None):
        return None
    from mlx_dgemma.demo.tasks import PICTURE, TASKS, held_out

    task = DEFAULT_TASK if arguments.demo is None else arguments.demo
    known = [*TASKS, PICTURE.name]
    if task not in known:
        raise InputError(f"--demo knows no task {task!r}; the tasks are {', '.join(known)}.")
    if arguments.seed is None:
        from mlx_dgemma.decoding.draws import fresh_seed

        arguments.seed = fresh_seed()
    return held_out(task, 1, arguments.seed)[0]


def _options(
    arguments: argparse.Namespace, session: Session, example: Example | None
) -> dict[str, Any]:
    options = dict(session.options)
    options["seed"] = arguments.seed
    options["stop"] = arguments.stop
    options["system_prompt"] = arguments.system_prompt
    options["enable_thinking"] = arguments.enable_thinking
    if example is not None:
        options["enable_thinking"] = example.enable_thinking or arguments.enable_thinking
        options["tools"] = example.tools
    options["logprobs"] = arguments.logprobs
    if arguments.trace is not None:
        options["trace"] = arguments.trace
    if arguments.prompt_cache_file is not None:
        options["cache"] = session.prompt_cache(arguments.prompt_cache_file)
    return options


def _prepare(
    prompt: Prompt,
    example: Example | None,
    arguments: argparse.Namespace,
    session: Session,
    options: dict[str, Any],
) -> PreparedPrompt:
    """The prompt's ids, its images read."""
    from mlx_dgemma.prompt.encode import prepare_prompt

    drawn = None if example is None or example.picture is None else [example.picture.draw()]
    asked = ("system_prompt", "tools", "enable_thinking")
    return prepare_prompt(
        session.model,
        session.tokenizer,
        prompt,
        images=drawn,
        image_tokens=arguments.image_tokens,
        **{name: options[name] for name in asked if name in options},
    )


def _print_question(example: Example, console: Console) -> None:
    question = next(m["content"] for m in reversed(example.messages) if m["role"] == "user")
    if not isinstance(question, str):
        question = " ".join(part["text"] for part in question if part["type"] == "text")
    console.print(Text(question, "bold"), soft_wrap=True)
    console.print()


def _is_right(example: Example, reply: Reply, session: Session) -> bool:
    """The task's own judge; a call is judged by its raw text."""
    if reply.tool_calls:
        return bool(example.verify(session.tokenizer.decode(reply.ids)))
    return bool(example.verify(reply.text))


def _print_verdict(right: bool, console: Console) -> None:
    verdict = "✓ checked: a right answer" if right else "✗ checked: not a right answer"
    console.print()
    console.print(Text(verdict, "green" if right else "red"))


def _record(
    session: Session, reply: Reply, right: bool | None, prepared: PreparedPrompt
) -> dict[str, Any]:
    assert reply.finish is not None
    more: dict[str, Any] = {"model": session.name, "text": reply.text}
    if reply.thinking:
        more["thinking"] = reply.thinking
    if reply.tool_calls:
        more["tool_calls"] = reply.tool_calls
    if reply.tokens:
        pieces = session.pieces
        more["tokens"] = [{"text": pieces(token["id"]), **token} for token in reply.tokens]
    if prepared.media:
        more["images"] = media.records(prepared.media)
    if right is not None:
        more["right"] = right
    return summary.record(reply.finish, **more)


def _refuse_what_a_record_fixes(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if name not in _REPLAY_FLAGS and value != parser.get_default(name)
    ]
    if given:
        raise InputError(
            "--replay repeats the prompt and the settings of its record: leave out "
            f"{', '.join(given)}."
        )


def _replay(arguments: argparse.Namespace, messages: Console) -> int:
    from mlx_dgemma.replaying import replay

    session = open_session(arguments, messages)
    again = replay(session.model, session.tokenizer, arguments.replay)
    if arguments.json:
        print(
            json.dumps(
                {"text": again.text, "ids": again.ids, "divergence": again.divergence},
                ensure_ascii=False,
            )
        )
    else:
        print(again.text)
    if again.divergence is None:
        return 0
    block, attempt, step = again.divergence
    messages.print(
        f"The drafts differ from the record from block {block}, attempt {attempt}, step {step} on.",
        soft_wrap=True,
    )
    return 1
