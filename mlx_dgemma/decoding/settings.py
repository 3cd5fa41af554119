"""The knobs of one request's decoding: one record, from which flags, request fields and keywords
come, and which checks itself when it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Protocol, TypedDict, get_args

from mlx_dgemma.errors import InputError

SamplerName = Literal["entropy-bound", "confidence-threshold"]
UnconvergedPolicy = Literal["commit", "warn", "refuse"]
EmptyReplyPolicy = Literal["reroll", "suppress", "allow"]
Conditioning = Literal["auto", "dense", "sparse"]
CommitRule = Literal["confirmed", "accepted"]
PositionsRule = Literal["all", "text", "active"]
PresetName = Literal["reference", "balanced", "turbo"]

MAX_FLOAT = sys.float_info.max
# Named settings. The reference is the checkpoint's own generation config and computes everything;
# the others compute less and are not exact (docs/presets.md says what was measured of them).
PRESETS: dict[str, dict[str, str]] = {
    "reference": {},
    "balanced": {"commit": "accepted", "positions": "text"},
    "turbo": {"commit": "accepted", "positions": "active"},
}


@dataclass(frozen=True)
class Setting:
    """What there is to know about one setting besides its default.

    kind: of its value. expected: how a refusal ends, "NAME=VALUE is not possible: use ...".
    low, high: its bounds, inclusive unless `above`, which leaves `low` out. choices: its only
        values, where there are few. optional: None is possible.
    help, metavar, short: of its flag; without a help it has none.
    request: the bounds of the field of a server's request, or its choices; None if it has none.
    """

    kind: type = float
    expected: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[Any, ...] = ()
    optional: bool = False
    help: str = ""
    metavar: str | None = None
    short: str = ""
    request: tuple[Any, ...] | None = None

    def wrong_kind(self, value: object) -> str:
        """What kind of value is expected, where this one is of another; else empty."""
        if value is None and self.optional:
            return ""
        flag = isinstance(value, bool)
        if self.kind is int and (flag or not isinstance(value, Integral)):
            return self.expected if self.optional else "a whole number"
        if self.kind is float and (flag or not isinstance(value, Real)):
            return "a number"
        return ""

    def allows(self, value: Any) -> bool:
        """Whether a value of the right kind is one of the choices and within the bounds."""
        if value is None:
            return self.optional
        if self.choices:
            return value in self.choices
        if self.kind is bool:
            return isinstance(value, bool)
        return bool(value <= self.high and (value > self.low if self.above else value >= self.low))


def _setting(default: Any, kind: type = float, **known: Any) -> Any:
    if known.get("choices") and "expected" not in known:
        known["expected"] = " or ".join(map(repr, known["choices"]))
    return field(default=default, metadata={"setting": Setting(kind, **known)})


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
    commit: when a block ends before its steps run out. "confirmed" is the reference: the draft
        repeats and its mean entropy is below the threshold. "accepted" ends it as well once every
        position that is not pinned was accepted in one step.
    commit_entropy: nats; where "accepted" ends a block, the mean entropy must be below this. None
        is `confidence_threshold`.
    positions: which of a canvas a step computes. "all" is the reference. "text" leaves out what
        follows a stop id that has settled. "active" leaves out settled positions too, whose keys
        and values stay as they were last computed (see active_positions).
    check_share: of the blocks that "active" is about to commit, so many are first computed whole,
        drawn by the seed; where that changes the draft, the block goes on as the reference does.
    canvas_length: positions denoised together; None is the checkpoint's own.
    on_unconverged: what happens to a block that used every step without stopping: "commit"
        it, commit it and "warn", or "refuse" it and end the request.
    empty_reply: what happens when a request's first block begins with a stop id: "reroll"
        denoises it again with other draws on shorter canvases, "suppress" keeps stop ids from
        its first position, "allow" takes it as it is.
    conditioning: how the self-conditioning signal is summed. "dense" multiplies every
        probability with the embedding table. "sparse" sums only tokens of probability 1/8192
        or more, at positions where they make up all but 1/256, and is dense at the others.
        Their difference is below the rounding of 16-bit logits, so "auto" is sparse where
        activations have 16 bits and dense in float32.
    sliced_head: never hold the logits of a canvas, only a slice of the vocabulary at a time;
        the same values for less memory and a second pass over the head.
    kv_bits: 8 keeps the context of full-attention layers in 8 bits; None keeps it exactly.
    """

    max_tokens: int = _setting(
        256,
        int,
        low=1,
        expected="at least 1",
        help="tokens to generate at most (default: 256)",
        metavar="N",
        short="-m",
    )
    temp: float = _setting(
        1.0,
        low=0,
        high=MAX_FLOAT,
        expected="0 or more",
        help="divides the logits for sampling; 0 is greedy (default: 1, as the reference samples)",
        metavar="T",
    )
    sampler: SamplerName = _setting(
        "entropy-bound",
        str,
        choices=get_args(SamplerName),
        help="which positions a step accepts (default: entropy-bound)",
        request=(),
    )
    max_denoising_steps: int = _setting(
        48,
        int,
        low=1,
        expected="at least 1",
        help="steps a block may take at most",
        metavar="N",
        request=(1, 1024),
    )
    entropy_bound: float = _setting(
        0.1,
        low=0,
        expected="0 or more (nats)",
        help="joint entropy accepted per step",
        metavar="NATS",
        request=(0, 1e6),
    )
    t_min: float = _setting(0.4, help="temperature of the last step", metavar="T", request=(0, 100))
    t_max: float = _setting(
        0.8,
        low=0,
        above=True,
        high=MAX_FLOAT,
        expected="a finite number above 0, at least t_min",
        help="temperature before the first step",
        metavar="T",
        request=(0, 100),
    )
    reveal_threshold: float = _setting(
        0.9,
        low=0,
        above=True,
        high=1,
        expected="a number between 0 and 1",
        help="probability at which confidence-threshold reveals a position (default: 0.9)",
        metavar="P",
        request=(0, 1),
    )
    stability_threshold: int = _setting(
        1,
        int,
        low=0,
        expected="0 or more",
        help="a block may stop once its draft equals this many drafts before it",
        metavar="N",
        request=(0, 1024),
    )
    confidence_threshold: float = _setting(
        0.005,
        low=0,
        expected="0 or more (nats)",
        help="... and once its mean entropy is below this",
        metavar="NATS",
        request=(0, 1e6),
    )
    commit: CommitRule = _setting(
        "confirmed",
        str,
        choices=get_args(CommitRule),
        help="when a block may end: as the reference ends it, or also once a step accepts every "
        "position, which is not exact (default: confirmed)",
        request=(),
    )
    commit_entropy: float | None = _setting(
        None,
        low=0,
        optional=True,
        expected="0 or more (nats)",
        help="accepted ends a block whose mean entropy is below this (default: the confidence "
        "threshold)",
        metavar="NATS",
        request=(0, 1e6),
    )
    positions: PositionsRule = _setting(
        "all",
        str,
        choices=get_args(PositionsRule),
        help="what of a canvas a step computes: all, the text up to a settled stop id, or of that "
        "the active positions; only all is exact (default: all)",
        request=(),
    )
    check_share: float = _setting(
        0.0625,
        low=0,
        high=1,
        expected="a number between 0 and 1",
        help="share of blocks of active positions that are computed whole before they are "
        "committed (default: 0.0625)",
        metavar="SHARE",
        request=(0, 1),
    )
    canvas_length: int | None = _setting(
        None,
        int,
        low=1,
        optional=True,
        expected="1 or more",
        help="positions denoised together",
        metavar="N",
        request=(1, 65536),
    )
    on_unconverged: UnconvergedPolicy = _setting(
        "commit",
        str,
        choices=get_args(UnconvergedPolicy),
        help="what to do with a block that ran out of steps (default: commit)",
        request=("commit", "refuse"),
    )
    empty_reply: EmptyReplyPolicy = _setting(
        "reroll",
        str,
        choices=get_args(EmptyReplyPolicy),
        help="what to do with a reply that would begin with its end (default: reroll)",
        request=(),
    )
    conditioning: Conditioning = _setting("auto", str, choices=get_args(Conditioning))
    sliced_head: bool = _setting(False, bool, expected="True or False")
    kv_bits: int | None = _setting(
        None,
        int,
        choices=(8,),
        optional=True,
        expected="8, or None for the exact context",
        help="keep the context in 8 bits where it grows, about half the memory of a long one "
        "(default: the exact context)",
    )

    def __post_init__(self) -> None:
        known = settings_by_name()
        for name, setting in known.items():
            expected = setting.wrong_kind(getattr(self, name))
            self._require(name, not expected, expected)
        for name, setting in known.items():
            self._require(name, setting.allows(getattr(self, name)), setting.expected)
        above = f"above 0 and at most t_max={self.t_max}"
        self._require("t_min", 0 < self.t_min <= self.t_max, above)

    def sparse_conditioning(self, bits: int) -> bool:
        """Whether the signal may be summed sparsely when activations have this many bits."""
        if self.conditioning == "auto":
            return bits == 16 and not self.sliced_head
        return self.conditioning == "sparse" and not self.sliced_head

    @property
    def commit_below(self) -> float:
        """Nats: the mean entropy below which the rule "accepted" ends a block."""
        given = self.commit_entropy
        return self.confidence_threshold if given is None else given

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
        known = {*settings_by_name(), "preset"}
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
        given = {**preset_settings(given.pop("preset", "reference")), **given}
        try:
            return replace(base, **given)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError(f"A generation option has the wrong type: {error}.") from error


