"""Run DiffusionGemma on a Mac: block-diffusion text generation on MLX.

from mlx_dgemma import load, generate
model, tokenizer = load()                # the bundled demo checkpoint
print(generate(model, tokenizer, "Count from 3 to 9."))

Importing the package takes no time; the first use of a name below imports MLX. A command can so
answer --help, a wrong verb and Ctrl-C at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_dgemma._version import __version__
from mlx_dgemma.errors import DGemmaError

if TYPE_CHECKING:
    from mlx_dgemma.api import Replay, generate, replay, stream_generate
    from mlx_dgemma.decoding.events import Commit, Draft, Event, Finish
    from mlx_dgemma.filling.infill import edit, infill, refine, regenerate
    from mlx_dgemma.filling.results import Infill
    from mlx_dgemma.loading import load
    from mlx_dgemma.prompt_cache import PromptCache
    from mlx_dgemma.runtime import Runtime

_NAMES = {
    "api": ("Replay", "generate", "replay", "stream_generate"),
    "decoding.events": ("Commit", "Draft", "Event", "Finish"),
    "filling.infill": ("edit", "infill", "refine", "regenerate"),
    "filling.results": ("Infill",),
    "loading": ("load",),
    "prompt_cache": ("PromptCache",),
    "runtime": ("Runtime",),
}

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


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
