"""`mlx_dgemma.lora`: fine-tune a checkpoint on a folder of conversations, as mlx_lm.lora does."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli.command import Parser, command, stop_on_interrupt
from mlx_dgemma.cli.exit_codes import INTERRUPTED
from mlx_dgemma.errors import DGemmaError, InputError
from mlx_dgemma.files import check_writable, read_argument, write_text

if TYPE_CHECKING:
    from mlx_dgemma.training.run import Prepared
    from mlx_dgemma.training.settings import Settings

_MOST_CONFIG = 1 << 16  # bytes
SPLITS = ("train", "valid", "test")
TRAINABLE = ("attention", "dense", "experts", "self-conditioning")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.lora",
        description="Fine-tunes a model on the conversations of a folder: train.jsonl, valid.jsonl "
        "and test.jsonl, one JSON object a line with messages, prompt and completion, or text. "
        "Writes adapters.safetensors and adapter_config.json, as mlx_lm.lora does.",
    )
    flags.add_dtype(flags.add_source(parser))
    what = parser.add_argument_group("what to do")
    what.add_argument("--train", action="store_true", default=None, help="train")
    what.add_argument("--test", action="store_true", default=None, help="the loss of test.jsonl")
    what.add_argument("--data", metavar="FOLDER", help="a folder, or a Hub data set's id")
    what.add_argument(
        "--adapter-path", metavar="FOLDER", help="where the adapter is written (default: adapters)"
    )
    what.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on from the last save in --adapter-path, with the same settings",
    )
    what.add_argument(
        "--resume-adapter-file", metavar="FILE", help="begin with an adapter's weights"
    )
    what.add_argument("-c", "--config", metavar="FILE", help="settings in YAML; flags win")
    tuning = parser.add_argument_group("what is trained")
    tuning.add_argument("--fine-tune-type", choices=("lora", "dora", "full"), help="default: lora")
    tuning.add_argument(
        "--num-layers", type=int, metavar="N", help="the last N layers; -1 is all (default)"
    )
    tuning.add_argument("--rank", type=int, metavar="R", help="of each delta (default: 8)")
    tuning.add_argument("--scale", type=float, metavar="S", help="of each delta (default: 4)")
    tuning.add_argument("--dropout", type=float, metavar="P", help="default: 0")
    tuning.add_argument(
        "--trainable",
        nargs="+",
        choices=TRAINABLE,
        help="which parts get a delta (default: attention dense)",
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument("--batch-size", type=int, metavar="N", help="default: 4")
    steps.add_argument("--iters", type=int, metavar="N", help="default: 1000")
    steps.add_argument("--learning-rate", type=float, metavar="LR", help="default: 1.5e-4")
    steps.add_argument(
        "--optimizer", choices=("adam", "adamw", "muon", "sgd", "adafactor"), help="default: adamw"
    )
    steps.add_argument("--grad-accumulation-steps", type=int, metavar="N", help="default: 1")
    steps.add_argument("--max-seq-length", type=int, metavar="N", help="tokens (default: 2048)")
    steps.add_argument(
        "--mask-prompt",
        action="store_true",
        default=None,
        help="leave the prompt out of the encoder's loss; the canvas never counts it",
    )
    steps.add_argument(
        "--objective",
        choices=("diffusion", "few-steps"),
        help="few-steps: learn to arrive at the model's own answers to the prompts in fewer "
        "denoising steps; answers in the data are not read (default: diffusion)",
    )
    steps.add_argument(
        "--entropy-bound",
        type=float,
        metavar="B",
        help="for few-steps: of the steps that are learned; generate with the same (default: 3)",
    )
    steps.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="for few-steps: how often the prompts are answered, by the model as it is by then "
        "(default: 3)",
    )
    steps.add_argument(
        "--answers-per-prompt", type=int, metavar="N", help="for few-steps (default: 1)"
    )
    steps.add_argument(
        "--certainty-weight",
        type=float,
        metavar="W",
        help="of the entropy where the likeliest token is right, for few-steps (default: 1)",
    )
    steps.add_argument(
        "--encoder-weight",
        type=float,
        metavar="W",
        help="of the encoder's next-token loss beside the canvas' loss (default: 1; few-steps: 0)",
    )
    steps.add_argument(
        "--detach-context",
        action="store_true",
        default=None,
        help="the canvas' loss leaves the encoder pass alone",
    )
    steps.add_argument(
        "--grad-checkpoint",
        action="store_true",
        default=None,
        help="hold only what enters a layer, and compute the rest again",
    )
    steps.add_argument("--seed", type=int, metavar="N", help="same seed, same adapter (default: 0)")
    watch = parser.add_argument_group("watching")
    watch.add_argument("--steps-per-report", type=int, metavar="N", help="default: 10")
    watch.add_argument("--steps-per-eval", type=int, metavar="N", help="default: 200")
    watch.add_argument("--save-every", type=int, metavar="N", help="default: 100")
    watch.add_argument(
        "--val-batches", type=int, metavar="N", help="-1 takes all of them (default: 25)"
    )
    watch.add_argument("--test-batches", type=int, metavar="N", help="default: 500")
    watch.add_argument(
        "--val-replies",
        type=int,
        metavar="N",
        help="validation prompts answered at each evaluation and compared (default: 8)",
    )
    watch.add_argument("--report", metavar="FILE", help="write all figures as JSON")
    watch.add_argument("--plot", metavar="FILE", help="draw the losses as SVG")
    watch.add_argument("--dry-run", action="store_true", help="print the memory plan and end")
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(build_parser().parse_args(argv))
    settings = _settings(arguments)
    read = {os.path.realpath(os.path.join(settings.data, f"{name}.jsonl")) for name in SPLITS}
    for name in ("report", "plot"):
        if arguments[name] is not None:
            check_writable(arguments[name], f"--{name}")
            if os.path.realpath(arguments[name]) in read:
                raise InputError(
                    f"--{name} {arguments[name]} would replace data or another output."
                )
            read.add(os.path.realpath(arguments[name]))
    messages = Console(stderr=True, highlight=False, markup=False)

    from mlx_dgemma.training import run

    with stop_on_interrupt() as cancel:
        prepared = run.prepare(settings, progress=messages.is_terminal)
        if prepared.leads:
            messages.print(prepared.summary, soft_wrap=True)
        if arguments["dry_run"]:
            return 0
        try:
            with _shown(messages, settings.iters) as show:
                handle = _recording(prepared, arguments, show)
                done = prepared.train(handle, cancelled=cancel.is_set) if settings.train else True
            if settings.test and done:
                line = prepared.test_line()
                if prepared.leads:
                    print(line)
        except DGemmaError:
            with suppress(DGemmaError):
                _record(prepared, arguments)
            raise
    _record(prepared, arguments)
    return 0 if done else INTERRUPTED


def _recording(
    prepared: Prepared, arguments: dict[str, Any], show: Callable[[Any], None]
) -> Callable[[Any], None]:
    """Shows events, and writes the figures with every save: a run may end at any time."""
    from mlx_dgemma.training.run_events import Saved

    def handle(event: Any) -> None:
        show(event)
        if isinstance(event, Saved):
            with suppress(DGemmaError):  # said at the end, if it is still so
                _record(prepared, arguments)

    return handle


def _record(prepared: Prepared, arguments: dict[str, Any]) -> None:
    if arguments["report"] and prepared.leads:
        write_text(arguments["report"], json.dumps(prepared.record(), indent=2) + "\n")
    if arguments["plot"] and prepared.leads:
        from mlx_dgemma.training.loss_plot import curves

        write_text(arguments["plot"], curves(prepared.events))


def _settings(arguments: dict[str, Any]) -> Settings:
    from mlx_dgemma.training.settings import Settings

    values = {} if arguments["config"] is None else _read_config(arguments["config"])
    known = Settings.__annotations__
    given = {
        name: value for name, value in arguments.items() if name in known and value is not None
    }
    return Settings.from_config(values, given)


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes 1e-5 for a number, as mlx-lm does; to YAML 1.1 it is a text."""

    exponent = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    try:
        values = yaml.load(read_argument(path, most=_MOST_CONFIG), Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {reason}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold settings, one `name: value` a line.")
    return values


class _shown:  # noqa: N801  (a context manager that reads as a verb)
    """A progress bar on a terminal, a line for every report when piped."""

    def __init__(self, messages: Console, iters: int) -> None:
        self._console = messages
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=messages,
            disable=not messages.is_terminal,
        )
        self._task = self._progress.add_task("training", total=iters)

    def __enter__(self) -> Callable[[Any], None]:
        self._progress.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Any) -> None:
        from mlx_dgemma.training.run_events import Answered, Evaluated, Report

        self._progress.update(self._task, completed=event.step)
        if isinstance(event, Report):
            line = (
                f"step {event.step}: loss {event.loss:.3f} (canvas {event.canvas_loss:.3f}, "
                f"encoder {event.encoder_loss:.3f}), {event.tokens_per_second:.0f} tokens/s, "
                f"peak {event.peak_memory / 1e9:.2f} GB"
            )
        elif isinstance(event, Evaluated):
            facts = "".join(f", {name} {value:.2f}" for name, value in event.facts.items())
            line = f"step {event.step}: validation loss {event.loss:.3f}{facts}"
        elif isinstance(event, Answered):
            line = f"the model's own answers: {event.groups} of {event.of} groups"
        else:
            line = f"step {event.step}: saved {event.path}"
        if self._console.is_terminal:
            self._console.print(line, soft_wrap=True)
        else:
            print(line, file=sys.stdout, flush=True)
