"""A generation on record: every draw and every draft in one JSON file, and its replay.

A trace shows what a seed did on one machine, step by step, and repeats it on another: the
replay takes every random number from the file and says where the drafts part.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.draws import Draws, Place
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.step import Step
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import check_replaceable, read_bytes, replacing
from mlx_dgemma.untrusted_json import Limits, parse, shown

FORMAT = 1
# A block of 256 positions and 48 steps takes 1 MB and 100,000 values.
_LIMITS = Limits(size=512 << 20, parts=64_000_000)


def config_digest(config: Any) -> str:
    """SHA-256 of a config dataclass, so that a trace names the network it came from."""
    text = json.dumps(asdict(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_traceable(path: str | Path, *, opening: bool, images: bool) -> None:
    """Refuses what a trace cannot hold, and a path that it must not replace."""
    if opening:
        raise InputError("A trace cannot hold an opening: leave one of the two out.")
    if images:
        raise InputError("A trace records text alone: leave it or the images out.")
    check_replaceable(path)


def versions() -> dict[str, str]:
    """What a generation's bits depend on beside seed and weights."""
    return {
        "mlx_dgemma": version("mlx-dgemma"),
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
    }


@dataclass
class Trace:
    """What was asked, every draw by place, and every step's draft.

    draws: "block.attempt.step.purpose" -> the numbers drawn there.
    steps: one record per denoising step with its draft, accepted positions and mean entropy, and
        where not all positions were computed, those that were.
    committed: the ids of every block, in order.
    constraint: what the reply had to be, kind and value.
    """

    seed: int
    prompt: list[int]
    settings: dict[str, Any]
    config_digest: str
    versions: dict[str, str] = field(default_factory=versions)
    draws: dict[str, list[Any]] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    committed: list[list[int]] = field(default_factory=list)
    constraint: dict[str, Any] | None = None
    format: int = FORMAT

    def observe(self, step: Step) -> None:
        """Records a step; pass it as the loop's observer."""
        self.steps.append(_record(step))

    def save(self, path: str | Path) -> None:
        """Writes the trace under a temporary name, then renames it."""
        path = Path(path)
        check_replaceable(path)
        text = json.dumps(asdict(self), separators=(",", ":"), default=np.generic.item)
        try:
            with replacing(path) as partial:
                partial.write_text(text)
        except OSError as error:
            raise InputError(f"Cannot write the trace {path}: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads a trace; raises InputError when the file is no trace of this format."""
        try:
            record = parse(read_bytes(path, _LIMITS.size), _LIMITS)
            if record.get("format", FORMAT) != FORMAT:
                raise InputError(
                    f"{path} is a trace of format {shown(record.get('format'))}; "
                    f"this reads {FORMAT}."
                )
            trace = cls(**record)
            trace._check()
        except OSError as error:
            raise InputError(f"Cannot read the trace {path}: {error.strerror}.") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is not a trace written by --trace, or is damaged: record it again."
            ) from error
        return trace

    def _check(self) -> None:
        """Raises what Python raises where a field is not as `save` writes it."""
        self.decoding_settings()
        texts = (self.config_digest, *self.versions.keys(), *self.versions.values())
        if not _is_id(self.seed, 2**64) or not all(isinstance(text, str) for text in texts):
            raise ValueError("a seed, a digest or a version of the wrong type")
        for ids in (self.prompt, *self.committed):
            _check_ids(ids)
        for name, numbers in self.draws.items():
            if name.endswith((".canvas", ".renoise")):
                _check_ids(numbers)
            else:
                _check_uniforms(numbers, of=2 if name.endswith(".sample") else 1)
        for step in self.steps:
            if not all(_is_id(step[name]) for name in ("block", "attempt", "step")):
                raise ValueError("a step without a place")
            _check_ids(step["draft"])
            _check_ids(step.get("computed", []))

    def decoding_settings(self) -> DecodingSettings:
        return DecodingSettings(**self.settings)


