"""Run DiffusionGemma on a Mac: block-diffusion text generation on MLX.

from mlx_dgemma import load, generate
model, tokenizer = load()                # the bundled demo checkpoint
print(generate(model, tokenizer, "Count from 3 to 9."))
"""

from mlx_dgemma._version import __version__
from mlx_dgemma.api import Replay, generate, load, replay, stream_generate
from mlx_dgemma.decoding.events import Commit, Draft, Event, Finish
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.filling import Infill, edit, infill, refine, regenerate
from mlx_dgemma.prompt_cache import PromptCache
from mlx_dgemma.runtime import Runtime

__all__ = [
    "Commit",
    "DGemmaError",
    "Draft",
    "Event",
    "Finish",
    "Infill",
    "PromptCache",
    "Replay",
    "Runtime",
    "__version__",
    "edit",
    "generate",
    "infill",
    "load",
    "refine",
    "regenerate",
    "replay",
    "stream_generate",
]
