"""PEFT's adapter_config.json: what is refused of it, and what each delta is multiplied with."""

from __future__ import annotations

import math

import regex

from mlx_dgemma.model.section import MOST_NUMBER, Section
from mlx_dgemma.untrusted_json import shown

# A pattern that takes longer on a module's name than this was written to take forever.
PATTERN_SECONDS = 0.2
_MOST_PATTERNS = 4096

# Entries of PEFT's adapter_config.json that change what the weights mean.
_REFUSED = {
    "modules_to_save": "modules_to_save replaces whole weights",
    "fan_in_fan_out": "fan_in_fan_out transposes weights that this network does not transpose",
    "lora_bias": "lora_bias adds biases that this network does not have",
    "trainable_token_indices": "trained token rows are no low-rank deltas",
    "layer_replication": "layer_replication changes the number of layers",
    "alora_invocation_tokens": "aLoRA applies to a part of the sequence only",
}


def refuse_kinds(settings: Section) -> None:
    if settings.get("peft_type") != "LORA":
        raise settings.refuse("peft_type", "is not supported; only LORA is")
    for key, why in _REFUSED.items():
        if settings.values.get(key):
            raise settings.refuse(key, f"is not supported: {why}")
    if settings.get("bias", "none") != "none":
        raise settings.refuse("bias", "is not supported: biases have no place in this network")


class PeftScales:
    """What PEFT multiplies each delta with: lora_alpha over the rank, with patterns by module."""

    def __init__(self, settings: Section) -> None:
        self._settings = settings
        self._alpha = settings.number("lora_alpha", 8, minimum=-MOST_NUMBER)
        self._rank_stabilized = settings.flag("use_rslora", False)
        self._patterns: dict[str, tuple[regex.Pattern[str], float]] = {}
        if settings.get("alpha_pattern") is None:
            return
        section = settings.section("alpha_pattern")
        if len(section.values) > _MOST_PATTERNS:
            raise settings.refuse("alpha_pattern", f"has more than {_MOST_PATTERNS:,} patterns")
        for pattern in section.values:
            value = section.number(pattern, minimum=-MOST_NUMBER)
            try:
                compiled = regex.compile(rf"(.*\.)?({pattern})$") if len(pattern) < 500 else None
            except (regex.error, RecursionError, OverflowError):
                compiled = None
            if compiled is None:
                raise settings.refuse("alpha_pattern", f"has {shown(pattern)}, which is no pattern")
            self._patterns[pattern] = compiled, value

    def of(self, module: str, rank: int) -> float:
        alpha = self._alpha
        for pattern, (compiled, value) in self._patterns.items():
            try:
                found = compiled.match(module, timeout=PATTERN_SECONDS)
            except TimeoutError:
                raise self._settings.refuse(
                    "alpha_pattern", f"has {shown(pattern)}, which takes too long; write it simpler"
                ) from None
            if found:
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self._rank_stabilized else rank)
