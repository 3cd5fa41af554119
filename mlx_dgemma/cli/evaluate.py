"""`mlx_dgemma.evaluate`: tasks of lm-evaluation-harness, and whether two results differ."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.benchmark.tables import figures
from mlx_dgemma.cli.command import Parser, command
from mlx_dgemma.cli.draft_view import printable
from mlx_dgemma.cli.session import open_session
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import check_writable
from mlx_dgemma.machine.reports import report, write_report
from mlx_dgemma.untrusted_json import UntrustedJSONError, parse

SEED = 123  # mlx-lm's
MOST_SEEDS = 1000
ABSENT = "-"
COSTS = ("steps per block", "tokens per forward", "seconds", "cut")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.evaluate",
        description="Evaluate a model on tasks of lm-evaluation-harness (pip install "
        "'mlx-dgemma[evaluate]'): accuracy, and beside it denoising steps, tokens per forward and "
        "seconds. Or compare two results.",
    )
    flags.add_model(parser)
    group = parser.add_argument_group("what is asked")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-eval's names, or task files")
    group.add_argument(
        "--include-path", metavar="FOLDER", help="a folder with task files of your own"
    )
    group.add_argument(
        "--num-shots", type=int, metavar="N", help="shots in the prompt (default: the task's)"
    )
    group.add_argument(
        "--limit", type=flags.positive, metavar="N", help="ask only the first N of each task"
    )
    group.add_argument(
        "--fewshot-as-multiturn",
        action="store_true",
        help="shots as turns of a conversation instead of one message",
    )
    group.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the chat template (default: when the model has one)",
    )
    group.add_argument(
        "--chat-template-args",
        type=_json,
        default={},
        metavar="JSON",
        help="mlx-lm's spelling of --enable-thinking: '{\"enable_thinking\": true}'",
    )
    group.add_argument(
        "--enable-thinking", action="store_true", help="let the model think before it answers"
    )
    group.add_argument("--system-prompt", metavar="TEXT", help="instructions before every prompt")
    group.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run tasks that execute what the model wrote",
    )
    group = parser.add_argument_group("replies (defaults: the checkpoint's generation config)")
    flags.add_preset(group)
    for name in flags.SETTINGS[1:]:
        if name != "max_tokens":
            flags.add_setting(group, name)
    group.add_argument(
        "--max-tokens", type=flags.positive, metavar="N", help="of a reply (default: the task's)"
    )
    group.add_argument(
        "--seed", type=int, default=SEED, metavar="N", help=f"of the first run (default: {SEED})"
    )
    group.add_argument(
        "--seeds",
        type=flags.positive,
        default=1,
        metavar="N",
        help="runs: every question gets so many replies, denoised side by side (default: 1)",
    )
    group.add_argument(
        "--batch-size",
        type=flags.positive,
        default=8,
        metavar="N",
        help="replies to one prompt whose first canvases are denoised together (default: 8)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir", default=".", metavar="FOLDER", help="where the result goes (default: here)"
    )
    group.add_argument(
        "--log-samples", action="store_true", help="keep the replies' texts in the result"
    )
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two results, question by question; nothing is run",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    console = Console(highlight=False, markup=False)
    if arguments.compare is not None:
        found = compare(*arguments.compare)
        show: Any = show_comparison
    else:
        found = run(arguments, Console(stderr=True, highlight=False, markup=False))
        show = show_result
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, console)
    return 0


def run(arguments: argparse.Namespace, messages: Console) -> dict[str, Any]:
    """Evaluates and writes the result; gives its summary, without the single questions."""
    thinking = _check(arguments)
    target = Path(arguments.output_dir) / _file_name(arguments)
    if os.path.exists(target):
        raise InputError(f"{target} exists: move it, or choose another --output-dir.")

    from mlx_dgemma.evaluation.harness import Harness, Manner
    from mlx_dgemma.evaluation.results import Plan, evaluate, find_tasks

    tasks = find_tasks(arguments.tasks, arguments.include_path)
    arguments.pace, seed = 0.0, arguments.seed
    session = open_session(arguments, messages)
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    check_writable(target, "The result file")

    chat = arguments.apply_chat_template
    defaults = session.model.config.generation
    options = {k: v for k, v in session.options.items() if k != "max_tokens"}
    manner = Manner(
        settings=DecodingSettings.from_defaults(defaults, options),
        seed=seed,
        runs=arguments.seeds,
        batch=arguments.batch_size,
        most=arguments.max_tokens,
        chat=session.tokenizer.chat_template is not None if chat is None else chat,
        thinking=thinking,
    )
    plan = Plan(
        tasks=tasks,
        shots=arguments.num_shots,
        limit=arguments.limit,
        multiturn=arguments.fewshot_as_multiturn,
        unsafe=arguments.confirm_run_unsafe_code,
        system_prompt=arguments.system_prompt,
        texts=arguments.log_samples,
    )
    with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:

        def track(work: Sequence[Any], what: str) -> Iterable[Any]:
            return progress.track(work, description=what)

        found = evaluate(Harness(session.model, session.tokenizer, manner, track), plan)
    whole = report(
        "evaluation",
        model=flags.public_name(session.name),
        preset=arguments.preset or "reference",
        settings=options,
        lm_eval=version("lm_eval"),
        seed=seed,
        seeds=arguments.seeds,
        chat_template=manner.chat,
        thinking=thinking,
        limit=arguments.limit,
        **found,
    )
    write_report(target, whole)
    return {**{k: v for k, v in whole.items() if k != "samples"}, "file": str(target)}


def _json(text: str) -> Any:
    try:
        return parse(text)
    except UntrustedJSONError as error:
        raise argparse.ArgumentTypeError(f"the JSON {error}") from error


def _check(arguments: argparse.Namespace) -> bool:
    """Refuses what cannot be run, before a model is loaded; whether the model is to think."""
    if not arguments.tasks:
        raise InputError("Name the tasks: --tasks TASK ..., or compare two results: --compare A B.")
    template = arguments.chat_template_args
    known = isinstance(template, dict) and not set(template) - {"enable_thinking"}
    if not known or not all(isinstance(value, bool) for value in template.values()):
        raise InputError('--chat-template-args takes {"enable_thinking": true} or false.')
    thinking = arguments.enable_thinking or template.get("enable_thinking", False)
    if arguments.num_shots is not None and arguments.num_shots < 0:
        raise InputError(f"--num-shots {arguments.num_shots} is not possible: use 0 or more.")
    if arguments.seeds > MOST_SEEDS:
        raise InputError(f"--seeds {arguments.seeds} is not possible: use at most {MOST_SEEDS:,}.")
    if arguments.limit is not None and arguments.limit > sys.maxsize:
        raise InputError(f"--limit {arguments.limit} is not possible: leave it out to ask all.")
    if thinking and arguments.apply_chat_template is False:
        raise InputError("Thinking is part of the chat template: leave --no-apply-chat-template.")
    if find_spec("lm_eval") is None:
        raise InputError(
            "Evaluating needs lm-evaluation-harness: pip install 'mlx-dgemma[evaluate]'."
        )
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars are many, and ours is drawn beside them
    try:
        version("lm_eval")
    except PackageNotFoundError:
        raise InputError("lm_eval is here, but not installed: pip install 'lm-eval'.") from None
    return bool(thinking)


def _file_name(arguments: argparse.Namespace) -> str:
    """mlx-lm's name, with the preset in it."""
    model = flags.public_name(arguments.model or "demo").replace("/", "_")
    parts = ["eval", model, arguments.preset or "reference", version("lm_eval")]
    if arguments.num_shots is not None:
        parts.append(f"{arguments.num_shots:02d}")
    parts += [Path(task).stem for task in arguments.tasks]
    return re.sub(r"[^\w.,+-]", "_", "_".join(parts))[:200] + ".json"


