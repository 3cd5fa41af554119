"""What can go wrong and the user can fix.

    DGemmaError
    ├── InputError         the request: prompt, flag, image, hole, message
    ├── ModelNotFoundError no such folder, or no such repository
    ├── CheckpointError    the files: config, weights, tokenizer
    ├── CancelledError     the request's own cancel event ended it
    ├── ResourceError      memory or disk that does not suffice
    │   └── GpuMemoryError while computing
    ├── GpuError           the GPU gave up: too slow, in the screen's way, or for its own reasons
    └── NumericsError      the network produced NaN or Inf

UnconvergedWarning is shown, not raised, where `on_unconverged="warn"` asks for it.

Commands print the message of any of these as one sentence, without a traceback, and exit
with code 2. Everything else is a bug and keeps its traceback.
"""


class DGemmaError(Exception):
    """Base of every error whose message is written for the user."""


class InputError(DGemmaError):
    """The request cannot be served as it was asked."""


class MediaError(InputError):
    """An image, video or sound that cannot be read. where: its place, `messages[0].content[1]`."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class LanguageError(InputError):
    """A constraint that cannot be followed: malformed, empty, or too large."""


class UnsupportedError(LanguageError):
    """A rule that no automaton here can hold a text to; a check of the finished text can."""


class ModelNotFoundError(DGemmaError):
    """The model is neither a folder here nor a repository that can be reached."""


class CheckpointError(DGemmaError):
    """A checkpoint file is missing, damaged or not a DiffusionGemma."""


class CancelledError(DGemmaError):
    """The request was cancelled before it had a result."""


class ResourceError(DGemmaError):
    """Memory or disk space does not suffice; the message carries the numbers."""


class GpuMemoryError(ResourceError):
    """Memory ran out while a request was computed; other requests may fit."""


class GpuError(DGemmaError):
    """The system ended the GPU's work; the next request may succeed."""


class NumericsError(DGemmaError):
    """The network produced NaN or Inf; the weights are damaged or the precision too low."""


class UnconvergedWarning(UserWarning):
    """A block ran out of denoising steps. Python shows equal ones once; to see the one of every
    reply: `warnings.simplefilter("always", UnconvergedWarning)`."""
