"""Batches: which examples, which canvas of each, and what noise, all decided by seed and step.

A batch holds examples of like length, so that little is padding. Batches come in an order that a
seed shuffles every epoch differently; any step's batch can be made without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.patches import PreparedImage
from mlx_dgemma.training.data import Example, Trail

LEAST_NOISE = 1e-4  # of a canvas' tokens, as the most is 1 minus this
CONDITIONED = 0.5  # share of examples that see a signal from a first pass
FRESH = 0.5  # share of the reference's answers that are learned from the noise they began with
_PAD_TO = 8  # positions; so that few shapes of batches occur


@dataclass(frozen=True)
class Rows:
    """B texts for the encoder pass: tokens int32 [B, L] with zeros after a text's end, lengths
    int32 [B], and the images of each."""

    tokens: np.ndarray
    lengths: np.ndarray
    images: tuple[tuple[PreparedImage, ...], ...]


@dataclass(frozen=True)
class Batch(Rows):
    """B examples, each with one canvas to denoise; tokens are prompt and clean canvases, or what
    of these the canvas sees.

    starts: int32 [B], where the canvas begins. learned: bool [B, L], the positions whose next
    token the encoder's loss counts. clean, noisy, noisier: int32 [B, C]. conditioned: bool [B].
    sure: bool [B], rows whose canvas decides the answer, so that certainty is rewarded.
    canvas_weight, encoder_weight: what one position counts in the loss: one over the positions of
    the whole batch, of which this may be one machine's share.
    """

    starts: np.ndarray
    learned: np.ndarray
    clean: np.ndarray
    noisy: np.ndarray
    noisier: np.ndarray
    conditioned: np.ndarray
    sure: np.ndarray
    canvas_weight: float
    encoder_weight: float


@dataclass(frozen=True)
class Noise:
    """What a canvas of ids below `vocabulary` is drawn with."""

    canvas_length: int
    vocabulary: int


class Batches:
    """The batches of some examples.

    mask_prompt: leave the prompt out of the encoder's loss. context_only: encode no more than what
    the canvas sees, which is enough without an encoder's loss. rank, size: of the machines that
    share every batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        noise: Noise,
        seed: int,
        *,
        mask_prompt: bool = False,
        context_only: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        if len(examples) < batch_size:
            raise InputError(
                f"There are {len(examples)} examples for a batch of {batch_size}: lower "
                "--batch-size or add lines."
            )
        if batch_size % size:
            raise InputError(
                f"--batch-size {batch_size} cannot be shared by {size} machines: use a multiple."
            )
        self._examples = examples
        self._size = batch_size
        self._noise = noise
        self._seed = seed
        self._mask_prompt = mask_prompt
        self._context_only = context_only
        self._rank, self._machines = rank, size
        order = sorted(range(len(examples)), key=lambda index: examples[index].length)
        count = len(order) // batch_size
        self._groups = [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]
        # What does not fill a batch takes part in turn: groups shift by it in every epoch.
        self._order = order

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._groups)

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        epoch, place = divmod(step, len(self))
        shift = epoch * self._size % len(self._order)
        order = self._order
        spare = len(order) - len(self) * self._size
        begin = shift % (spare + 1)
        kept = order[begin : begin + len(self) * self._size]
        turn = np.random.default_rng([self._seed, 1, epoch]).permutation(len(self))[place]
        group = kept[turn * self._size : (turn + 1) * self._size]
        return self.make([self._examples[i] for i in group], [self._seed, 2, step])

    def fixed(self, index: int) -> Batch:
        """Group `index` with the same noise whenever it is asked for: for validation."""
        group = [self._examples[i] for i in self._groups[index]]
        return self.make(group, [self._seed, 3, index])

    def make(self, examples: Sequence[Example], key: Sequence[int]) -> Batch:
        """Pads, chooses canvases and draws noise; of it this machine's rows."""
        rng = np.random.default_rng(list(key))
        length = self._noise.canvas_length
        drawn = [self._drawn(example, rng) for example in examples]
        starts = np.array([one.start for one in drawn], np.int32)
        texts = [example.ids for example in examples]
        if self._context_only:
            texts = [ids[:start] for ids, start in zip(texts, starts, strict=True)]
        tokens, lengths = padded(texts)
        learned = np.zeros(tokens.shape, bool)
        for row, example in enumerate(examples):
            first = len(example.prompt) - 1 if self._mask_prompt else 0
            learned[row, max(first, 0) : lengths[row] - 1] = True
        mine = slice(self._rank, None, self._machines)
        return Batch(
            tokens[mine],
            lengths[mine],
            tuple(example.images for example in examples)[mine],
            starts[mine],
            learned[mine],
            np.stack([one.clean for one in drawn])[mine],
            np.stack([one.noisy for one in drawn])[mine],
            np.stack([one.noisier for one in drawn])[mine],
            np.array([one.conditioned for one in drawn])[mine],
            np.array([one.sure for one in drawn])[mine],
            canvas_weight=1 / (len(drawn) * length),
            encoder_weight=1 / max(int(learned.sum()), 1),
        )

    def _drawn(self, example: Example, rng: np.random.Generator) -> _Drawn:
        length = self._noise.canvas_length
        start = int(rng.integers(len(example.response) // length)) * length
        if isinstance(example, Trail):
            if len(example.canvases) > 1 or rng.random() < FRESH:
                return _of_trail(example, rng)
            start = len(example.response) - length
        clean = example.response[start : start + length]
        share = rng.uniform(LEAST_NOISE, 1 - LEAST_NOISE)
        order = rng.random(length)
        random_ids = rng.integers(self._noise.vocabulary, size=(2, length), dtype=np.int32)
        noisy = np.where(order < share, random_ids[0], clean)
        more = share + (1 - share) * rng.random()
        noisier = np.where((order >= share) & (order < more), random_ids[1], noisy)
        conditioned = rng.random() < CONDITIONED
        return _Drawn(len(example.prompt) + start, clean, noisy, noisier, conditioned)


class _Drawn(NamedTuple):
    """What is denoised of an example: where its canvas begins, and rows of a `Batch`."""

    start: int
    clean: np.ndarray
    noisy: np.ndarray
    noisier: np.ndarray
    conditioned: bool
    sure: bool = False


def _of_trail(trail: Trail, rng: np.random.Generator) -> _Drawn:
    """The answer's last canvas, from a canvas on its way; from noise where it has no other."""
    count, length = trail.canvases.shape
    sure = count > 1
    place = int(rng.integers(1, count)) if sure else 0
    noisy, noisier = trail.canvases[place], trail.canvases[max(place - 1, 0)]
    return _Drawn(trail.length - length, trail.response[-length:], noisy, noisier, sure, sure)


def padded(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, L] of texts int32 [N], zeros after their ends; and lengths int32 [B]."""
    lengths = np.array([len(ids) for ids in texts], np.int32)
    longest = -(-int(lengths.max()) // _PAD_TO) * _PAD_TO
    tokens = np.zeros((len(texts), longest), np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
    return tokens, lengths
