"""Which operations run as Metal kernels here.

The environment variable MLX_DGEMMA_KERNELS sets the mode: `off` always takes the twins, `force`
takes every kernel that supports its arguments, `auto` (the default) takes a kernel only where it
has passed its self-check on this machine and beaten its twin (see verdicts). Without Metal the
twins run.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import mlx.core as mx

from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels import self_checks
from mlx_dgemma.kernels.gradients import wanted
from mlx_dgemma.kernels.registry import Operation, Shape, Size
from mlx_dgemma.kernels.self_checks import Request

Mode = Literal["off", "auto", "force"]
_VARIABLE = "MLX_DGEMMA_KERNELS"
_MODES: tuple[Mode, ...] = ("off", "auto", "force")
_GPU = mx.Device(mx.gpu)
# What several processes agreed on (see `settle`), by `_kind`; None where this one decides.
_settled: dict[str, bool] | None = None
# Counts of rows that share a verdict, the most of them. From 64 tokens on MLX multiplies experts
# otherwise; more rows than the last are counted with it.
ROW_CLASSES = {
    "tokens": (32, 63, 256, 2048),
    "length": (32, 256, 2048),
    "rows": (32, 256, 2048),
    "patches": (640, 2560),  # of a picture: a video's frame, and the usual 280 soft tokens
}


def mode() -> Mode:
    """The mode asked for; a misspelt one is an InputError."""
    return _known_mode(os.environ.get(_VARIABLE))


def _known_mode(value: str | None) -> Mode:
    for known in _MODES:
        if (value or "auto") == known:
            return known
    raise InputError(f"{_VARIABLE} is {value!r}: set it to off, auto or force")


def available() -> bool:
    """Whether work runs on a Metal device in this process."""
    return mx.metal.is_available() and mx.default_device() == _GPU


def use(operation: Operation, *sizes: Size) -> bool:
    """Whether a call of these sizes runs as the operation's kernel; each is decided once."""
    if wanted() or not available():
        return False
    if _settled is not None:
        shape = operation.shape(*sizes)
        return operation.supports(shape) and _settled.get(_kind(operation, shape), False)
    return _decided(operation, os.environ.get(_VARIABLE), sizes)


@functools.cache
def _decided(operation: Operation, value: str | None, sizes: tuple[Size, ...]) -> bool:
    chosen, shape = _known_mode(value), operation.shape(*sizes)
    if chosen == "off" or not operation.supports(shape):
        return False
    if chosen == "force":
        return True
    return self_checks.first_judged(operation, tuple(shape_class(shape).items())).enabled


def choices(requests: Sequence[Request]) -> dict[str, bool]:
    """Which operations would run as kernels, by kind: those whose every shape would."""
    found: dict[str, bool] = {}
    for operation, shape in requests:
        kind = _kind(operation, shape)
        on = use(operation, *shape.values())
        found[kind] = found.get(kind, True) and on
    return found


def settle(chosen: Mapping[str, bool] | None) -> None:
    """From now on these kinds run as kernels, or not, and of others those that were settled before;
    None: this process decides again."""
    global _settled
    _settled = None if chosen is None else {**(_settled or {}), **chosen}


def _kind(operation: Operation, shape: Shape) -> str:
    """The operation, and the class of its count of rows: what is the same on ranks whose other
    sizes differ."""
    rows = (shape_class(shape)[name] for name in ROW_CLASSES if name in shape)
    return " ".join(map(str, (operation.name, *rows)))


def forget() -> None:
    """Decide again at the next call: the verdicts have changed."""
    _decided.cache_clear()
    self_checks.first_judged.cache_clear()


def shape_class(shape: Shape) -> Shape:
    """What a verdict is about: counts of rows are rounded up to one of `ROW_CLASSES`.

    Prompts have any length, and each class waits for checks of its own.
    """
    return {
        name: _rounded_up(size, ROW_CLASSES[name])
        if name in ROW_CLASSES and isinstance(size, int)
        else size
        for name, size in shape.items()
    }


def _rounded_up(rows: int, classes: Sequence[int]) -> int:
    return next((most for most in classes if rows <= most), classes[-1])


def prepare(requests: Sequence[Request], *, again: bool = False) -> None:
    """Check what a model will need, before its weights take the memory.

    again: also what has a verdict.
    """
    if not available() or mode() != "auto":
        return
    classes = {}
    for operation, shape in requests:
        if operation.supports(shape):
            request = Request(operation, shape_class(shape))
            classes[request.key] = request
    self_checks.judged(list(classes.values()), again=again)
    forget()


@contextlib.contextmanager
def twins_only() -> Iterator[None]:
    """Within it every operation of this process takes its twin: kernels have no gradient."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
