"""The model as lm-evaluation-harness asks it: replies, and scores of given texts.

Replies are those of `stream_generate`, for prompts in the chat template or raw; scores come from
the encoder pass (scoring.py). A seed belongs to a question, whatever else is asked, so that two
runs with different settings draw the same noise for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows

from mlx_dgemma.decoding.draws import MAX_SEED
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.evaluation.several_replies import Answer, replies
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer, encode_messages
from mlx_dgemma.scoring import continuation_scores

MOST_TOKENS = 8192  # of a reply, where neither task nor user bounds it; mlx-lm's number
Track = Callable[[Sequence[Any], str], Iterable[Any]]


class Asked(NamedTuple):
    """One reply's place: the question `document` of a task, its `part`, which repeat of
    it this is, and the run (seed) it belongs to."""

    task: str
    document: int
    part: int
    repeat: int
    run: int


class ChatPrompt(str):
    """Messages on their way through lm-eval, which wants a text: their JSON.

    They are encoded from `messages`, so that no text of a data set becomes a control token.
    """

    messages: list[dict[str, str]]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> ChatPrompt:
        made = cls(json.dumps(list(messages), ensure_ascii=False))
        made.messages = [dict(message) for message in messages]
        return made


@dataclass(frozen=True)
class Manner:
    """How the model is asked.

    settings: for decoding; their max_tokens is replaced by a task's unless `most` is given.
    seed: of the first run; runs: how many replies every question gets, each in a run of its own.
    batch: canvases denoised together. chat: use the chat template. thinking: let it think first.
    """

    settings: DecodingSettings
    seed: int = 123
    runs: int = 1
    batch: int = 8
    most: int | None = None
    chat: bool = True
    thinking: bool = False


class Harness(LM):
    """A loaded model for `lm_eval.simple_evaluate`; `run` says which run asks now.

    answers: every reply given, by its place. track: wraps what is worked through, to show progress.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        manner: Manner,
        track: Track = lambda work, _: work,
    ) -> None:
        super().__init__()
        self.network = model
        self.reader = tokenizer
        self.manner = manner
        self.run = 0
        self.answers: dict[Asked, Answer] = {}
        self._scored: dict[tuple[str, str], tuple[float, bool]] = {}
        self._rolled: dict[str, float] = {}
        self._track = track

    @property
    def tokenizer_name(self) -> str:
        return hashlib.sha256((self.reader.chat_template or "").encode()).hexdigest()[:16]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.reader.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A prompt of these messages; where the last is the assistant's, its beginning."""
        return ChatPrompt.of(chat_history)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """All runs' replies are made in the first, side by side; later ones find theirs."""
        places = self._places(requests)
        if any(place not in self.answers for place in places):
            self._generate(requests, places)
        return [self.answers[place].text for place in places]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(nats, whether each token is the likeliest) of every continuation of its context."""
        pairs = [(request.args[0], request.args[1]) for request in requests]
        contexts: dict[str, list[str]] = {}
        for context, continuation in dict.fromkeys(pairs):
            if (context, continuation) not in self._scored:
                contexts.setdefault(context, []).append(continuation)
        for context in self._track(list(contexts), "scoring"):
            for continuation, found in zip(
                contexts[context], self._continuations(context, contexts[context]), strict=True
            ):
                self._scored[context, continuation] = found
        return [self._scored[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Nats of whole texts, in windows as long as the context, each token predicted once."""
        texts = [request.args[0] for request in requests]
        new = [text for text in dict.fromkeys(texts) if text not in self._rolled]
        for text in self._track(new, "scoring"):
            windows = get_rolling_token_windows(
                self.reader.encode(text), self.reader.ids["bos"], self._room - 1, context_len=1
            )
            total = 0.0
            for seen, predicted in windows:
                context = seen[: len(seen) - len(predicted) + 1]
                (scored,) = continuation_scores(self.network, context, [predicted])
                total += float(scored.logprobs.sum())
            self._rolled[text] = total
        return [self._rolled[text] for text in texts]

    @property
    def _room(self) -> int:
        return int(self.network.config.text.max_position_embeddings)

    def _places(self, requests: Sequence[Instance]) -> list[Asked]:
        """Repeats of a question stand beside each other, as the same request."""
        seen = Counter[tuple[str, int, int]]()
        places = []
        for request in requests:
            question = (str(request.task_name), int(request.doc_id or 0), int(request.idx))
            places.append(Asked(*question, seen[question], self.run))
            seen[question] += 1
        return places

    def _generate(self, requests: Sequence[Instance], places: Sequence[Asked]) -> None:
        together: dict[tuple[str, int, int], list[Asked]] = {}
        by_question: dict[tuple[str, int, int], Instance] = {}
        for request, place in zip(requests, places, strict=True):
            together.setdefault(place[:3], []).append(place)
            by_question[place[:3]] = request
        for question in self._track(list(together), "replies"):
            request = by_question[question]
            wanted = [
                place._replace(run=run)
                for place in together[question]
                for run in range(self.manner.runs)
            ]
            options = request.args[1]
            answers = replies(
                self.network,
                self.reader,
                self._ids(request.args[0]),
                [seed_of(self.manner.seed, place) for place in wanted],
                replace(self.manner.settings, max_tokens=self._most(options)),
                stop=_until(options),
                batch=self.manner.batch,
            )
            self.answers.update(zip(wanted, answers, strict=True))

    def _most(self, options: Mapping[str, Any]) -> int:
        return self.manner.most or int(options.get("max_gen_toks", MOST_TOKENS))

    def _ids(self, prompt: str) -> list[int]:
        """Ids of a prompt to reply to; a beginning of the reply follows the template's own."""
        if not isinstance(prompt, ChatPrompt):
            return [self.reader.ids["bos"], *self.reader.encode(prompt)]
        messages, begun = prompt.messages, ""
        if messages and messages[-1]["role"] == "assistant":
            messages, begun = messages[:-1], messages[-1]["content"]
        thinking = self.manner.thinking and not begun
        ids = encode_messages(self.reader, messages, enable_thinking=thinking)
        return [*ids, *self.reader.encode(begun)]

    def _continuations(
        self, context: str, continuations: Sequence[str]
    ) -> list[tuple[float, bool]]:
        parts = [self._divided(context, continuation) for continuation in continuations]
        ids = parts[0][0]
        longest = max(len(tokens) for _, tokens in parts)
        found = []
        for scored, (_, tokens) in zip(
            continuation_scores(
                self.network,
                ids[-(self._room - longest) :],
                [tokens for _, tokens in parts],
                top_logprobs=1,
            ),
            parts,
            strict=True,
        ):
            likeliest = bool((scored.top_ids[:, 0] == tokens).all())
            found.append((float(scored.logprobs.sum()), likeliest))
        return found

    def _divided(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both; in raw text a space between them belongs to the continuation, and the two
        are encoded as one text."""
        if isinstance(context, ChatPrompt):
            return self._ids(context), self.reader.encode(continuation)
        kept = context.rstrip()
        before = self.reader.encode(kept)
        whole = self.reader.encode(context + continuation)
        return [self.reader.ids["bos"], *before], whole[len(before) :]


def seed_of(seed: int, place: Asked) -> int:
    """The seed of one reply: it depends on the question and on nothing else that is asked."""
    digest = hashlib.sha256(json.dumps([seed, *place]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED


def _until(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]
