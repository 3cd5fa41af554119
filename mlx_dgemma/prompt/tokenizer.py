"""Text and token ids: a checkpoint's tokenizer, loaded without the seconds that transformers takes.

Ordinary text and control tokens never mix here: `encode` treats `<turn|>` in a text as six
characters unless the caller asks for `special=True`, which only trusted text may.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dgemma.errors import CheckpointError, DGemmaError, InputError
from mlx_dgemma.files import read_json, read_text
from mlx_dgemma.model.section import Section
from mlx_dgemma.untrusted_json import printable

if TYPE_CHECKING:
    import tokenizers

# The names tokenizer_config.json gives the control tokens, and how Gemma 4 spells them.
SPELLINGS = {
    "bos": "<bos>",
    "eos": "<eos>",
    "pad": "<pad>",
    "unk": "<unk>",
    "sot": "<|turn>",
    "eot": "<turn|>",
    "soc": "<|channel>",
    "eoc": "<channel|>",
    "std": "<|tool>",
    "etd": "<tool|>",
    "stc": "<|tool_call>",
    "etc": "<tool_call|>",
    "str": "<|tool_response>",
    "etr": "<tool_response|>",
    "escape": '<|"|>',
    "think": "<|think|>",
    "boi": "<|image>",
    "eoi": "<image|>",
    "image": "<|image|>",
    "video": "<|video|>",
}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PIECE = 1 << 16  # characters that are encoded at a time
_LONGEST_PIECE = 1 << 19  # where no place to cut is found sooner
_REPLACEMENT = "\ufffd"
# The real file has 32 MB.
_MOST_BYTES = 128 << 20
# Words, digits, spaces, and a character of several bytes.
_TRIAL = "A trial of 12 words:\n\tit is \u00e9crit \u2014 \U0001f600!"


class Tokenizer:
    """A checkpoint's tokenizer with its control ids, stop ids and chat template.

    stop_ids: ids that end a reply.
    ids: control token name ("sot", "eot", ...) -> id, for those this tokenizer has.
    control_ids: every id that no ordinary text can encode to.
    longest: characters of the longest token that a text can encode to.
    chat_template: Jinja source, or None when the checkpoint brings none.
    template_tokens: the token strings a chat template may name, such as `bos_token`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        stop_ids: Iterable[int],
        *,
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
        source: str = "tokenizer.json",
    ):
        added = backend.get_added_tokens_decoder()
        ordinary = [token.content for token in added.values() if not token.special]
        if ordinary:
            # Such a spelling in a user's text would become its id whatever `special` says.
            raise CheckpointError(
                f"{source}: the added token {ordinary[0]!r} is not marked special, so user text "
                "could forge it; mark every added token with special=true."
            )
        # Set once and for all: the library then never looks for control tokens in a text, and
        # never cuts or fills a prompt as it did for the person who saved the file.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._by_spelling = {token.content: id_ for id_, token in added.items()}
        self.source = source
        self.stop_ids = frozenset(stop_ids)
        self.control_ids = frozenset(added)
        self.ids = {
            name: self._by_spelling[spelling]
            for name, spelling in SPELLINGS.items()
            if spelling in self._by_spelling
        }
        self.chat_template = chat_template
        self.template_tokens = dict(template_tokens or {})
        longest_first = sorted(self._by_spelling, key=len, reverse=True)
        self._longest_spelling = max(map(len, longest_first), default=0)
        # A pattern that never matches stands in for a tokenizer without control tokens.
        self._spelling = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        vocabulary = backend.get_vocab().items()
        self._byte_ids = frozenset(id_ for token, id_ in vocabulary if _BYTE_TOKEN.fullmatch(token))
        ordinary_lengths = (len(token) for token, id_ in vocabulary if id_ not in added)
        self.longest = max(ordinary_lengths, default=1)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def spellings(self) -> frozenset[str]:
        """How the control tokens are written."""
        return frozenset(self._by_spelling)

    def contains_control(self, text: str) -> bool:
        """Whether `text` spells a control token somewhere."""
        return next(self._spelled(text), None) is not None

    def _spelled(self, text: str) -> Iterator[re.Match[str]]:
        """The control tokens in `text`, looked for in pieces: while a pattern searches, no other
        thread runs."""
        position = 0
        while position < len(text):
            end = position + _PIECE
            match = self._spelling.search(text, position, end + self._longest_spelling)
            if match is None or match.start() >= end:
                position = end
            else:
                yield match
                position = match.end()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, without a leading bos.

        special: read spelled control tokens as such. Only for text that no user wrote.
        """
        text = _well_formed(text)
        ids: list[int] = []
        if not special:
            for piece in self._pieces(text):
                # Of the library's ways to encode, the one for batches leaves other threads running.
                (encoding,) = self._backend.encode_batch_fast([piece], add_special_tokens=False)
                ids += encoding.ids
            return ids
        for trusted, piece in self.split_control(text):
            ids += [self._by_spelling[piece]] if trusted else self.encode(piece)
        return ids

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """Every two characters that stand side by side in some token."""
        tokens = self._backend.get_vocab().items()
        return frozenset(
            token[i : i + 2]
            for token, id_ in tokens
            if id_ not in self.control_ids
            for i in range(len(token) - 1)
        )

    def _pieces(self, text: str) -> Iterator[str]:
        """A long text in pieces that encode, one after the other, as the whole does.

        Byte-pair merges join neighbours: between two characters that are neighbours in no token
        nothing can ever be joined. Encoding takes a hundred times a text's size, so that pieces
        bound the memory. InputError for a text that cannot be cut.
        """
        start = 0
        while len(text) - start > _PIECE:
            near = start + _PIECE
            places = itertools.chain(
                range(near, start, -1), range(near + 1, min(start + _LONGEST_PIECE, len(text)))
            )
            end = next((place for place in places if self._may_cut(text, place)), len(text))
            if end - start > _LONGEST_PIECE:
                raise InputError(
                    f"The text has {_LONGEST_PIECE} characters that can only be read as one word: "
                    "put other text between them."
                )
            yield text[start:end]
            start = end
        yield text[start:]

    def _may_cut(self, text: str, place: int) -> bool:
        return text[place - 1 : place + 1].replace(" ", "\u2581") not in self._neighbours

    def split_control(self, text: str) -> list[tuple[bool, str]]:
        """`text` cut into (is a control token's spelling, piece), empty pieces left out."""
        pieces, position = [], 0
        for match in self._spelled(text):
            pieces += [(False, text[position : match.start()]), (True, match.group())]
            position = match.end()
        pieces.append((False, text[position:]))
        return [(trusted, piece) for trusted, piece in pieces if piece]

    def control_id(self, spelling: str) -> int:
        """The id of a control token by its spelling; KeyError when there is none."""
        return self._by_spelling[spelling]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; control tokens are spelled out unless `skip_special`."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, id_: int) -> str:
        """The vocabulary's own spelling of one id, or an empty string for an id it lacks."""
        return self._backend.id_to_token(int(id_)) or ""

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry by its own spelling; None when there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def detokenizer(self, *, skip_special: bool = False) -> Detokenizer:
        """A fresh streaming decoder."""
        return Detokenizer(self, skip_special=skip_special)

    def is_byte(self, id_: int) -> bool:
        """Whether an id stands for one raw byte, which may be part of a character."""
        return id_ in self._byte_ids


class Detokenizer:
    """Decodes ids as they come and never gives half a character.

    The pieces joined equal `decode` of all ids. What could still change (bytes of an unfinished
    character, a run of raw byte tokens that one more byte would make invalid) waits for the next
    ids or for `finish`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._pending: list[int] = []

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids settle."""
        control = self._tokenizer.control_ids if self._skip_special else ()
        self._pending += [int(i) for i in ids if i not in control]
        if not self._pending or self._tokenizer.is_byte(self._pending[-1]):
            return ""
        text = self._tokenizer.decode(self._pending)
        if text.endswith(_REPLACEMENT):
            return ""
        self._pending = []
        return text

    def finish(self) -> str:
        """Whatever was held back; the detokenizer is fresh again."""
        text = self._tokenizer.decode(self._pending)
        self._pending = []
        return text


def load_tokenizer(folder: str | Path, stop_ids: Iterable[int]) -> Tokenizer:
    """The tokenizer and chat template of a checkpoint folder.

    stop_ids: from the model's config (`ModelConfig.stop_ids`); the tokenizer's own files name
        only one of them. Raises CheckpointError when a file is missing or damaged.
    """
    import tokenizers

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{folder} has no tokenizer.json; download the checkpoint again or copy the file "
            "from the original repository."
        )
    try:
        content = read_text(path, _MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    settings_path = folder / "tokenizer_config.json"
    values = read_json(settings_path) if os.path.exists(settings_path) else {}
    settings = Section(values, str(settings_path))
    with _library_errors(path):
        tokenizer = Tokenizer(
            tokenizers.Tokenizer.from_str(content),
            stop_ids,
            chat_template=_chat_template(folder, settings),
            template_tokens=_template_tokens(settings),
            source=str(path),
        )
        # A pattern or a decoder that cannot work shows in its first use, not in reading it.
        tokenizer.decode(tokenizer.encode(_TRIAL))
    return tokenizer


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """The tokenizers library's own errors as CheckpointError: bare Exception for most damage, and
    a panic, which is no Exception, for the rest."""
    try:
        yield
    except DGemmaError:
        raise
    except BaseException as error:
        known = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not known:
            raise
        why = printable(str(error), 200)
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {why}.") from error


def _chat_template(folder: Path, settings: Section) -> str | None:
    """chat_template.jinja, else the template inside tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if os.path.exists(path):
        try:
            return read_text(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [Section(entry, settings.source, "chat_template.") for entry in template]
        named = {entry.text("name"): entry.text("template") for entry in entries}
        return named.get("default")
    return settings.text("chat_template")


def _template_tokens(settings: Section) -> dict[str, str]:
    """Every `*_token` entry, whether a string or a saved AddedToken."""
    tokens = {}
    extra = Section(
        settings.get("model_specific_special_tokens", {}),
        settings.source,
        "model_specific_special_tokens.",
    )
    for name, value in {**settings.values, **extra.values}.items():
        if isinstance(value, Mapping):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            tokens[name] = value
    return {"bos_token": SPELLINGS["bos"], **tokens}


def _well_formed(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
