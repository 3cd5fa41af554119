"""The network: config, weights, encoder pass, decoder pass, context cache, vision tower."""

from mlx_dgemma.model.config import ModelConfig, TextConfig, VisionConfig
from mlx_dgemma.model.context import ContextCache, Snapshot
from mlx_dgemma.model.generation_config import GenerationConfig
from mlx_dgemma.model.network import Model
from mlx_dgemma.model.vision import ImagePatches

__all__ = [
    "ContextCache",
    "GenerationConfig",
    "ImagePatches",
    "Model",
    "ModelConfig",
    "Snapshot",
    "TextConfig",
    "VisionConfig",
]
