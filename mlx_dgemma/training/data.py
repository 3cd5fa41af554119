"""Training data: JSONL files in mlx-lm's forms become prompt and response ids.

    {"messages": [..., {"role": "assistant", "content": ...}]}        chat, with "tools" if any
    {"prompt": ..., "completion": ...}                                completions
    {"text": ...}                                                     text

A line that cannot be used is named by its file and number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dgemma.errors import InputError
from mlx_dgemma.files import read_argument
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.prompt.encode import prepare_prompt
from mlx_dgemma.prompt.media import SOURCES
from mlx_dgemma.prompt.messages import IMAGE_PARTS, VIDEO_PARTS
from mlx_dgemma.prompt.patches import PreparedImage
from mlx_dgemma.prompt.reply import ReplyReader
from mlx_dgemma.untrusted_json import parse

# Of one file, which is held as text while it is read.
_MOST_BYTES = 4 << 30
SPLITS = ("train", "valid", "test")
# Of a data set on the Hub: the lines, and the pictures that they can name.
_WANTED = [
    "*.jsonl",
    *(
        f"*.{end}"
        for name in ("png", "jpg", "jpeg", "webp", "gif", "bmp")
        for end in (name, name.upper())
    ),
]


@dataclass(frozen=True)
class Example:
    """One conversation. prompt, response: int32 ids [P] and [N], the response with its stop id and
    filled with end-of-sequence ids to a multiple of the canvas length. images: of the prompt."""

    prompt: np.ndarray
    response: np.ndarray
    images: tuple[PreparedImage, ...] = field(default=(), repr=False)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def ids(self) -> np.ndarray:
        """int32 [L]: prompt and response."""
        return np.concatenate([self.prompt, self.response])


@dataclass(frozen=True)
class Trail(Example):
    """An example whose response ends with a canvas that the model denoised by itself.

    canvases: int32 [K, C], noise first, then what each of the model's own first steps made of it.
    """

    canvases: np.ndarray = field(kw_only=True)


def load_split(
    source: str | Path,
    split: str,
    model: Model,
    tokenizer: Tokenizer,
    max_seq_length: int,
    *,
    prompts: bool = False,
) -> list[Example]:
    """The examples of one split of a data folder or Hub data set; none if it is not there.

    prompts: read no more than prompts, which need no answer; responses are empty.

    Raises InputError for a folder without any split, and for a line that cannot be used: no JSON,
    none of the forms, no answer, or longer than max_seq_length with its response filled up.
    """
    folder = find_data(source)
    path = folder / f"{split}.jsonl"
    if not os.path.exists(path):
        return []
    examples = []
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            read = _prompt if prompts else example_of
            examples.append(read(line, model, tokenizer, folder))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        needed = examples[-1].length + (model.config.canvas_length if prompts else 0)
        if needed > max_seq_length:
            raise InputError(
                f"{where}: {needed} tokens with the response filled up to whole "
                f"canvases, and --max-seq-length is {max_seq_length}: raise it or shorten the line."
            )
    return examples


def find_data(source: str | Path) -> Path:
    """The folder with the JSONL files: itself, or a Hub data set's after its download."""
    folder = Path(source)
    if not os.path.isdir(folder):
        if (
            os.path.exists(folder)
            or str(source).count("/") != 1
            or str(source).startswith((".", "/"))
        ):
            raise InputError(
                f"--data {source} is no folder: give one with train.jsonl, or a Hub data set's id."
            )
        folder = _download(str(source))
    if not any(os.path.isfile(folder / f"{split}.jsonl") for split in SPLITS):
        raise InputError(
            f"{folder} holds none of {', '.join(f'{split}.jsonl' for split in SPLITS)}: "
            "write one JSON object a line into train.jsonl."
        )
    return folder


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The data set {repository} cannot be downloaded: {reason}") from error


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    content = read_argument(path, "data file", _MOST_BYTES)
    found = False
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        found = True
        try:
            yield number, parse(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} {error}.") from error
    if not found:
        raise InputError(f"{path} is empty: write one JSON object a line.")


def _prompt(line: Any, model: Model, tokenizer: Tokenizer, folder: Path) -> Example:
    """The prompt of a line, whose answer is left out if it has one."""
    if not isinstance(line, Mapping) or not ("messages" in line or "prompt" in line):
        raise InputError("a JSON object is needed, with messages or prompt.")
    messages = line.get("messages", [{"role": "user", "content": line.get("prompt")}])
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages must be a list of messages.")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise InputError("a message is needed before the assistant's.")
    prepared = prepare_prompt(model, tokenizer, _at(messages, folder), tools=line.get("tools"))
    ids = np.array(prepared.network_ids(model.config.image_token_id), np.int32)
    return Example(ids, np.zeros(0, np.int32), tuple(prepared.images))


