"""Decisions from single decoder passes: the probabilities of the labels at one open position.

The prompt holds the state and one question; the canvas holds the answer's form, everything pinned
but one slot of noise. One pass gives the label probabilities there, the mean over several noises
and over the orders in which the answers are listed. Every question is read by itself after the
state, so its answer depends on no other question, on no name and on no order.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypedDict, Unpack
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from mlx_dgemma.context.prompt_cache import PromptCache, check_cache, exclusively
from mlx_dgemma.decisions.answers import Answer, make_answer
from mlx_dgemma.decisions.canvas_read import read_prompt
from mlx_dgemma.decisions.forms import GROUP, Form, groups, make_forms
from mlx_dgemma.decisions.question_prompt import is_image, question_messages, state_parts
from mlx_dgemma.decisions.questions import Choice, Question, read_questions
from mlx_dgemma.decoding.blocks import check_cancel
from mlx_dgemma.decoding.draws import Place, SeededDraws, check_seed
from mlx_dgemma.errors import (
    CancelledError,
    GpuError,
    GpuMemoryError,
    InputError,
    NumericsError,
)
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer, encode_messages
from mlx_dgemma.prompt.encode import prepare_prompt
from mlx_dgemma.prompt.media import PreparedPrompt
from mlx_dgemma.prompt.pictures import LOCAL, Access

WIDTHS = 16  # a canvas is as long as its form, rounded up to a multiple of this
NOISES = 4  # canvases read side by side; part of an answer's meaning, so always the same
MOST_READS = 4  # batches of them where they disagree
AGREEMENT = 0.02  # standard error of a label's probability above which more are read
_opens_with_thought: WeakKeyDictionary[Tokenizer, bool] = WeakKeyDictionary()


class DecideOptions(TypedDict, total=False):
    """The keywords of `decide`."""

    images: Sequence[Any] | None
    access: Access
    orders: int
    seed: int
    system_prompt: str | None
    kv_bits: int | None
    cache: PromptCache | None
    cancel: threading.Event | None


@dataclass(frozen=True)
class Decision:
    """The answers by question id, and their cost.

    prompt_tokens: ids read, the state once. cached_tokens: ids of the state that a cache held.
    forwards: decoder passes over a batch of canvases. seconds: of all of it.
    """

    answers: dict[str, Answer]
    prompt_tokens: int
    cached_tokens: int
    forwards: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The answers in the form of `POST /v1/systemone`."""
        return {name: answer.to_json() for name, answer in self.answers.items()}


def decide(
    model: Model,
    tokenizer: Tokenizer,
    state: Any,
    questions: Mapping[str, Question | Mapping[str, Any]],
    **options: Unpack[DecideOptions],
) -> Decision:
    """Answers questions about a state without generating text.

    state: a text, or anything that JSON can hold; a list of message parts may hold images.
    questions: by id, each a Noul, Choice or Score or its JSON form.
    images: for a state whose image parts name none, or to be seen before a text. access: where
        pictures may come from; anywhere, unless others write the state.
    orders: in how many orders the answers are listed, 2 by default; more cost time.
    seed: of the noise, 0 by default; together with state and question it decides every draw.
    cache: a PromptCache that keeps the state's context for the next questions about it.
    kv_bits, system_prompt: as in `stream_generate`.
    cancel: ends the work between two forms, or parts of a long state, with CancelledError.

    Raises QuestionError for a question that cannot be asked, InputError for a state that does
    not fit the context.
    """
    for step in decide_turns(model, tokenizer, state, questions, **options):
        if isinstance(step, Decision):
            return step
    raise AssertionError("decide_turns ends with a Decision")


def decide_turns(
    model: Model,
    tokenizer: Tokenizer,
    state: Any,
    questions: Mapping[str, Question | Mapping[str, Any]],
    **options: Unpack[DecideOptions],
) -> Generator[int | Decision, None, None]:
    """`decide` for a thread that others wait for: yields the number of passes after every form
    of a question, and the Decision last.

    Questions, texts and images are read at once, on the caller's thread; the generator computes.
    """
    unknown = sorted(set(options) - set(DecideOptions.__annotations__))
    if unknown:
        known = ", ".join(sorted(DecideOptions.__annotations__))
        raise InputError(f"Unknown option {unknown[0]!r}; the options are: {known}.")
    asked = read_questions(questions)
    orders = check_orders(options.get("orders", 2))
    reader = _Reader(model, tokenizer, state, options)
    return exclusively(reader.cache, _decide(reader, asked, orders))


