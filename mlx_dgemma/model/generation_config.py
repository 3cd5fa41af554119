"""The checkpoint's defaults of the diffusion loop, from the three places that give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dgemma.model.section import Section

MOST_STEPS = 100_000


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of the diffusion loop, as the checkpoint recommends them."""

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_max: float = 0.8
    t_min: float = 0.4
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, source: str = "generation_config.json"
    ) -> GenerationConfig:
        section = Section(values, source)
        sampler = Section(section.get("sampler_config", {}), source, "sampler_config.")
        sampler.only("_cls_name", ("EntropyBoundSamplerConfig",), "EntropyBoundSamplerConfig")
        config = cls(
            max_denoising_steps=section.integer(
                "max_denoising_steps", cls.max_denoising_steps, maximum=MOST_STEPS
            ),
            entropy_bound=sampler.number("entropy_bound", cls.entropy_bound),
            t_max=section.positive("t_max", cls.t_max),
            t_min=section.number("t_min", cls.t_min),
            stability_threshold=section.integer(
                "stability_threshold", cls.stability_threshold, minimum=0
            ),
            confidence_threshold=section.number("confidence_threshold", cls.confidence_threshold),
            eos_token_id=section.ids("eos_token_id"),
            pad_token_id=section.integer("pad_token_id", 0, minimum=0),
        )
        if config.t_min > config.t_max:
            raise section.refuse("t_min", f"exceeds t_max = {config.t_max:g}")
        return config


def generation_of(top: Section, own_file: Mapping[str, Any] | None) -> GenerationConfig:
    """Merge the three places of generation defaults, most specific last.

    Stop ids come from generation_config.json, else from config.json's nested
    `generation_config`, else from its top-level `eos_token_id`; never from text_config.
    """
    merged: dict[str, Any] = {"eos_token_id": top.get("eos_token_id")}
    for values in (top.get("generation_config"), own_file):
        if isinstance(values, Mapping):
            merged.update({key: value for key, value in values.items() if value is not None})
        elif values is not None:
            raise top.refuse("generation_config", "must be a JSON object")
    source = "generation_config.json" if own_file is not None else top.source
    return GenerationConfig.from_dict(merged, source=source)