class RecordingDraws:
    """Passes draws through and writes them into a trace."""

    def __init__(self, source: Draws, trace: Trace) -> None:
        self.source = source
        self.trace = trace

    def canvas(self, place: Place, length: int, vocab_size: int) -> mx.array:
        return self._keep(place, "canvas", self.source.canvas(place, length, vocab_size))

    def sample(self, place: Place, length: int) -> mx.array:
        return self._keep(place, "sample", self.source.sample(place, length))

    def renoise(self, place: Place, length: int, vocab_size: int) -> mx.array:
        return self._keep(place, "renoise", self.source.renoise(place, length, vocab_size))

    def keep(self, place: Place, length: int) -> mx.array:
        return self._keep(place, "keep", self.source.keep(place, length))

    def check(self, place: Place) -> float:
        drawn = self.source.check(place)
        self.trace.draws[_name(place, "check")] = [drawn]
        return drawn

    def _keep(self, place: Place, purpose: str, drawn: mx.array) -> mx.array:
        self.trace.draws[_name(place, purpose)] = drawn.tolist()  # type: ignore[assignment]
        return drawn


class RecordedDraws:
    """Draws read back from a trace; raises InputError where the replay leaves the record."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def canvas(self, place: Place, length: int, vocab_size: int) -> mx.array:
        return self._ids(place, "canvas", length, vocab_size)

    def sample(self, place: Place, length: int) -> mx.array:
        return mx.array(self._find(place, "sample", length), dtype=mx.float32)

    def renoise(self, place: Place, length: int, vocab_size: int) -> mx.array:
        return self._ids(place, "renoise", length, vocab_size)

    def keep(self, place: Place, length: int) -> mx.array:
        return mx.array(self._find(place, "keep", length), dtype=mx.float32)

    def check(self, place: Place) -> float:
        (drawn,) = self._find(place, "check", 1)
        return float(drawn)

    def _ids(self, place: Place, purpose: str, length: int, vocab_size: int) -> mx.array:
        ids = self._find(place, purpose, length)
        if max(ids, default=0) >= vocab_size:
            raise InputError(
                f"The trace draws token {max(ids)}, and this model's last is {vocab_size - 1}: "
                "replay it with the model that it was recorded with."
            )
        return mx.array(ids, dtype=mx.int32)

    def _find(self, place: Place, purpose: str, length: int) -> list[Any]:
        drawn = self.trace.draws.get(_name(place, purpose))
        if drawn is None or len(drawn) != length:
            raise InputError(
                f"The replay left the record at block {place.block}, step {place.step}: the trace "
                "holds no such draw, so the network or its numerics differ."
            )
        return drawn


@dataclass
class Comparison:
    """Watches a replay; `divergence` is the first place whose step differs, or None.

    seen: steps so far.
    """

    trace: Trace
    seen: int = 0
    divergence: Place | None = None

    def observe(self, step: Step) -> None:
        record = _record(step)
        expected = self.trace.steps[self.seen] if self.seen < len(self.trace.steps) else None
        self.seen += 1
        same = expected is not None and all(
            expected.get(name) == record.get(name)
            for name in ("block", "attempt", "step", "draft", "computed")
        )
        if not same and self.divergence is None:
            self.divergence = step.places[0]

    def close(self) -> None:
        """To be called once the replay has ended: what it left of the record is a difference."""
        if self.divergence is None and self.seen < len(self.trace.steps):
            left = self.trace.steps[self.seen]
            self.divergence = Place(left["block"], left["attempt"], left["step"])

    def over(self, committed: int) -> bool:
        """Whether the trace holds nothing more, once so many blocks are committed.

        A recording ends early where its request was cancelled or met a stop string.
        """
        done = committed >= len(self.trace.committed)
        return done and self.seen >= len(self.trace.steps)


def _record(step: Step) -> dict[str, Any]:
    entropy = np.array(step.entropy)[0]  # whole arrays: a row would be new work for the device
    some = {} if step.computed.all() else {"computed": np.flatnonzero(step.computed[0]).tolist()}
    return {
        **some,
        **step.places[0]._asdict(),
        "draft": np.array(step.draft)[0].tolist(),
        "accepted": np.flatnonzero(np.array(step.accepted)[0]).tolist(),
        "mean_entropy": float(entropy.mean()),
    }


def _is_id(value: Any, below: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise ValueError("not a list of token ids")


def _check_uniforms(numbers: Any, of: int) -> None:
    """Numbers from 0 to 1, without 1; or lists of `of` such numbers."""
    if not isinstance(numbers, list):
        raise ValueError("not a list of numbers")
    for number in numbers:
        one = number if of > 1 else [number]
        if not isinstance(one, list) or len(one) != of:
            raise ValueError("not a list of draws")
        if not all(type(value) in (int, float) and 0 <= value < 1 for value in one):
            raise ValueError("a draw outside of 0 to 1")


def _name(place: Place, purpose: str) -> str:
    return ".".join(map(str, place)) + "." + purpose
