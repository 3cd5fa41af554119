"""Which module gets which precision: one table of recipes, and rules by pattern.

A recipe is a default precision and a list of rules; the last rule whose pattern matches a
module's path decides. Patterns are shell patterns on paths such as
`model.decoder.layers.3.self_attn.q_proj`; `*` also crosses dots. The vision tower stays at
16 bits in every recipe. No numbers are read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_dgemma.errors import InputError
from mlx_dgemma.files import read_argument
from mlx_dgemma.untrusted_json import UntrustedJSONError, parse

# Group sizes and bits that MLX's modes have; the first is the mode's default.
MODE_CHOICES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}


@dataclass(frozen=True)
class Precision:
    """How a weight matrix is quantized."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODE_CHOICES:
            raise InputError(
                f"quantization mode {self.mode!r} is unknown; use {', '.join(MODE_CHOICES)}."
            )
        groups, bits = MODE_CHOICES[self.mode]
        if self.bits not in bits:
            raise InputError(
                f"{self.mode} has no {self.bits}-bit weights; use {_choices(bits)} bits."
            )
        if self.group_size not in groups:
            raise InputError(
                f"{self.mode} has no groups of {self.group_size}; use {_choices(groups)}."
            )

    def __str__(self) -> str:
        mode = "" if self.mode == "affine" else f"{self.mode} "
        return f"{mode}{self.bits}-bit/{self.group_size}"

    @property
    def bits_per_weight(self) -> float:
        """Bits with the scales and biases shared out."""
        overhead = {"affine": 32, "mxfp4": 8, "nvfp4": 8, "mxfp8": 8}[self.mode]
        return self.bits + overhead / self.group_size

    def as_config(self, *, full: bool) -> dict[str, Any]:
        """The entry in config.json; an override without a mode means affine."""
        entry: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        if full or self.mode != "affine":
            entry["mode"] = self.mode
        return entry


