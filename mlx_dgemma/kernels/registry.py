"""Which operations run as Metal kernels here, and the only place that hands one to MLX.

The environment variable MLX_DGEMMA_KERNELS sets the mode: `off` always takes the twins, `force`
takes every kernel that supports its arguments, `auto` (the default) takes a kernel only where it
has passed its self-check on this machine and beaten its twin (see verdicts). Without Metal the
twins run.

A kernel's source lies in metal/NAME.metal: functions for MLX's `header` first, then, behind the
line `//: body`, the body for which MLX generates the signature.
"""

import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_dgemma.errors import InputError

Mode = Literal["off", "auto", "force"]
_MODES: tuple[Mode, ...] = ("off", "auto", "force")
Shape = dict[str, int | str]
Outputs = mx.array | Sequence[mx.array]
Template = list[tuple[str, mx.Dtype | int | bool]]

_SOURCES = Path(__file__).parent / "metal"
_BODY = "//: body\n"
_ROWS = ("tokens", "length", "rows")  # the parts of a shape that change from one prompt to the next


@dataclass(frozen=True)
class Kernel:
    """One Metal kernel: its name is also its file's.

    `contiguous` False: inputs come as they lie, and the source reads their strides.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    contiguous: bool = True

    @functools.cached_property
    def text(self) -> tuple[str, str]:
        """(header, body)."""
        header, body = (_SOURCES / f"{self.name}.metal").read_text().split(_BODY)
        return header, body

    @property
    def version(self) -> str:
        """Changes whenever the source does, so that no verdict outlives the text it was about."""
        return hashlib.sha256("\0".join((self.name, *self.text)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Probe:
    """One comparison of an operation's kernel with its twin, on the same deterministic inputs.

    tolerance: of the largest magnitude of each output, or of `least` where that is larger, as it
        must be for an output that should vanish. Integers must be equal.
    expected: the outputs by the twin from the same inputs in float32; None where the twin itself
        computes in float32. In 16 bits the twin's own error can be larger than the kernel's.
    """

    metal: Callable[[], Outputs]
    twin: Callable[[], Outputs]
    tolerance: float
    least: float = 0.0
    expected: Callable[[], Outputs] | None = None


@dataclass(frozen=True)
class Operation:
    """A fused operation: its kernels, and probes for arguments of a given shape.

    `probes(shape)` yields small and edge cases first and the shape itself, which is timed, last.
    """

    name: str
    kernels: tuple[Kernel, ...]
    probes: Callable[[Shape], Iterator[Probe]]

    @property
    def version(self) -> str:
        """Changes with the kernels' text and with the module that launches them."""
        module = inspect.getsource(sys.modules[self.probes.__module__])
        launch = hashlib.sha256(module.encode()).hexdigest()[:12]
        return "-".join([*(kernel.version for kernel in self.kernels), launch])


def mode() -> Mode:
    """The mode asked for; a misspelt one is an InputError."""
    value = os.environ.get("MLX_DGEMMA_KERNELS", "auto")
    for known in _MODES:
        if value == known:
            return known
    raise InputError(f"MLX_DGEMMA_KERNELS is {value!r}: set it to off, auto or force")


def available() -> bool:
    """Whether work runs on a Metal device in this process."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def use(operation: Operation, shape: Shape, supported: bool) -> bool:
    """Whether this call of an operation runs as its kernel."""
    if not supported or mode() == "off" or not available():
        return False
    if mode() == "force":
        return True
    return _verdict(operation.name, tuple(sorted(shape_class(shape).items())))


def shape_class(shape: Shape) -> Shape:
    """What a verdict is about: counts of rows are rounded up to 32, 256, 2,048 and so on.

    Prompts have any length, and each new class waits for some eight checks of its own. A canvas of
    256 and the prompts nearest to it share one.
    """
    return {
        name: _rounded_up(size) if name in _ROWS and isinstance(size, int) else size
        for name, size in shape.items()
    }


def _rounded_up(rows: int) -> int:
    bound = 32
    while bound < rows:
        bound *= 8
    return bound


@functools.cache
def _verdict(name: str, shape: tuple[tuple[str, int | str], ...]) -> bool:
    from mlx_dgemma.kernels.verdicts import verdict

    return verdict(operations()[name], dict(shape)).enabled


def operations() -> dict[str, Operation]:
    """Every operation by name."""
    from mlx_dgemma.kernels.accept import OPERATION as ACCEPT
    from mlx_dgemma.kernels.attention import OPERATION as ATTENTION
    from mlx_dgemma.kernels.moe import OPERATION as MOE
    from mlx_dgemma.kernels.qkv import OPERATION as NORMED_HEADS
    from mlx_dgemma.kernels.router import OPERATION as ROUTER
    from mlx_dgemma.kernels.row_statistics import OPERATION as ROW_STATISTICS
    from mlx_dgemma.kernels.soft_embeddings import GATHER, SELECT

    found = (ROW_STATISTICS, ACCEPT, SELECT, GATHER, ROUTER, MOE, NORMED_HEADS, ATTENTION)
    return {operation.name: operation for operation in found}


def launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    *,
    template: Template,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """Queue a kernel: `grid` counts threads, `outputs` are (shape, dtype)."""
    built = _built(kernel, mx.fast.metal_kernel)
    launched: list[mx.array] = built(
        inputs=list(inputs),
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
    return launched


@functools.cache
def _built(kernel: Kernel, build: Callable[..., Any]) -> Callable[..., Any]:
    header, body = kernel.text
    built: Callable[..., Any] = build(
        name=f"dgemma_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=body,
        header=header,
        ensure_row_contiguous=kernel.contiguous,
    )
    return built