def check_orders(orders: object) -> int:
    """In how many orders answers are listed; InputError for what is no such number."""
    if type(orders) is not int or not 1 <= orders <= GROUP:
        raise InputError(f"orders={orders!r} is not possible: use 1 to {GROUP}.")
    return orders


def _decide(
    reader: _Reader, questions: dict[str, Question], orders: int
) -> Generator[int | Decision, None, None]:
    started = time.perf_counter()
    answers: dict[str, Answer] = {}
    try:
        with explained():
            reader.read_state()
            for name, question in questions.items():
                reads = yield from reader.ask(question, orders)
                answers[name] = make_answer(question, reads)
    except (GpuError, GpuMemoryError):
        reader.forget()
        raise
    yield Decision(
        answers,
        prompt_tokens=reader.prompt_tokens,
        cached_tokens=reader.cached_tokens,
        forwards=reader.forwards,
        seconds=time.perf_counter() - started,
    )


class _Reader:
    """Reads the state once and any number of forms after it."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, state: Any, options: DecideOptions
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._options = options
        images = options.get("images")
        if images is not None and not isinstance(images, Sequence):
            raise InputError(f"images is a list of pictures, not a {type(images).__name__}.")
        self._images = list(images or ())
        self._parts = state_parts(state)
        if self._images and not any(map(is_image, self._parts)):
            self._parts = [
                {"type": "image", "image": image} for image in self._images
            ] + self._parts
            self._images = []
        self._seed = check_seed(options.get("seed", 0))
        self._cancel = options.get("cancel")
        check_cancel(self._cancel)
        cache = options.get("cache")
        check_cache(cache)
        self.cache = PromptCache(model, options.get("kv_bits")) if cache is None else cache
        self._shared: list[int] = []
        self._prefix = self._state_prompt()
        self.prompt_tokens = len(self._prefix.ids)
        self.cached_tokens = 0
        self.forwards = 0

    def read_state(self) -> None:
        """Fills the cache with what all questions share."""
        self._check_room(len(self._prefix.ids))
        cancel = self._cancel
        self.cached_tokens = read_prompt(
            self._model, self._prefix, self.cache, None if cancel is None else cancel.is_set
        )
        self._context = self.cache.cache
        self._start = self._context.snapshot()

    def forget(self) -> None:
        """Empties the cache, whose arrays were perhaps never computed."""
        self.cache.forget()

    def ask(self, question: Question, orders: int) -> Generator[int, None, np.ndarray]:
        """Reads [r, n]: distributions over the question's n answers, one for each noise and
        order. Yields the number of passes after every form."""
        if not isinstance(question, Choice) or len(question.options) <= GROUP:
            return (yield from self._read(question, orders))
        count = len(question.options)
        parts, within = groups(count), []
        for part in parts:
            reads = yield from self._read(question, orders, part, most=1)
            within.append(reads[:, list(part)].mean(axis=0))
        best = [part[int(shares.argmax())] for part, shares in zip(parts, within, strict=True)]
        final = yield from self._read(question, orders, best)
        reads = np.zeros((len(final), count))
        for part, shares, winner in zip(parts, within, best, strict=True):
            reads[:, list(part)] = final[:, winner, None] * (shares / shares.sum())
        return reads

    def _read(
        self,
        question: Question,
        orders: int,
        among: Sequence[int] | None = None,
        most: int = MOST_READS,
    ) -> Generator[int, None, np.ndarray]:
        forms = make_forms(self._tokenizer, question, orders, among)
        width = max(max(form.answers) for form in forms) + 1
        total = len(question.options) if isinstance(question, Choice) else width
        reads = []
        for form in forms:
            shares = self._read_form(form, most)
            spread = np.zeros((len(shares), total))
            spread[:, list(form.answers)] = shares
            reads.append(spread)
            yield self.forwards
        return np.concatenate(reads)

    def _read_form(self, form: Form, most: int) -> np.ndarray:
        """float64 [r, labels]: the labels' probabilities under r noises, of `most` passes at most
        where they disagree."""
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError("The questions were cancelled before all were answered.")
        rest = self._question_ids(form.text)
        self._check_room(len(self._prefix.ids) + len(rest))
        self._context.restore(self._start)
        self._model.prefill(np.array(rest)[None], self._context)
        self.prompt_tokens += len(rest)
        canvas, slot = self._canvas()
        keys = np.array([self._seed, *self._prefix.keys, *rest], dtype=np.int64)
        digest = hashlib.sha256(keys.tobytes())
        draws = SeededDraws(int.from_bytes(digest.digest()[:7], "little"))
        vocabulary = self._model.config.text.vocab_size
        labels = mx.array(form.labels)
        rows = self._model.embedding_matrix.take(labels)
        reads: list[np.ndarray] = []
        while True:
            noise = draws.canvas(Place(0, 0, len(reads)), NOISES, vocabulary)
            ids = mx.array(np.tile(canvas, (NOISES, 1)))
            ids[:, slot] = noise
            hidden = self._model.hidden(ids, self._context)[:, slot]
            logits = self._model.softcap(hidden @ rows.astype(hidden.dtype).T)
            shares = np.array(mx.softmax(logits, axis=-1)).astype(np.float64)
            if not np.isfinite(shares).all():
                raise NumericsError(
                    "The network produced NaN or Inf; check the weights with "
                    "`mlx_dgemma.convert verify`."
                )
            self.forwards += 1
            reads.append(shares)
            found = np.concatenate(reads)
            stderr = found.std(axis=0, ddof=1).max() / np.sqrt(len(found))
            if stderr <= AGREEMENT or len(reads) == most:
                return found

    def _canvas(self) -> tuple[np.ndarray, int]:
        """int32 [C]: the pinned form of an answer, and the position of its slot."""
        ids = self._tokenizer.ids
        opening: list[int] = []
        if self._opens_with_thought():
            opening = [ids["soc"], *self._tokenizer.encode("thought\n"), ids["eoc"]]
        form = [*opening, 0, ids.get("eot", min(self._tokenizer.stop_ids))]
        length = -(-len(form) // WIDTHS) * WIDTHS
        filler = ids.get("eos", form[-1])
        return np.array([*form, *[filler] * (length - len(form))], dtype=np.int32), len(opening)

    def _opens_with_thought(self) -> bool:
        """Whether this model opens a reply without thoughts with an empty thought, as its first
        look at a plain prompt shows; asked once for each tokenizer."""
        known = _opens_with_thought.get(self._tokenizer)
        if known is None:
            known = False
            if {"soc", "eoc"} <= set(self._tokenizer.ids):
                context = self._model.make_cache()
                prompt = prepare_prompt(self._model, self._tokenizer, "Answer yes.")
                self._model.prefill(np.array(prompt.ids)[None], context)
                vocabulary = self._model.config.text.vocab_size
                noise = SeededDraws(0).canvas(Place(0, 0, 0), WIDTHS, vocabulary)
                logits = self._model.raw_logits(self._model.hidden(noise[None], context)[:, :1])
                known = int(mx.argmax(logits[0, 0])) == self._tokenizer.ids["soc"]
            _opens_with_thought[self._tokenizer] = known
        return known

    def _state_prompt(self) -> PreparedPrompt:
        """What the prompts of all questions begin with: what two of them share."""
        one, other = (self._encoded(text) for text in ("Question:\n", "Question: ?"))
        pairs = zip(one, other, strict=False)
        self._shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        whole = prepare_prompt(
            self._model,
            self._tokenizer,
            question_messages(self._parts, "Question:\n"),
            images=self._images or None,
            access=self._options.get("access", LOCAL),
            system_prompt=self._options.get("system_prompt"),
        )
        end = len(whole.ids) - (len(one) - len(self._shared))
        return PreparedPrompt(whole.ids[:end], whole.images, whole.media, whole.placeholders)

    def _question_ids(self, text: str) -> list[int]:
        """The ids of a form, which follow those of the state."""
        if len(text) > self._room * self._tokenizer.longest:
            raise InputError(f"A question has more text than {self._room} tokens: shorten it.")
        ids = self._encoded(text)
        count = len(self._shared)
        if ids[:count] != self._shared:
            raise InputError(
                "The last word of this state and the question become one token: end the state "
                "with a line break."
            )
        return ids[count:]

    def _encoded(self, text: str) -> list[int]:
        """The prompt with one id for each image, none of which is read."""
        return encode_messages(
            self._tokenizer,
            question_messages(self._parts, text),
            system_prompt=self._options.get("system_prompt"),
        )

    @property
    def _room(self) -> int:
        """Tokens that fit before a canvas."""
        return self._model.config.text.max_position_embeddings - 2 * WIDTHS

    def _check_room(self, tokens: int) -> None:
        if tokens > self._room:
            raise InputError(
                f"The state and a question have {tokens} tokens but {self._room} fit: shorten the "
                "state or the question."
            )
