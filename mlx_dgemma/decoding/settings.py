"""The knobs of one request's decoding, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Literal, Protocol, get_args

from mlx_dgemma.errors import InputError

SamplerName = Literal["entropy-bound", "confidence-threshold"]
UnconvergedPolicy = Literal["commit", "warn", "refuse"]
EmptyReplyPolicy = Literal["reroll", "suppress", "allow"]
Conditioning = Literal["auto", "dense", "sparse"]
PresetName = Literal["reference", "balanced", "fast"]

# Named settings. The reference is the checkpoint's own generation config; the others trade accuracy
# for fewer denoising steps (studies/README.md has both, measured).
PRESETS: dict[str, dict[str, int | float]] = {
    "reference": {},
    "balanced": {"stability_threshold": 0, "max_denoising_steps": 32, "confidence_threshold": 0.02},
    "fast": {"stability_threshold": 0, "max_denoising_steps": 16, "confidence_threshold": 0.05},
}

_WHOLE = ("max_tokens", "max_denoising_steps", "stability_threshold")
_REAL = (
    "temp",
    "entropy_bound",
    "t_min",
    "t_max",
    "reveal_threshold",
    "confidence_threshold",
)


class GenerationDefaults(Protocol):
    """The part of a checkpoint's generation config that decoding reads."""

    @property
    def max_denoising_steps(self) -> int: ...
    @property
    def entropy_bound(self) -> float: ...
    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    @property
    def stability_threshold(self) -> int: ...
    @property
    def confidence_threshold(self) -> float: ...


@dataclass(frozen=True)
class DecodingSettings:
    """How canvases are denoised, accepted, stopped and committed.

    max_tokens: tokens to emit at most; the canvas stays whole and the text is cut.
    temp: divides the tempered logits for sampling only; 0.0 takes the argmax, 1.0 is the
        reference.
    sampler: "entropy-bound" (the reference: arXiv 2505.24857, re-decided every step) or
        "confidence-threshold" (positions freeze once revealed).
    max_denoising_steps: N of the temperature schedule T(step) = t_min + (t_max - t_min) step/N.
    entropy_bound: nats; the joint entropy accepted per step.
    reveal_threshold: probability at which "confidence-threshold" reveals a position.
    stability_threshold: the draft must equal this many previous drafts before a block may stop.
    confidence_threshold: nats; the mean entropy must be below it before a block may stop.
    canvas_length: positions denoised together; None is the checkpoint's own.
    on_unconverged: what happens to a block that used every step without stopping: "commit"
        it, commit it and "warn", or "refuse" it and end the request.
    empty_reply: what happens when a request's first block begins with a stop id: "reroll"
        denoises it again with other draws on shorter canvases, "suppress" keeps stop ids from
        its first position, "allow" takes it as it is.
    conditioning: how the self-conditioning signal is summed. "dense" multiplies every
        probability with the embedding table. "sparse" sums only tokens of probability 1/1024
        or more, in steps where they make up all but 1/256 at every position, and is dense in
        the others. Their difference is below the rounding of 16-bit logits, so "auto" is
        sparse where activations have 16 bits and dense in float32.
    sliced_head: never hold the logits of a canvas, only a slice of the vocabulary at a time;
        the same values for less memory and a second pass over the head.
    kv_bits: 8 keeps the context of full-attention layers in 8 bits; None keeps it exactly.
    """

    max_tokens: int = 256
    temp: float = 1.0
    sampler: SamplerName = "entropy-bound"
    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    reveal_threshold: float = 0.9
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    canvas_length: int | None = None
    on_unconverged: UnconvergedPolicy = "commit"
    empty_reply: EmptyReplyPolicy = "reroll"
    conditioning: Conditioning = "auto"
    sliced_head: bool = False
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            self._require(name, isinstance(getattr(self, name), Integral), "a whole number")
        for name in _REAL:
            self._require(name, isinstance(getattr(self, name), Real), "a number")
        self._require("max_tokens", self.max_tokens >= 1, "at least 1")
        self._require("temp", self.temp >= 0 and math.isfinite(self.temp), "0 or more")
        self._require("max_denoising_steps", self.max_denoising_steps >= 1, "at least 1")
        self._require("entropy_bound", self.entropy_bound >= 0, "0 or more (nats)")
        finite = 0 < self.t_max < math.inf
        self._require("t_max", finite, "a finite number above 0, at least t_min")
        above = f"above 0 and at most t_max={self.t_max}"
        self._require("t_min", 0 < self.t_min <= self.t_max, above)
        self._require("reveal_threshold", 0 < self.reveal_threshold <= 1, "between 0 and 1")
        self._require("stability_threshold", self.stability_threshold >= 0, "0 or more")
        self._require("confidence_threshold", self.confidence_threshold >= 0, "0 or more (nats)")
        if self.canvas_length is not None:
            whole = isinstance(self.canvas_length, Integral)
            self._require("canvas_length", whole and self.canvas_length >= 1, "1 or more")
        self._require("kv_bits", self.kv_bits in (None, 8), "8, or None for the exact context")
        for name, options in (
            ("sampler", get_args(SamplerName)),
            ("on_unconverged", get_args(UnconvergedPolicy)),
            ("empty_reply", get_args(EmptyReplyPolicy)),
            ("conditioning", get_args(Conditioning)),
        ):
            self._require(name, getattr(self, name) in options, " or ".join(map(repr, options)))

    def sparse_conditioning(self, bits: int) -> bool:
        """Whether the signal may be summed sparsely when activations have this many bits."""
        if self.conditioning == "auto":
            return bits == 16 and not self.sliced_head
        return self.conditioning == "sparse" and not self.sliced_head

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise InputError(f"{name}={getattr(self, name)!r} is not possible: use {expected}.")

    @classmethod
    def from_defaults(
        cls, defaults: GenerationDefaults, overrides: dict[str, object]
    ) -> DecodingSettings:
        """Takes the checkpoint's generation config, then what the override `preset` names, then
        whatever else the caller set (not None).

        Raises InputError for a keyword that is no setting or a value out of range.
        """
        known = {field.name for field in fields(cls)} | {"preset"}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise InputError(
                f"Unknown generation option {unknown[0]!r}; the options are: "
                f"{', '.join(sorted(known))}."
            )
        base = cls(
            max_denoising_steps=defaults.max_denoising_steps,
            entropy_bound=defaults.entropy_bound,
            t_min=defaults.t_min,
            t_max=defaults.t_max,
            stability_threshold=defaults.stability_threshold,
            confidence_threshold=defaults.confidence_threshold,
        )
        given = {name: value for name, value in overrides.items() if value is not None}
        preset = given.pop("preset", "reference")
        if preset not in PRESETS:
            raise InputError(f"preset={preset!r} is not known: use {' or '.join(PRESETS)}.")
        given = {**PRESETS[str(preset)], **given}
        try:
            return replace(base, **given)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError(f"A generation option has the wrong type: {error}.") from error
