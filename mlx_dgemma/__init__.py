"""Run DiffusionGemma on a Mac: block-diffusion text generation on MLX.

from mlx_dgemma import load, generate
model, tokenizer = load()                # the bundled demo checkpoint
print(generate(model, tokenizer, "Count from 3 to 9."))

Importing the package takes no time; the first use of a name below imports MLX. A command can so
answer --help, a wrong verb and Ctrl-C at once.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_dgemma._version import __version__
from mlx_dgemma.errors import DGemmaError

if TYPE_CHECKING:
    from mlx_dgemma.checkpoint.loading import load
    from mlx_dgemma.constraints import Constraint
    from mlx_dgemma.context.prompt_cache import PromptCache
    from mlx_dgemma.decisions import Choice, Decision, Noul, Score, decide
    from mlx_dgemma.decoding.events import Commit, Draft, Event, Finish
    from mlx_dgemma.distributed.starting import connect
    from mlx_dgemma.generate import generate, stream_generate
    from mlx_dgemma.infilling.fill import edit, infill, refine, regenerate
    from mlx_dgemma.infilling.filled import Infill
    from mlx_dgemma.replaying import Replay, replay
    from mlx_dgemma.runtime import Runtime

_NAMES = {
    "generate": ("generate", "stream_generate"),
    "decisions": ("Choice", "Decision", "Noul", "Score", "decide"),
    "decoding.events": ("Commit", "Draft", "Event", "Finish"),
    "infilling.fill": ("edit", "infill", "refine", "regenerate"),
    "infilling.filled": ("Infill",),
    "replaying": ("Replay", "replay"),
    "checkpoint.loading": ("load",),
    "distributed.starting": ("connect",),
    "constraints": ("Constraint",),
    "context.prompt_cache": ("PromptCache",),
    "runtime": ("Runtime",),
}

__all__ = [
    "Choice",
    "Commit",
    "Constraint",
    "DGemmaError",
    "Decision",
    "Draft",
    "Event",
    "Finish",
    "Infill",
    "Noul",
    "PromptCache",
    "Replay",
    "Runtime",
    "Score",
    "__version__",
    "connect",
    "decide",
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


class _Package(ModuleType):
    """`mlx_dgemma.generate`, `.infill` and `.decide` are functions, whatever is imported first.

    Importing a submodule binds it to its name in the package; for these names the function is
    bound instead, as `from .generate import generate` does in mlx-lm.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in ("decide", "generate", "infill"):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
