"""The model that the flags name: a checkpoint, or a synthetic one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_dgemma.errors import InputError

if TYPE_CHECKING:
    from mlx_dgemma.model import Model
    from mlx_dgemma.model.config import ModelConfig


def config_of(arguments: argparse.Namespace) -> ModelConfig:
    """The model's shapes, without reading a weight."""
    from mlx_dgemma.benchmark.synthetic import synthetic_config
    from mlx_dgemma.checkpoint.hub import resolve_model
    from mlx_dgemma.model.config import ModelConfig

    if arguments.synthetic:
        return ModelConfig.from_dict(synthetic_config(arguments.synthetic, arguments.layers))
    folder = resolve_model(arguments.model, revision=arguments.revision, weights=False)
    return ModelConfig.from_folder(folder)


def check_prompt(arguments: argparse.Namespace) -> ModelConfig:
    """The same; InputError when --prompt-tokens leave no room for a canvas."""
    config = config_of(arguments)
    room = config.text.max_position_embeddings - config.canvas_length
    if arguments.prompt_tokens > room:
        raise InputError(
            f"--prompt-tokens {arguments.prompt_tokens} is too long: {room} fit into the context "
            f"beside a canvas of {config.canvas_length}."
        )
    return config


def model_of(arguments: argparse.Namespace) -> Model:
    from mlx_dgemma.benchmark.synthetic import synthetic_config
    from mlx_dgemma.checkpoint.hub import resolve_model
    from mlx_dgemma.checkpoint.loading import load_network
    from mlx_dgemma.checkpoint.random_weights import (
        check_synthetic,
        lead_synthetic,
        synthetic_model,
    )
    from mlx_dgemma.distributed import joining
    from mlx_dgemma.distributed.team import Leader

    config = check_prompt(arguments)
    if not arguments.synthetic:
        folder = resolve_model(arguments.model, revision=arguments.revision)
        return load_network(folder, adapter_path=arguments.adapter_path, dtype=arguments.dtype)[0]
    check_synthetic(
        config, arguments.prompt_tokens, name=arguments.synthetic, kv_bits=arguments.kv_bits
    )
    raw, team = synthetic_config(arguments.synthetic, arguments.layers), joining.current()
    return lead_synthetic(team, raw) if isinstance(team, Leader) else synthetic_model(raw)
