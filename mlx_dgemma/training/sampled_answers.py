"""A model's own answers to prompts, with the canvases that they were denoised from.

The reference sampler's rules, for a batch of different prompts; what differs is where randomness
comes from. A position that is not accepted keeps its noise, and that noise decides which token it
is drawn to (see `coupling`), so that an answer is a function of the noise that it began with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.sampler import StepInput, make_sampler
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.stopping import StableAndConfident
from mlx_dgemma.decoding.temperature import temperature
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.training.batches import Rows, padded
from mlx_dgemma.training.coupling import Coupling
from mlx_dgemma.training.data import Example, Trail
from mlx_dgemma.training.forward import Passes
from mlx_dgemma.training.loss import rows_at_once
from mlx_dgemma.training.run_events import Answered
from mlx_dgemma.training.tensor_files import write_tensors

CANDIDATES = 256  # ids of noise that are tried for every position of an answer
_TRIED = 64  # positions that candidates are tried on at once
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
        passes: Passes,
        prompts: Sequence[Example],
        times: int,
        batch_size: int,
        settings: DecodingSettings,
        stop_ids: frozenset[int],
        seed: int,
        show: Callable[[Answered], None],
        *,
        cancelled: Callable[[], bool],
        max_length: int,
    ) -> bool:
        """Answers every prompt `times` times, in batches of like length; False when cancelled.

        show: called after every group. max_length: tokens of prompt and
        answer; the canvas that would pass it is left out.
        """
        order = sorted(range(len(prompts)), key=lambda index: prompts[index].length)
        order = [index for index in order for _ in range(times)]
        starts = np.random.default_rng([seed, 5]).permutation(range(0, len(order), batch_size))
        coupling = Coupling(passes.model) if self.groups < len(starts) else None
        for number, start in enumerate(starts.tolist()):
            if number < self.groups:
                continue
            if cancelled():
                return False
            assert coupling is not None
            chosen = order[start : start + batch_size]
            found = answer(
                passes, [prompts[index] for index in chosen], coupling, settings, stop_ids,
                np.random.default_rng([seed, 4, number]), max_length=max_length,
            )  # fmt: skip
            self._trails += [trail for _, trail in found]
            self._prompts += [chosen[row] for row, _ in found]
            self.groups = number + 1
            if self._keep:
                self._write()
            show(Answered(self.groups, len(starts)))
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
        equivalent = [np.packbits(trail.equivalent, axis=1) for trail in self._trails]
        tensors = {
            "prompts": mx.array(np.array(self._prompts, np.int32)),
            "lengths": mx.array(np.array([len(ids) for ids in responses], np.int32)),
            "responses": mx.array(np.concatenate([*responses, np.zeros(0, np.int32)])),
            "counts": mx.array(np.array([len(path) for path in paths], np.int32)),
            "canvases": mx.array(np.concatenate([*paths, np.zeros((0, self._length), np.int32)])),
            "candidates": mx.array(_stacked([t.candidates for t in self._trails], np.int32)),
            "equivalent": mx.array(_stacked(equivalent, np.uint8)),
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
            candidates = arrays["candidates"]
            equivalent = np.unpackbits(arrays["equivalent"], axis=-1).astype(bool)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file} is damaged: delete it to begin again.") from error
        if not same:
            raise CheckpointError(
                f"{self._file} holds answers of another model, data or settings: use the same, or "
                "a new --adapter-path."
            )
        nothing = np.zeros(0, np.int32)
        self._trails = [
            Trail(
                nothing, responses[row], canvases=paths[row], candidates=candidates[row],
                equivalent=equivalent[row, :, : candidates.shape[1]],
            )
            for row in range(len(self._prompts))
        ]  # fmt: skip


def _stacked(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.stack(arrays).astype(dtype) if arrays else np.zeros((0, 0), dtype)


def answer(
    passes: Passes,
    prompts: Sequence[Example],
    coupling: Coupling,
    settings: DecodingSettings,
    stop_ids: frozenset[int],
    rng: np.random.Generator,
    *,
    max_length: int,
) -> list[tuple[int, Trail]]:
    """One answer to each of a batch of prompts: (row, trail) for every canvas that converged.

    prompts: examples, whose responses are continued. max_length: tokens of prompt and answer.
    """
    trails: list[tuple[int, Trail]] = []
    rows = list(enumerate(prompts))
    length = passes.model.config.canvas_length
    while rows:
        found = _canvases(passes, [prompt for _, prompt in rows], coupling, settings, rng)
        named = [(rows[place][0], trail) for place, trail in found]
        trails += named
        rows = [
            (row, trail)
            for row, trail in named
            if not stop_ids.intersection(trail.response[-length:].tolist())
            and trail.length + length <= max_length
        ]
    return trails


def _canvases(
    passes: Passes,
    prompts: Sequence[Example],
    coupling: Coupling,
    settings: DecodingSettings,
    rng: np.random.Generator,
) -> list[tuple[int, Trail]]:
    """The next canvas of each prompt whose denoising converged within `MOST_STEPS`."""
    config = passes.model.config
    shape = (len(prompts), config.canvas_length)
    tokens, lengths = padded([prompt.ids for prompt in prompts])
    _, context = passes.encode(Rows(tokens, lengths, tuple(p.images for p in prompts)))
    mx.eval(context)
    noise = rng.integers(config.text.vocab_size, size=shape, dtype=np.int32)
    candidates = rng.integers(config.text.vocab_size, size=CANDIDATES, dtype=np.int32)
    decided = _Decided(coupling, shape, candidates)
    stop = StableAndConfident(settings.stability_threshold, settings.confidence_threshold)
    sampler = make_sampler(settings)
    path, draft, soft = [noise], None, None
    active = np.arange(len(prompts))  # the rows that have not converged; the others are left out
    repeats = np.zeros(len(prompts), np.int64)
    ends = np.zeros(len(prompts), np.int64)
    final = np.zeros(shape, np.int32)
    steps = settings.max_denoising_steps
    for taken in range(min(MOST_STEPS, steps)):
        canvas, fresh = mx.array(path[-1][active]), mx.array(noise[active])
        hidden = passes.decode(canvas, lengths[active], context, soft)
        divisor = temperature(steps - taken, steps, settings.t_min, settings.t_max)
        seen, soft = _read(passes, hidden, fresh, coupling, divisor)
        decision = sampler.decide(
            StepInput(
                canvas=canvas, entropy=seen.entropy, draft=seen.draft, sample=seen.sample,
                sample_probability=seen.entropy, fresh=fresh, previous_draft=draft, outside=None,
                revealed=mx.zeros(canvas.shape, dtype=mx.bool_),
            ),
            last=np.full(len(active), taken == steps - 1),
        )  # fmt: skip
        decided.note(active, decision.accepted, seen.sample, seen.logs)
        status = np.array(decision.status)
        path.append(path[-1].copy())
        path[-1][active] = np.array(decision.canvas)
        repeats = stop.count(repeats, status[:, 0] > 0)
        done = stop(repeats, status[:, 1])
        final[active[done]] = np.array(seen.draft)[done]
        ends[active[done]] = taken + 1
        if done.all():
            break
        going = mx.array(np.flatnonzero(~done))
        draft, soft = seen.draft[going], soft[going]
        context = [(keys[going], values[going]) for keys, values in context]
        active, repeats = active[~done], repeats[~done]
    equivalent = decided.equivalent(final)
    return [
        (
            row,
            Trail(
                prompt.prompt,
                np.concatenate([prompt.response, final[row]]),
                prompt.images,
                canvases=np.stack(path[: ends[row]])[:, row],
                candidates=candidates,
                equivalent=equivalent[row],
            ),
        )
        for row, prompt in enumerate(prompts)
        if ends[row]
    ]


class _Decided:
    """Which other noise would have led each position to its token."""

    def __init__(self, coupling: Coupling, shape: tuple[int, int], candidates: np.ndarray) -> None:
        self._coupling = coupling
        self._candidates = mx.array(candidates)
        self._equivalent = np.ones((*shape, len(candidates)), bool)
        self._token = np.full(shape, -1, np.int32)

    def note(self, rows: np.ndarray, accepted: mx.array, sample: mx.array, logs: mx.array) -> None:
        """A step's acceptance: accepted and sample [b, C], log p [b, C, V] of rows int [b]."""
        new = np.array(accepted) & (self._token[rows] < 0)
        places, length = np.flatnonzero(new), new.shape[1]
        for start in range(0, len(places), _TRIED):
            some = places[start : start + _TRIED]
            index = mx.array(some)
            found = self._coupling.equivalent(
                logs.reshape(-1, logs.shape[-1])[index], sample.reshape(-1)[index], self._candidates
            )
            self._equivalent[rows[some // length], some % length] = np.array(found)
        self._token[rows] = np.where(new, np.array(sample), self._token[rows])

    def equivalent(self, final: np.ndarray) -> np.ndarray:
        """bool [B, C, M]; none where a position ends as another token than it was first given."""
        changed = (self._token >= 0) & (self._token != final)
        kept: np.ndarray = self._equivalent & ~changed[..., None]
        return kept


class _Seen(NamedTuple):
    """entropy float32, draft and sample int32 [b, C]; logs: float32 [b, C, V], log p."""

    entropy: mx.array
    draft: mx.array
    sample: mx.array
    logs: mx.array


def _read(
    passes: Passes, hidden: mx.array, noise: mx.array, coupling: Coupling, divisor: float
) -> tuple[_Seen, mx.array]:
    """What the sampler reads of a pass, and soft embeddings [b, C, H]; a few rows at a time."""
    model = passes.model
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), noise.reshape(-1)
    parts: list[tuple[mx.array, ...]] = []
    count = rows_at_once(model.config.text.vocab_size)
    for start in range(0, len(flat), count):
        some = slice(start, start + count)
        tempered = model.softcap(model.raw_logits(flat[some])) / divisor
        logs = tempered - mx.logsumexp(tempered, axis=-1, keepdims=True)
        entropy = -(mx.exp(logs) * logs).sum(axis=-1)
        drawn = (logs + coupling.scores(ids[some])).argmax(axis=-1)
        read = (entropy, logs.argmax(axis=-1).astype(mx.int32), drawn.astype(mx.int32), logs)
        parts.append((*read, model.soft_embeddings(tempered)))
        mx.eval(parts[-1])
    joined = [mx.concatenate(list(some)) for some in zip(*parts, strict=True)]
    entropy, draft, sample, logs, soft = (
        part.reshape(*noise.shape, *part.shape[1:]) for part in joined
    )
    return _Seen(entropy, draft, sample, logs), soft