def _choices(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def default_precision(
    mode: str, bits: int | None = None, group_size: int | None = None
) -> Precision:
    """A mode's precision with its own defaults where nothing was asked."""
    if mode not in MODE_CHOICES:
        raise InputError(f"quantization mode {mode!r} is unknown; use {', '.join(MODE_CHOICES)}.")
    groups, widths = MODE_CHOICES[mode]
    return Precision(bits or widths[0], group_size or groups[0], mode)


@dataclass(frozen=True)
class Rule:
    """Modules whose path matches `pattern` get `precision`; None keeps 16 bits.

    must_match: a pattern that a person typed and that matches nothing is an error; the table's
        own patterns need not match (a model may have no vision tower).
    """

    pattern: str
    precision: Precision | None
    must_match: bool = False

    def matches(self, path: str) -> bool:
        return fnmatchcase(path, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """A named choice of precision for every module; `default` None quantizes nothing."""

    name: str
    summary: str
    default: Precision | None
    rules: tuple[Rule, ...] = ()
    mixed_bits: tuple[int, int] | None = None

    def wanted(self, path: str, layers: int) -> Precision | None:
        """The precision asked for module `path` in a model of `layers` decoder layers."""
        precision = self.default
        if self.mixed_bits is not None and precision is not None:
            precision = replace(precision, bits=mixed_bits(path, layers, *self.mixed_bits))
        for rule in self.rules:
            if rule.matches(path):
                precision = rule.precision
        return precision

    def with_rules(self, rules: Iterable[Rule]) -> Recipe:
        """This recipe with rules that overrule its own."""
        extra = tuple(rules)
        return replace(self, rules=self.rules + extra) if extra else self


EMBEDDINGS = "model.decoder.embed_tokens"
ATTENTION = "model.decoder.layers.*.self_attn.*_proj"
DENSE_MLP = "model.decoder.layers.*.mlp.*_proj"
ROUTER = "model.decoder.layers.*.router.proj"
EXPERTS = "model.decoder.layers.*.experts.*_proj"
SELF_CONDITIONING = "model.decoder.self_conditioning.*_proj"
IMAGE_PROJECTION = "model.encoder.embed_vision.*"
VISION_TOWER = "model.encoder.vision_tower.*"

_TOWER_16 = Rule(VISION_TOWER, None)


def _rules(precision: Precision | None, *patterns: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, precision) for pattern in patterns)


# What every token passes through, at 8 bits: the community's table.
_DENSE_8 = _rules(Precision(8), EMBEDDINGS, ATTENTION, DENSE_MLP, ROUTER)

_TABLE = (
    Recipe(
        "4bit",
        "the community's files: experts 4-bit, embeddings, attention, dense MLP and router 8-bit",
        Precision(4),
        (*_DENSE_8, _TOWER_16),
    ),
    Recipe("8bit", "everything 8-bit", Precision(8), (_TOWER_16,)),
    Recipe("bf16", "no quantization", None),
    Recipe(
        "mxfp4",
        "experts in mxfp4, the rest as in 4bit",
        Precision(4, 32, "mxfp4"),
        (*_DENSE_8, _TOWER_16),
    ),
    Recipe(
        "nvfp4",
        "experts in nvfp4, the rest as in 4bit",
        Precision(4, 16, "nvfp4"),
        (*_DENSE_8, _TOWER_16),
    ),
    Recipe(
        "mxfp8",
        "experts in mxfp8, the rest affine 8-bit",
        Precision(8, 32, "mxfp8"),
        (*_DENSE_8, _TOWER_16),
    ),
    Recipe(
        "quality",
        "experts 4-bit; everything used on every token 8-bit, embeddings and router 16-bit",
        Precision(4),
        (
            *_rules(Precision(8), ATTENTION, DENSE_MLP, SELF_CONDITIONING),
            *_rules(None, EMBEDDINGS, ROUTER, IMAGE_PROJECTION),
            _TOWER_16,
        ),
    ),
    Recipe(
        "small",
        "experts 2-bit, embeddings, attention and dense MLP 4-bit, router 8-bit",
        Precision(4),
        (
            *_rules(Precision(2), EXPERTS),
            *_rules(Precision(8), ROUTER),
            _TOWER_16,
        ),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _TABLE}

# mlx-lm's and mlx-vlm's --quant-predicate mixes: (low, high) bits.
MIXES = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_5": (3, 5),
    "mixed_3_6": (3, 6),
    "mixed_3_8": (3, 8),
    "mixed_4_6": (4, 6),
    "mixed_4_8": (4, 8),
}


def mixed_bits(path: str, layers: int, low: int, high: int) -> int:
    """The mixes' rule, as mlx-vlm applies it to this model (after llama.cpp's Q4_K_M).

    High: the embeddings, and v_proj and down_proj in the first and last eighth of the layers
    and in every third layer between.
    """
    if path == EMBEDDINGS:
        return high
    number = re.match(r"model\.decoder\.layers\.(\d+)\.", path)
    layer = int(number[1]) if number else 0
    eighth = layers // 8
    important = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return high if important and ("v_proj" in path or "down_proj" in path) else low


def mix(name: str, group_size: int = 64) -> Recipe:
    """The recipe of a --quant-predicate mix.

    Raises InputError for a name that neither mlx-lm nor mlx-vlm has.
    """
    if name not in MIXES:
        raise InputError(f"there is no mix {name!r}; use one of {', '.join(MIXES)}.")
    bits = MIXES[name]
    precision = Precision(bits[0], group_size)
    summary = f"mlx-lm's mix: {bits[0]}-bit, {bits[1]}-bit where llama.cpp's Q4_K_M spends more"
    towers = (_TOWER_16, Rule(IMAGE_PROJECTION, None))
    return Recipe(name, summary, precision, towers, mixed_bits=bits)


def recipe_named(name: str) -> Recipe:
    """A recipe or a mix by name.

    Raises InputError that lists the names.
    """
    if name in MIXES:
        return mix(name)
    if name not in RECIPES:
        raise InputError(
            f"there is no recipe {name!r}; use one of {', '.join([*RECIPES, *MIXES])}."
        )
    return RECIPES[name]


def custom(bits: int | None, group_size: int | None, mode: str) -> Recipe:
    """`-q` with its own bits, group or mode: the 4bit recipe with another default.

    As in mlx-vlm, what every token passes through keeps 8 bits; rules can change that.
    """
    precision = default_precision(mode, bits, group_size)
    base = RECIPES["4bit"]
    if precision == base.default:
        return base
    summary = f"{precision}; embeddings, attention, dense MLP and router 8-bit"
    return replace(base, name="custom", summary=summary, default=precision)


_SPEC = re.compile(
    r"(?:(?P<bits>\d+)(?:/(?P<group>\d+))?|(?P<mode>mxfp4|nvfp4|mxfp8)|(?P<keep>16|bf16|none))"
)


def parse_precision(text: str) -> Precision | None:
    """`4`, `4/32` (bits/group), `mxfp4`, or `16` for no quantization."""
    match = _SPEC.fullmatch(text.strip().lower())
    if match is None:
        raise InputError(
            f"{text!r} is no precision; write bits as 4 or 4/32, a mode as mxfp4, "
            "or 16 for no quantization."
        )
    if match["keep"] or match["bits"] == "16":
        return None
    if match["mode"]:
        return default_precision(match["mode"])
    return default_precision("affine", int(match["bits"]), int(match["group"] or 64))


def parse_rule(text: str) -> Rule:
    """`PATTERN=PRECISION`, such as `*.self_attn.*=6/32`."""
    pattern, separator, precision = text.rpartition("=")
    if not separator or not pattern.strip():
        raise InputError(f"{text!r} is no rule; write PATTERN=PRECISION, such as '*.experts.*=3'.")
    return Rule(pattern.strip(), parse_precision(precision), must_match=True)


def read_rules(path: Path) -> list[Rule]:
    """Rules from a file: a JSON object {pattern: precision}, or one PATTERN=PRECISION a line."""
    text = read_argument(path, "rules file")
    if text.lstrip().startswith("{"):
        try:
            items = parse(text).items()
        except UntrustedJSONError as error:
            raise InputError(f"The rules file {path} {error}.") from error
        return [Rule(key, parse_precision(str(value)), must_match=True) for key, value in items]
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [parse_rule(line) for line in lines if line]


def fit(wanted: Precision, width: int) -> tuple[Precision | None, str | None]:
    """What a matrix whose rows have `width` entries can have instead of `wanted`.

    Returns the precision and, where it differs, why: groups must divide the width. Alternatives
    are tried in the order smaller groups of the same bits, then affine, then 16 bits.
    """
    if width % wanted.group_size == 0:
        return wanted, None
    bits = wanted.bits
    for group in (64, 32):
        if width % group == 0 and (group < wanted.group_size or wanted.mode != "affine"):
            taken = Precision(bits, group)
            return taken, f"{width} is no multiple of {wanted.group_size}: {taken} instead"
    return None, f"{width} is no multiple of {wanted.group_size}: left at 16 bits"


def describe() -> str:
    """The table of recipes and mixes as text."""
    lines = [f"{recipe.name:<10} {recipe.summary}" for recipe in RECIPES.values()]
    for name, (low, high) in MIXES.items():
        lines.append(f"{name:<10} mlx-lm's mix of {low} and {high} bits (also --quant-predicate)")
    return "\n".join(lines)