def compare(first: str, second: str) -> dict[str, Any]:
    from mlx_dgemma.evaluation.pairing import compared, read_result

    a, b = read_result(first), read_result(second)
    return {
        "a": _summary(first, a),
        "b": _summary(second, b),
        "differences": list(compared(a, b).values()),
    }


def _summary(path: str, found: dict[str, Any]) -> dict[str, Any]:
    kept = ("model", "preset", "settings", "seed", "seeds", "thinking", "lm_eval")
    costs = {task: values["cost"] for task, values in found["tasks"].items()}
    return {"file": path, **{name: found.get(name) for name in kept}, "costs": costs}


def show_result(found: dict[str, Any], console: Console) -> None:
    scores = figures("task", "metric", "value", "n")
    costs = figures("cost", *COSTS)
    for task, values in found["tasks"].items():
        costs.add_row(printable(task), *_cost(values["cost"]))
        for name, metric in values["metrics"].items():
            error = "" if metric["error"] is None else f" ± {metric['error']:.3f}"
            scores.add_row(
                printable(task),
                printable(name),
                f"{metric['value']:.3f}{error}",
                str(values["questions"]),
            )
    console.print(scores)
    console.print(costs)
    seeds = "" if found["seeds"] == 1 else f", mean of {found['seeds']} seeds"
    note = f"± standard error over questions{seeds}; cut: replies that ended at their token limit"
    console.print(Text(note, "dim"), soft_wrap=True)
    console.print(Text(f"written to {found['file']}", "dim"), soft_wrap=True)


def _cost(cost: dict[str, Any] | None) -> list[str]:
    if cost is None:  # scores of given texts take no denoising
        return [ABSENT] * 4
    return [
        f"{cost['steps_per_block']:.1f}",
        f"{cost['tokens_per_forward']:.1f}",
        f"{cost['seconds']:.2f}",
        f"{cost['unfinished']:.0%}",
    ]


def show_comparison(found: dict[str, Any], console: Console) -> None:
    table = figures("task, metric", "A", "B", "B - A (95 %)", "better", "worse", "p", "n")
    for one in found["differences"]:
        table.add_row(
            printable(f"{one['task']} {one['metric']}"),
            f"{one['a']:.3f}",
            f"{one['b']:.3f}",
            f"{one['b'] - one['a']:+.3f} ({one['low']:+.2f}, {one['high']:+.2f})",
            str(one["better"]),
            str(one["worse"]),
            f"{one['p']:.2g}",
            str(one["n"]),
        )
    console.print(table)
    costs = figures("cost", *COSTS)
    for side in ("a", "b"):
        for task, cost in found[side]["costs"].items():
            costs.add_row(printable(f"{side.upper()}: {task}"), *_cost(cost))
    console.print(costs)
    for side in ("a", "b"):
        about = found[side]
        line = printable(f"{side.upper()}: {about['model']}, {about['preset']}, {about['file']}")
        console.print(Text(line, "dim"), soft_wrap=True)
    tests = ", ".join(sorted({one["test"] for one in found["differences"]}))
    note = f"p, two-sided, paired by question: {tests}. With many rows some are small by chance."
    console.print(Text(note, "dim"), soft_wrap=True)
