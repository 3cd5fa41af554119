"""Batches: which examples, which canvas of each, and what noise, all decided by seed and step.

A batch holds examples of like length, so that little is padding. Batches come in an order that a
seed shuffles every epoch differently; any step's batch can be made without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt.images import PreparedImage
from mlx_dgemma.training.data import Example

LEAST_NOISE = 1e-4  # of a canvas' tokens, as the most is 1 minus this
CONDITIONED = 0.5  # share of examples that see a signal from a first pass
_PAD_TO = 32  # positions; so that few shapes of batches occur


@dataclass(frozen=True)
class Batch:
    """B examples, each with one canvas to denoise.

    tokens: int32 [B, L], prompt and clean canvases, then zeros. lengths, starts: int32 [B], the
    tokens of each, and where its canvas begins. learned: bool [B, L], the positions whose next
    token the encoder's loss counts. clean, noisy, noisier: int32 [B, C]. conditioned: bool [B].
    images: by example. canvas_weight, encoder_weight: what one position counts in the loss: one
    over the positions of the whole batch, of which this may be one machine's share.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    learned: np.ndarray
    clean: np.ndarray
    noisy: np.ndarray
    noisier: np.ndarray
    conditioned: np.ndarray
    images: tuple[tuple[PreparedImage, ...], ...]
    canvas_weight: float
    encoder_weight: float


@dataclass(frozen=True)
class Noise:
    """What a canvas of ids below `vocabulary` is drawn with."""

    canvas_length: int
    vocabulary: int


class Batches:
    """The batches of some examples.

    mask_prompt: leave the prompt out of the encoder's loss. rank, size: of the machines that
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
        rows = len(examples)
        lengths = np.array([example.length for example in examples], np.int32)
        longest = -(-int(lengths.max()) // _PAD_TO) * _PAD_TO
        tokens = np.zeros((rows, longest), np.int32)
        learned = np.zeros((rows, longest), bool)
        starts = np.zeros(rows, np.int32)
        clean = np.zeros((rows, length), np.int32)
        for row, example in enumerate(examples):
            tokens[row, : example.length] = example.ids
            first = len(example.prompt) - 1 if self._mask_prompt else 0
            learned[row, max(first, 0) : example.length - 1] = True
            chosen = int(rng.integers(len(example.response) // length))
            starts[row] = len(example.prompt) + chosen * length
            clean[row] = example.response[chosen * length : (chosen + 1) * length]
        share = rng.uniform(LEAST_NOISE, 1 - LEAST_NOISE, (rows, 1))
        order = rng.random((rows, length))
        random_ids = rng.integers(self._noise.vocabulary, size=(2, rows, length), dtype=np.int32)
        noisy = np.where(order < share, random_ids[0], clean)
        more = share + (1 - share) * rng.random((rows, 1))
        noisier = np.where((order >= share) & (order < more), random_ids[1], noisy)
        conditioned = rng.random(rows) < CONDITIONED
        mine = slice(self._rank, None, self._machines)
        return Batch(
            tokens[mine],
            lengths[mine],
            starts[mine],
            learned[mine],
            clean[mine],
            noisy[mine],
            noisier[mine],
            conditioned[mine],
            tuple(example.images for example in examples)[mine],
            canvas_weight=1 / clean.size,
            encoder_weight=1 / max(int(learned.sum()), 1),
        )