def example_of(line: Any, model: Model, tokenizer: Tokenizer, folder: Path = Path()) -> Example:
    """The example of one line's JSON; image files are looked for in `folder`.

    Raises InputError for a line that cannot be used.
    """
    if not isinstance(line, Mapping):
        raise InputError("a JSON object is needed, with messages, prompt and completion, or text.")
    if "messages" in line:
        return _chat(line["messages"], line.get("tools"), model, tokenizer, folder)
    if "prompt" in line and "completion" in line:
        if not isinstance(line["prompt"], str) or not isinstance(line["completion"], str):
            raise InputError("prompt and completion must be strings.")
        messages = [
            {"role": "user", "content": line["prompt"]},
            {"role": "assistant", "content": line["completion"]},
        ]
        return _chat(messages, line.get("tools"), model, tokenizer, folder)
    if "text" in line:
        if not isinstance(line["text"], str) or not line["text"].strip():
            raise InputError("text must be a string with something in it.")
        beginning = [tokenizer.ids["bos"]] if "bos" in tokenizer.ids else []
        ids = tokenizer.encode(line["text"])
        return _filled(beginning or ids[:1], ids[0 if beginning else 1 :], model, tokenizer)
    raise InputError("none of messages, prompt and completion, or text is there.")


def _chat(messages: Any, tools: Any, model: Model, tokenizer: Tokenizer, folder: Path) -> Example:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages must be a list of messages.")
    *before, last = messages
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise InputError("the last message must be the assistant's: it is what is learned.")
    if not before:
        raise InputError("a message is needed before the assistant's.")
    prepared = prepare_prompt(model, tokenizer, _at(before, folder), tools=tools)
    ids = prepared.network_ids(model.config.image_token_id)
    response = answer_ids(last, ids, before, tools, tokenizer)
    return _filled(ids, response, model, tokenizer, tuple(prepared.images))


def answer_ids(
    message: Mapping[str, Any],
    prompt: Sequence[int],
    before: Sequence[Any],
    tools: Any,
    tokenizer: Tokenizer,
) -> list[int]:
    """The ids of an assistant's message as the checkpoint's template writes them after `prompt`,
    its stop id last."""
    from mlx_dgemma.prompt import encode_messages

    whole = encode_messages(tokenizer, [*before, message], tools=tools, add_generation_prompt=False)
    plain = encode_messages(tokenizer, before, tools=tools)
    if whole[: len(plain)] != plain:
        raise InputError(
            "the chat template writes the conversation otherwise once it is answered; split it."
        )
    ids = whole[len(plain) :]
    stops = [place for place, id_ in enumerate(ids) if id_ in tokenizer.stop_ids]
    if not stops:  # a call: its own marker ends the turn
        ids, stops = [*ids, tokenizer.ids.get("str", min(tokenizer.stop_ids))], [len(ids)]
    ids = ids[: stops[-1] + 1]
    if len(ids) < 2:
        raise InputError("the assistant's message is empty.")
    return ids


def _at(messages: Sequence[Any], folder: Path) -> list[Any]:
    """Messages whose image and video files are found beside the data."""

    def placed(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") not in IMAGE_PARTS + VIDEO_PARTS:
            return part
        named = {name: moved(part[name]) for name in SOURCES if name in part}
        return {**part, **named}

    def moved(source: Any) -> Any:
        if isinstance(source, Mapping):
            return {**source, "url": moved(source.get("url"))}
        local = isinstance(source, str) and "://" not in source and not source.startswith("data:")
        return str(folder / source) if local else source

    def whole(message: Any) -> Any:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            return {**message, "content": [placed(part) for part in message["content"]]}
        return message

    return [whole(message) for message in messages]


def _filled(
    prompt: Sequence[int],
    response: Sequence[int],
    model: Model,
    tokenizer: Tokenizer,
    images: tuple[PreparedImage, ...] = (),
) -> Example:
    stop = tokenizer.ids.get("eot", min(tokenizer.stop_ids))
    filler = tokenizer.ids.get("eos", stop)
    ids = list(response)
    if not ids:
        raise InputError("nothing is left to learn.")
    if ids[-1] not in (*tokenizer.stop_ids, tokenizer.ids.get("str")):
        ids.append(stop)
    ids += [filler] * (-len(ids) % model.config.canvas_length)
    return Example(np.array(prompt, np.int32), np.array(ids, np.int32), images)


def response_text(example: Example, tokenizer: Tokenizer) -> str:
    """The response as a user would read it."""
    reader = ReplyReader(tokenizer)
    ids = example.response.tolist()
    end = next((place for place, id_ in enumerate(ids) if id_ in tokenizer.stop_ids), len(ids))
    return reader.feed(ids[:end]).text + reader.finish().text
