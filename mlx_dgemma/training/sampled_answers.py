"""A model's own answers to prompts, with the canvases of its own first steps that led to them.

A first few steps are taken as the tuned model will take them, with a looser entropy bound: several
tokens are drawn at once, and what was drawn decides which answer it becomes. From there the same
model goes on by the checkpoint's rules, but takes the likeliest token instead of drawing: it
repairs what does not fit together and chooses nothing more, so that the answer is nearly a function
of the canvas, and the network can learn to be sure of it at once.

`decoding/` takes blocks of one prompt by one set of rules. Here a padded batch of different prompts
takes its steps by two, each row changes from one to the other at a step of its own, and every
canvas on the way is kept; so it has a loop of its own. The rules themselves (what is accepted, the
temperature, when a canvas is done) are `decoding/`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.sampler import EntropyBoundSampler, StepInput
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.stopping import StableAndConfident
from mlx_dgemma.decoding.temperature import temperature
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.training.batches import Rows, padded
from mlx_dgemma.training.data import Example, Trail
from mlx_dgemma.training.forward import Passes
from mlx_dgemma.training.loss import rows_at_once
from mlx_dgemma.training.run_events import Answered
from mlx_dgemma.training.tensor_files import write_tensors

OWN_STEPS = (0.5, 0.35, 0.15)  # how often an answer begins with one, two, three steps of its own
MOST_STEPS = 16  # of a canvas that is learned from: one that takes more has lost its way


class Answers:
    """The trails of a set of prompts, kept in a file as they are made.

    file: a safetensors file, which is gone on with where it is there; made by the same `identity`.
    keep: whether it is written here; one of several machines does.
    """

    def __init__(self, file: Path, identity: str, canvas_length: int, *, keep: bool = True) -> None:
        self._file, self._identity, self._keep = file, identity, keep
        self._length = canvas_length
        self.groups = 0  # of prompts that are answered
        self._prompts: list[int] = []
        self._trails: list[Trail] = []
        if os.path.exists(file):
            self._read()

    def ask(
        self,
        asker: Asker,
        prompts: Sequence[Example],
        times: int,
        batch_size: int,
        seed: Sequence[int],
        show: Callable[[Answered], None],
        *,
        cancelled: Callable[[], bool],
        own: bool = True,
        step: int = 0,
    ) -> bool:
        """Answers every prompt `times` times, in batches of like length; False when cancelled.

        own: see `Asker`. show: called after every group, with the training's `step`.
        """
        order = sorted(range(len(prompts)), key=lambda index: prompts[index].length)
        order = [index for index in order for _ in range(times)]
        starts = np.random.default_rng([*seed, 5]).permutation(range(0, len(order), batch_size))
        for number, start in enumerate(starts.tolist()):
            if number < self.groups:
                continue
            if cancelled():
                return False
            chosen = order[start : start + batch_size]
            rng = np.random.default_rng([*seed, 4, number])
            found = asker.answer([prompts[index] for index in chosen], rng, own=own)
            self._trails += [trail for _, trail in found]
            self._prompts += [chosen[row] for row, _ in found]
            self.groups = number + 1
            if self._keep:
                self._write()
            show(Answered(self.groups, len(starts), step))
        return True

    def trails(self, prompts: Sequence[Example]) -> list[Trail]:
        """Every trail, with the prompt and images that it answers."""
        return [
            replace(trail, prompt=prompts[index].prompt, images=prompts[index].images)
            for index, trail in zip(self._prompts, self._trails, strict=True)
        ]

    def _write(self) -> None:
        responses = [trail.response for trail in self._trails]
        paths = [trail.canvases for trail in self._trails]
        tensors = {
            "prompts": mx.array(np.array(self._prompts, np.int32)),
            "lengths": mx.array(np.array([len(ids) for ids in responses], np.int32)),
            "responses": mx.array(np.concatenate([*responses, np.zeros(0, np.int32)])),
            "counts": mx.array(np.array([len(path) for path in paths], np.int32)),
            "canvases": mx.array(np.concatenate([*paths, np.zeros((0, self._length), np.int32)])),
        }
        write_tensors(self._file, tensors, {"groups": str(self.groups), "identity": self._identity})

    def _read(self) -> None:
        try:
            loaded: Any = mx.load(str(self._file), return_metadata=True)
            tensors, header = loaded
            arrays = {name: np.array(tensor) for name, tensor in tensors.items()}
            self.groups = int(header["groups"])
            same = header["identity"] == self._identity
            responses = np.split(arrays["responses"], np.cumsum(arrays["lengths"])[:-1])
            paths = np.split(arrays["canvases"], np.cumsum(arrays["counts"])[:-1])
            self._prompts = arrays["prompts"].tolist()
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file} is damaged: delete it to begin again.") from error
        if not same:
            raise CheckpointError(
                f"{self._file} holds answers of another model, data or settings: use the same, or "
                "a new --adapter-path."
            )
        nothing = np.zeros(0, np.int32)
        self._trails = [
            Trail(nothing, responses[row], canvases=paths[row])
            for row in range(len(self._prompts))
        ]  # fmt: skip


@dataclass(frozen=True)
class Asker:
    """Answers batches of prompts.

    settings: the checkpoint's. bound: of the first steps' entropy. stop_ids: what ends a reply.
    max_length: tokens of prompt and answer; the canvas that would pass it is left out. judge: of a
    prompt and the ids of an answer that has ended, whether it may be learned.
    """

    passes: Passes
    settings: DecodingSettings
    bound: float
    stop_ids: frozenset[int]
    max_length: int
    judge: Callable[[Example, np.ndarray], bool] | None = None

    def answer(
        self, prompts: Sequence[Example], rng: np.random.Generator, *, own: bool
    ) -> list[tuple[int, Trail]]:
        """One answer to each prompt: (row, trail) for every canvas that converged.

        prompts: examples, whose responses are continued. own: begin with own steps, and take the
        likeliest tokens afterwards; otherwise the answer is the reference's, its trail noise alone.
        """
        trails: list[tuple[int, Trail]] = []
        rows = list(enumerate(prompts))
        length = self.passes.model.config.canvas_length
        while rows:
            found = self._canvases([prompt for _, prompt in rows], rng, own)
            named = [(rows[place][0], trail) for place, trail in found]
            trails += named
            rows = [
                (row, trail)
                for row, trail in named
                if not self._ended(trail) and trail.length + length <= self.max_length
            ]
        if self.judge is None:
            return trails
        last = dict(trails)  # a row's last canvas holds its whole answer
        right = {
            row
            for row, trail in last.items()
            if self._ended(trail) and self.judge(prompts[row], trail.response)
        }
        return [(row, trail) for row, trail in trails if row in right]

    def _ended(self, trail: Trail) -> bool:
        return bool(self.stop_ids.intersection(trail.response.tolist()))

    def _canvases(
        self, prompts: Sequence[Example], rng: np.random.Generator, own: bool
    ) -> list[tuple[int, Trail]]:
        """The next canvas of each prompt whose denoising converged within `MOST_STEPS`."""
        steps = 1 + rng.choice(len(OWN_STEPS), size=len(prompts), p=OWN_STEPS)
        steps *= own
        canvases = _Canvases(self.passes, prompts, self.settings, rng)
        canvases.walk(steps, self.bound, greedy=False)
        until = np.full(len(prompts), MOST_STEPS)
        canvases.walk(until, self.settings.entropy_bound, greedy=own)
        return [
            (
                row,
                Trail(
                    prompt.prompt,
                    np.concatenate([prompt.response, canvases.draft[row]]),
                    prompt.images,
                    canvases=np.stack(canvases.paths[row][: steps[row] + 1]),
                ),
            )
            for row, prompt in enumerate(prompts)
            if canvases.done[row]
        ]


class _Canvases:
    """A canvas for each of a batch of prompts, on its way.

    paths: for each row its canvases int32 [C], noise first, then what each step made of it. draft:
    int32 [B, C]. done: bool [B], whether the reference's stop rule has ended it.
    """

    def __init__(
        self,
        passes: Passes,
        prompts: Sequence[Example],
        settings: DecodingSettings,
        rng: np.random.Generator,
    ) -> None:
        config = passes.model.config
        shape = (len(prompts), config.canvas_length)
        self._passes, self._settings, self._rng = passes, settings, rng
        tokens, self._lengths = padded([prompt.ids for prompt in prompts])
        images = tuple(prompt.images for prompt in prompts)
        _, self._context = passes.encode(Rows(tokens, self._lengths, images))
        mx.eval(self._context)
        noise = rng.integers(config.text.vocab_size, size=shape, dtype=np.int32)
        self.paths = [[row] for row in noise]
        self.draft = np.full(shape, -1, np.int32)
        self.done = np.zeros(len(prompts), bool)
        self._soft = mx.zeros((*shape, config.text.hidden_size), passes.model.dtype)
        self._repeats = np.zeros(len(prompts), np.int64)

    def walk(self, until: np.ndarray, bound: float, *, greedy: bool) -> None:
        """Takes each row on to its step `until` int [B], counted from its noise, or to its end.

        bound: on the entropy of what a step accepts. greedy: an accepted position takes its
        likeliest token instead of a drawn one.
        """
        sampler = EntropyBoundSampler(replace(self._settings, entropy_bound=bound))
        while True:
            taken = np.array([len(path) - 1 for path in self.paths])
            rows = np.flatnonzero(~self.done & (taken < until))
            if not len(rows):
                return
            self._step(rows, taken[rows], sampler, greedy)

    def _step(
        self, rows: np.ndarray, taken: np.ndarray, sampler: EntropyBoundSampler, greedy: bool
    ) -> None:
        some, settings = mx.array(rows), self._settings
        canvas = mx.array(np.stack([self.paths[row][-1] for row in rows]))
        seen = [(keys[some], values[some]) for keys, values in self._context]
        hidden = self._passes.decode(canvas, self._lengths[rows], seen, self._soft[some])
        steps = settings.max_denoising_steps
        divisors = np.array(
            [temperature(steps - n, steps, settings.t_min, settings.t_max) for n in taken.tolist()]
        )
        entropy, draft, sample, soft = self._read(hidden, divisors)
        vocabulary = self._passes.model.config.text.vocab_size
        fresh = self._rng.integers(vocabulary, size=canvas.shape, dtype=np.int32)
        decision = sampler.decide(
            StepInput(
                canvas=canvas, entropy=entropy, draft=draft, sample=draft if greedy else sample,
                sample_probability=entropy, fresh=mx.array(fresh),
                previous_draft=mx.array(self.draft[rows]), outside=None,
                revealed=mx.zeros(canvas.shape, dtype=mx.bool_),
            ),
            last=taken == steps - 1,
        )  # fmt: skip
        status = np.array(decision.status)
        stop = StableAndConfident(settings.stability_threshold, settings.confidence_threshold)
        self._repeats[rows] = stop.count(self._repeats[rows], status[:, 0] > 0)
        self.done[rows] = stop(self._repeats[rows], status[:, 1])
        self.draft[rows], self._soft[some] = np.array(draft), soft
        for row, ids in zip(rows, np.array(decision.canvas), strict=True):
            self.paths[row].append(ids)

    def _read(self, hidden: mx.array, divisors: np.ndarray) -> tuple[mx.array, ...]:
        """Of hidden [b, C, H] and divisors [b]: entropy float32, draft and sample int32 [b, C],
        soft embeddings [b, C, H]; a few rows at a time."""
        model = self._passes.model
        length = hidden.shape[1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        divided = mx.array(np.repeat(divisors, length).astype(np.float32))[:, None]
        parts: list[tuple[mx.array, ...]] = []
        count = rows_at_once(model.config.text.vocab_size)
        for start in range(0, len(flat), count):
            some = slice(start, start + count)
            tempered = model.softcap(model.raw_logits(flat[some])) / divided[some]
            logs = tempered - mx.logsumexp(tempered, axis=-1, keepdims=True)
            entropy = -(mx.exp(logs) * logs).sum(axis=-1)
            key = mx.random.key(int(self._rng.integers(1 << 32)))
            drawn = (logs + mx.random.gumbel(logs.shape, key=key)).argmax(axis=-1)
            read = (entropy, logs.argmax(axis=-1).astype(mx.int32), drawn.astype(mx.int32))
            parts.append((*read, model.soft_embeddings(tempered)))
            mx.eval(parts[-1])
        joined = [mx.concatenate(list(some)) for some in zip(*parts, strict=True)]
        return tuple(part.reshape(-1, length, *part.shape[1:]) for part in joined)
