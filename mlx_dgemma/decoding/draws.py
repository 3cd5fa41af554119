"""Every random number of a request, each with its own key.

A request's seed alone decides its draws. The key of a draw is derived from (seed, block,
attempt, step, purpose), so a row of a batch draws what it draws alone, a replay needs no
generator state, and a sampler that skips one draw does not shift the next.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from enum import IntEnum
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_dgemma.errors import InputError

MAX_SEED = 2**63 - 1


class Place(NamedTuple):
    """Where in a request a draw happens; step 0 is the fresh canvas, 1 the first denoising."""

    block: int
    attempt: int
    step: int


class Purpose(IntEnum):
    """What a draw is for; part of its key."""

    CANVAS = 0
    SAMPLE = 1
    RENOISE = 2
    KEEP = 3
    CHECK = 4


class Draws(Protocol):
    """Where one canvas gets its random numbers from."""

    def canvas(self, place: Place, length: int, vocab_size: int) -> mx.array:
        """int32 [length], the noise a canvas starts from."""

    def sample(self, place: Place, length: int) -> mx.array:
        """float32 [length, 2] in [0, 1), two uniforms per position for the categorical sample."""

    def renoise(self, place: Place, length: int, vocab_size: int) -> mx.array:
        """int32 [length], fresh ids for the positions that were not accepted."""

    def keep(self, place: Place, length: int) -> mx.array:
        """float32 [length] in [0, 1), which positions of a given draft stay (see Start)."""

    def check(self, place: Place) -> float:
        """A number in [0, 1): whether a block is checked before it is committed."""


class SeededDraws:
    """Draws from MLX's counter-based generator under keys made from one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = check_seed(seed)

    def canvas(self, place: Place, length: int, vocab_size: int) -> mx.array:
        return _ids(self.key(place, Purpose.CANVAS), length, vocab_size)

    def sample(self, place: Place, length: int) -> mx.array:
        return mx.random.uniform(shape=(length, 2), key=self.key(place, Purpose.SAMPLE))

    def renoise(self, place: Place, length: int, vocab_size: int) -> mx.array:
        return _ids(self.key(place, Purpose.RENOISE), length, vocab_size)

    def keep(self, place: Place, length: int) -> mx.array:
        return mx.random.uniform(shape=(length,), key=self.key(place, Purpose.KEEP))

    def check(self, place: Place) -> float:
        drawn = int.from_bytes(self._digest(place, Purpose.CHECK), "little")
        return (drawn >> 11) / 2**53

    def key(self, place: Place, purpose: Purpose) -> mx.array:
        """The PRNG key of one draw, uint32 [2], as mx.random.key returns it."""
        return mx.random.key(int.from_bytes(self._digest(place, purpose), "little"))

    def _digest(self, place: Place, purpose: Purpose) -> bytes:
        packed = struct.pack("<QIIII", self.seed, *place, purpose)
        return hashlib.blake2b(packed, digest_size=8).digest()


def fresh_seed() -> int:
    """A seed for a request that named none; short enough to type again."""
    return secrets.randbelow(2**32)


def check_seed(seed: int) -> int:
    """Returns `seed`; raises InputError when it is no integer from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed={seed!r} is not possible: use a whole number from 0 to 2**63 - 1.")
    return seed


def _ids(key: mx.array, length: int, vocab_size: int) -> mx.array:
    return mx.random.randint(0, vocab_size, (length,), dtype=mx.int32, key=key)
