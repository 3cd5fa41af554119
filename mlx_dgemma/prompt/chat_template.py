"""Messages become prompt ids through the checkpoint's own chat template, safely.

The template joins control tokens and untrusted text in one string, so that a user who writes
`<turn|>` could end her turn and speak as the system. Before rendering, every character in the
untrusted text that could begin or end a control token is therefore exchanged for a private
one; a control token found in the rendering then can only be the template's own. The rest is
encoded as plain text, in the same stretches as the ordinary path, so that harmless
conversations get exactly the ids of plain rendering and tokenizing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.files import expanded, read_text
from mlx_dgemma.prompt.messages import check_messages, declared, merge_turns
from mlx_dgemma.prompt.tokenizer import SPELLINGS

if TYPE_CHECKING:
    from mlx_dgemma.prompt.tokenizer import Tokenizer

# (is a control token's spelling, text)
Piece = tuple[bool, str]
# Supplementary private use, from the end: what a text is least likely to hold.
_PIECE = 1 << 16  # characters
_PRIVATE = range(0x10FFFD, 0x100000, -1)


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    system_prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
    add_generation_prompt: bool = True,
    expand: Callable[[str], list[Piece]] | None = None,
) -> list[int]:
    """Prompt ids of a conversation in OpenAI's message form.

    Each image part becomes one image id, each video part one video id; expand may replace a
    control token of the template's by other pieces. Thoughts of earlier turns are left out;
    `reasoning` of the running tool loop is passed on, as the template decides. Raises
    InputError for messages or tools that cannot be rendered, and CheckpointError when the
    checkpoint has no usable template.
    """
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"The checkpoint of {tokenizer.source} has no chat template; "
            "pass token ids instead of messages, or add its chat_template.jinja."
        )
    conversation = merge_turns(check_messages(messages, system_prompt=system_prompt))
    declarations = declared(tools)
    escape = _ControlEscape(tokenizer, [conversation, declarations])
    escaped: list[dict[str, Any]] = escape.apply(conversation)
    spoken: list[str] = []
    if any(m.get("tool_calls") and m["content"] for m in escaped) and not _texts_first(tokenizer):
        escaped, spoken = _take_texts_out(escaped, escape.spare)
    rendered = _render(
        tokenizer,
        messages=escaped,
        tools=escape.apply(declarations) or None,
        enable_thinking=enable_thinking,
        add_generation_prompt=add_generation_prompt,
    )
    pieces: list[Piece] = []
    for trusted, piece in tokenizer.split_control(rendered):
        if not trusted:
            _put_texts_back(pieces, piece, spoken, escape)
        else:
            pieces += [(True, piece)] if expand is None else expand(piece)
    ids: list[int] = []
    for trusted, run in itertools.groupby(_closed_turns(pieces), key=lambda piece: piece[0]):
        texts = [text for _, text in run]
        if trusted:
            ids += map(tokenizer.control_id, texts)
        else:
            ids += tokenizer.encode("".join(texts))
    return ids


def _texts_first(tokenizer: Tokenizer) -> bool:
    """Whether the template writes an assistant's text before the calls of the same message.

    The published template of June 2026 writes it after the tool's results and closes the turn.
    """
    text, name = "Spoken", "called"
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": {}}}
    rendered = _render(
        tokenizer,
        messages=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "b"},
        ],
        tools=None,
        enable_thinking=False,
        add_generation_prompt=True,
    )
    return 0 <= rendered.find(text) < rendered.find(name)


def _take_texts_out(
    messages: list[dict[str, Any]], spare: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages whose calls follow text without that text, and the texts.

    The place of each is marked in the name of the message's first call, by its number between
    two `spare` characters. Without text the template leaves the model's turn open.
    """
    marked: list[dict[str, Any]] = []
    spoken: list[str] = []
    for message in messages:
        calls, text = message.get("tool_calls"), message["content"]
        if calls and isinstance(text, str) and text.strip():
            function = calls[0]["function"]
            name = f"{spare}{len(spoken)}{spare}{function['name']}"
            first = {**calls[0], "function": {**function, "name": name}}
            message = {**message, "content": "", "tool_calls": [first, *calls[1:]]}
            spoken.append(text.strip())
        marked.append(message)
    return marked, spoken


def _put_texts_back(
    pieces: list[Piece], piece: str, spoken: list[str], escape: _ControlEscape
) -> None:
    """Adds a piece to the others, texts that were taken out standing before their calls.

    A call begins with the control token before its name. Its name comes again with its result.
    """
    parts = piece.split(escape.spare)
    for number in parts[1::2]:
        text = spoken[int(number)]
        at = len(pieces) - (1 if pieces and pieces[-1][0] else 0)
        if text:
            pieces.insert(at, (False, escape.undo(text)))
            spoken[int(number)] = ""
    pieces.append((False, escape.undo("".join(parts[::2]))))


def _closed_turns(pieces: list[Piece]) -> list[Piece]:
    """The pieces with every turn ended before the next one begins.

    After a tool's result the published template of June 2026 leaves the model's turn open, also
    where a user goes on.
    """
    closed: list[Piece] = []
    inside = False
    for piece in pieces:
        if piece == (True, SPELLINGS["sot"]):
            closed += [(True, SPELLINGS["eot"]), (False, "\n")] if inside else []
            inside = True
        elif piece == (True, SPELLINGS["eot"]):
            inside = False
        closed.append(piece)
    return closed


def read_template(template: str | Path) -> str:
    """Jinja source: itself, or what the file of that name holds. Raises InputError."""
    from mlx_dgemma.prompt.sandbox import check_template

    source = template if isinstance(template, str) else ""
    if "{{" not in source and "{%" not in source:
        try:
            source = read_text(expanded(template))
        except OSError as error:
            raise InputError(
                f"The chat template {template} cannot be read ({error.strerror}): name a Jinja "
                "file."
            ) from error
    check_template(source)
    return source


def _render(tokenizer: Tokenizer, **variables: Any) -> str:
    from mlx_dgemma.prompt.sandbox import render  # Jinja takes a moment

    assert tokenizer.chat_template is not None
    return render(
        tokenizer.chat_template, tokenizer.source, **tokenizer.template_tokens, **variables
    )


class _ControlEscape:
    """Exchanges the characters that begin or end control tokens for private ones, and back."""

    def __init__(self, tokenizer: Tokenizer, values: Any):
        edges = sorted({s[0] for s in tokenizer.spellings} | {s[-1] for s in tokenizer.spellings})
        taken = set(tokenizer.chat_template or "")
        for text in _strings(values):
            for start in range(0, len(text), _PIECE):
                taken.update(text[start : start + _PIECE])
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        exchange = dict(zip(edges, free, strict=False))
        self.spare = next(free)  # a character that stands nowhere
        self._tokenizer = tokenizer
        self._exchange = exchange

    def apply(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._do(value)
        if isinstance(value, Mapping):
            return {self._apply_to_key(key): self.apply(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.apply(inner) for inner in value]
        return value

    def _apply_to_key(self, key: Any) -> Any:
        # Templates sort by key, so a key changes only when it spells a whole control token; the
        # colon after a key keeps it from spelling one together with what follows.
        if isinstance(key, str) and self._tokenizer.contains_control(key):
            return self._do(key)
        return key

    def _do(self, text: str) -> str:
        for edge, private in self._exchange.items():  # many times as fast as `translate`
            text = text.replace(edge, private)
        return text

    def undo(self, text: str) -> str:
        for edge, private in self._exchange.items():
            text = text.replace(private, edge)
        return text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
