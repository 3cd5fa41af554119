"""Tensor names in both checkpoint layouts, and which names share one tensor.

Attribute names of the network equal the MLX-community layout's tensor names. Hugging Face's
layout differs only in the experts (no `.weight`) and in what savers add: duplicates of tied
tensors, `lm_head.weight`, per-expert or split gate/up tensors.
"""

from __future__ import annotations

import re
from typing import Any, Literal, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dgemma.untrusted_json import printable

Layout = Literal["mlx", "hf"]

DECODER = "model.decoder."
ENCODER_TEXT = "model.encoder.language_model."
VISION_TOWER = "model.encoder.vision_tower."
EMBED_VISION = "model.encoder.embed_vision."
EMBED_TOKENS = "model.decoder.embed_tokens"
LAYER_SCALAR = ".layer_scalar"
# That one message names.
MOST_NAMES = 12


def is_tied_duplicate(name: str) -> bool:
    """True for tensors some savers add although another one holds the same weights.

    The encoder shares every text weight with the decoder except its layer scalars, and the head
    is the embedding table.
    """
    if name in ("lm_head.weight", "model.lm_head.weight"):
        return True
    return name.startswith(ENCODER_TEXT) and not name.endswith(LAYER_SCALAR)


def tied_to(name: str) -> str:
    """The decoder's name for a tied duplicate."""
    if name.endswith("lm_head.weight"):
        return f"{EMBED_TOKENS}.weight"
    return DECODER + name.removeprefix(ENCODER_TEXT)


def together(names: list[str]) -> str:
    """All the names in few words: those that differ in one number share a pattern, such as
    model.decoder.layers.{0-4,6}.layer_scalar. Of many patterns the first MOST_NAMES."""
    found = [tuple(re.split(r"(?<=\.)(\d+)(?=\.)", name)) for name in names]
    for column in range(max(map(len, found)) - 2, 0, -2):
        grouped: dict[tuple[str, ...], list[str]] = {}
        for parts in found:
            number = parts[column] if column < len(parts) else ""
            grouped.setdefault(parts[:column] + parts[column + 1 :], []).append(number)
        found = [
            rest[:column] + ((_ranges(numbers),) if numbers[0] else ()) + rest[column:]
            for rest, numbers in grouped.items()
        ]
    names = [printable("".join(parts)) for parts in found[:MOST_NAMES]]
    more = len(found) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def _ranges(numbers: list[str]) -> str:
    """Numbers as {0-4,6}; one number as it is."""
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs) + "}"


def named_tensors(tree: Any) -> dict[str, mx.array]:
    """The arrays of a module's parameters, or of any nested dict or list, by their dotted names."""
    return cast("dict[str, mx.array]", tree_flatten(tree, destination={}))
