"""`mlx_dgemma.chat`: a conversation whose context stays in memory, and on disk when asked."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mlx_dgemma.cli import arguments as flags
from mlx_dgemma.cli import media
from mlx_dgemma.cli.command import Parser, command, stop_on_interrupt
from mlx_dgemma.cli.session import Session, open_session
from mlx_dgemma.cli.show_reply import Reply, print_summary, receive
from mlx_dgemma.context.prompt_cache import PromptCache
from mlx_dgemma.decoding.draws import check_seed
from mlx_dgemma.errors import DGemmaError, InputError
from mlx_dgemma.files import check_writable, expanded
from mlx_dgemma.prompt.media import Medium
from mlx_dgemma.prompt.messages import check_messages
from mlx_dgemma.prompt.patches import ImageProcessor
from mlx_dgemma.prompt.pictures import open_picture

PROMPT = "› "
MESSAGES = "messages"  # where a saved context keeps the conversation that it belongs to

HELP = """\
/help           this list
/reset          forget the conversation
/system TEXT    set the system prompt and start again (no TEXT: none)
/image FILE     show the model a picture with the next message (or a URL)
/think          let the model think before it answers, or no longer
/seed N         repeat replies with this seed (no N: a fresh one every time)
/save FILE      write the conversation and its context to a file
/load FILE      continue a saved one
/quit           leave (also Ctrl-D)
A line that ends in \\ continues on the next. Ctrl-C stops a reply."""


@dataclass
class Conversation:
    """Messages so far, their context, and what the next reply is asked with."""

    session: Session
    cache: PromptCache
    seed: int | None = None
    thinking: bool = False
    stop: list[str] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    @property
    def system_prompt(self) -> str | None:
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    def reset(self, system_prompt: str | None) -> None:
        """Starts again; the context is found again as far as the next prompt repeats it."""
        system = {"role": "system", "content": system_prompt}
        self.messages = [system] if system_prompt else []

    def show(self, source: str) -> Medium:
        """Reads a picture for the next message. It is prepared once for all turns."""
        model = self.session.model
        if "://" not in source[:16]:
            source = str(expanded(source).absolute())
        image = ImageProcessor.from_config(model.config).prepare(open_picture(source))
        self.shown.append({"type": "image", "image": image, "path": source})
        return Medium.of(image)

    def save(self, path: str | Path) -> None:
        """Images are saved by where they came from; the context holds what was read of them."""
        self.cache.cache.metadata[MESSAGES] = json.dumps(self.messages, default=lambda _: None)
        self.cache.save(path)

    def load(self, path: str | Path) -> None:
        cache = PromptCache.load(path, self.session.model, self.cache.kv_bits)
        if MESSAGES not in cache.cache.metadata:
            raise InputError(f"{path} holds a context without a conversation; /save writes both.")
        try:
            messages = json.loads(cache.cache.metadata[MESSAGES])
            check_messages(messages)
            parts = _image_parts(messages)
        except (DGemmaError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"The conversation in {path} is damaged: delete the file.") from error
        for part in parts:
            processor = ImageProcessor.from_config(self.session.model.config)
            part["image"] = processor.prepare(open_picture(part["path"]))
        self.cache, self.messages = cache, messages

    def ask(self, text: str, console: Console, live: bool) -> Reply:
        """One turn. A reply that was stopped before its first block leaves no trace."""
        from mlx_dgemma.generate import stream_generate

        said = media.message(self.shown, text) if self.shown else {"role": "user", "content": text}
        asked = [*self.messages, said]
        with stop_on_interrupt() as cancel:
            events = stream_generate(
                self.session.model,
                self.session.tokenizer,
                asked,
                drafts=live,
                cancel=cancel,
                cache=self.cache,
                seed=self.seed,
                stop=self.stop,
                enable_thinking=self.thinking,
                **self.session.options,
            )
            reply = receive(events, self.session, console, live=live)
        if reply.text or reply.finish is None or reply.finish.reason != "cancelled":
            self.messages = [*asked, {"role": "assistant", "content": reply.text}]
            self.shown = []
        return reply


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_dgemma.chat",
        description="Talk with DiffusionGemma. /help lists what can be typed beside messages.",
    )
    flags.add_prompting(parser)
    flags.add_model(parser)
    flags.add_decoding(parser)
    flags.add_display(parser)
    flags.add_version(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    console, messages = (
        Console(highlight=False, markup=False),
        Console(stderr=True, highlight=False, markup=False),
    )
    file = arguments.prompt_cache_file
    if file is not None:
        check_writable(file, "--prompt-cache-file")
    session = open_session(arguments, messages)
    talk = Conversation(
        session,
        session.prompt_cache(),
        seed=arguments.seed,
        thinking=arguments.enable_thinking,
        stop=arguments.stop,
    )
    talk.reset(arguments.system_prompt)
    if file is not None and os.path.exists(file):
        talk.load(file)
        messages.print(Text(f"Continuing {file}: {_turns(talk)}.", "dim"))

    live = console.is_terminal and not console.is_dumb_terminal and arguments.drafts is not False
    reader = _reader()
    if sys.stdin.isatty():
        console.print(Text("/help lists the commands, Ctrl-D leaves.", "dim"))
    while (line := reader()) is not None:
        try:
            if line.startswith("/"):
                if _run_command(talk, line, messages):
                    break
            elif line.strip():
                _answer(talk, line, console, live)
        except DGemmaError as error:
            messages.print(Text(f"error: {error}"), soft_wrap=True)
    if file is not None and talk.turns:
        talk.save(file)
    return 0


def _answer(talk: Conversation, line: str, console: Console, live: bool) -> None:
    shown = [Medium.of(part["image"]) for part in talk.shown]
    reply = talk.ask(line, console, live)
    if console.is_terminal:
        print_summary(reply, console, shown)
        console.print()


def _run_command(talk: Conversation, line: str, messages: Console) -> bool:
    """Runs one /command; True when it ends the chat."""
    verb, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    commands: dict[str, Callable[[], str]] = {
        "/help": lambda: HELP,
        "/reset": lambda: _reset(talk, talk.system_prompt),
        "/system": lambda: _reset(talk, rest or None),
        "/image": lambda: _image(talk, rest),
        "/think": lambda: _think(talk, rest),
        "/seed": lambda: _seed(talk, rest),
        "/save": lambda: _save(talk, rest),
        "/load": lambda: _load(talk, rest),
    }
    if verb in ("/quit", "/exit"):
        return True
    if verb not in commands:
        raise InputError(f"There is no command {verb}; /help lists them.")
    messages.print(Text(commands[verb](), "dim"), soft_wrap=True)
    return False


def _reset(talk: Conversation, system_prompt: str | None) -> str:
    talk.reset(system_prompt)
    return f"A new conversation{', with the system prompt' if system_prompt else ''}."


def _image(talk: Conversation, rest: str) -> str:
    if not rest:
        raise InputError("/image takes a file name or a URL.")
    return f"With the next message: {talk.show(rest)}."


def _image_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return [part for content in contents for part in content if part["type"] == "image"]


def _think(talk: Conversation, rest: str) -> str:
    wanted = {"": not talk.thinking, "on": True, "off": False}
    if rest not in wanted:
        raise InputError("/think takes on, off or nothing.")
    talk.thinking = wanted[rest]
    return "The model thinks first." if talk.thinking else "The model answers at once."


def _seed(talk: Conversation, rest: str) -> str:
    if not rest:
        talk.seed = None
        return "A fresh seed for every reply."
    if not (rest.isascii() and rest.isdigit()):
        raise InputError(f"/seed takes a whole number, not {rest!r}.")
    talk.seed = check_seed(int(rest))
    return f"Every reply uses seed {talk.seed}."


def _save(talk: Conversation, rest: str) -> str:
    if not rest:
        raise InputError("/save takes a file name.")
    if not talk.turns:
        raise InputError("There is nothing to save yet.")
    talk.save(expanded(rest))
    return f"Saved {_turns(talk)} to {rest}."


def _load(talk: Conversation, rest: str) -> str:
    if not rest:
        raise InputError("/load takes a file name.")
    talk.load(expanded(rest))
    return f"Continuing {rest}: {_turns(talk)}."


def _turns(talk: Conversation) -> str:
    return f"{talk.turns} turn" + ("" if talk.turns == 1 else "s")


def _reader() -> Callable[[], str | None]:
    """Reads one message, or None at the end; with line editing and a prompt on a terminal."""
    asks = sys.stdin.isatty()
    if asks:
        with suppress(ImportError):
            import readline  # noqa: F401  importing it gives input() history and editing

    def read() -> str | None:
        lines: list[str] = []
        while True:
            try:
                line = input((PROMPT if not lines else "… ") if asks else "")
            except EOFError:
                if asks:
                    print()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")
                lines.clear()
                continue
            except UnicodeDecodeError as error:
                raise InputError("Standard input is not UTF-8 text.") from error
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    return read