def preset_settings(name: object) -> dict[str, str]:
    """The settings that a preset names; InputError for a name that is none."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset={name!r} is not known: use {', '.join(PRESETS)}.")
    return PRESETS[name]


def settings_by_name() -> dict[str, Setting]:
    """Field of DecodingSettings -> what there is to know about it."""
    return {one.name: one.metadata["setting"] for one in fields(DecodingSettings)}


class DecodingOptions(TypedDict, total=False):
    """The settings as keywords of the functions that pass them on; None leaves them as they are."""

    preset: PresetName
    max_tokens: int
    temp: float
    sampler: SamplerName
    max_denoising_steps: int | None
    entropy_bound: float | None
    t_min: float | None
    t_max: float | None
    reveal_threshold: float | None
    stability_threshold: int | None
    confidence_threshold: float | None
    commit: CommitRule | None
    commit_entropy: float | None
    positions: PositionsRule | None
    check_share: float | None
    canvas_length: int | None
    on_unconverged: UnconvergedPolicy
    empty_reply: EmptyReplyPolicy
    conditioning: Conditioning
    sliced_head: bool | None
    kv_bits: int | None


def overrides(given: Mapping[str, object]) -> dict[str, object]:
    """The settings, and the preset, among keywords such as a function's locals()."""
    return {name: given[name] for name in DecodingOptions.__annotations__ if name in given}
