"""The diffusion loop on ids alone: canvas, denoise, accept, renoise, stop, commit."""

from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.decoding.blocks import Request, generate_blocks
from mlx_dgemma.decoding.canvas import CanvasRequest, Opening, Pins, Start
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import SeededDraws, fresh_seed
from mlx_dgemma.decoding.events import Commit, Draft, Event, Finish
from mlx_dgemma.decoding.settings import DecodingSettings

__all__ = [
    "BlockResult",
    "CanvasRequest",
    "Commit",
    "DecodingSettings",
    "Draft",
    "Event",
    "Finish",
    "Opening",
    "Pins",
    "Request",
    "SeededDraws",
    "Start",
    "denoise_block",
    "fresh_seed",
    "generate_blocks",
]
