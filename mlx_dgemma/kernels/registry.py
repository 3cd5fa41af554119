"""What a fused operation consists of, and the only place that hands a kernel to MLX.

A kernel's source lies in metal/NAME.metal: functions for MLX's `header` first, then, after the
line `//: body`, the body for which MLX generates the signature.
"""

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_dgemma._version import __version__

Shape = dict[str, int | str]
Size = int | str | mx.Dtype
Outputs = mx.array | Sequence[mx.array]
Template = list[tuple[str, mx.Dtype | int | bool]]

_SOURCES = Path(__file__).parent / "metal"
_BODY = "//: body\n"


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

    @functools.cached_property
    def version(self) -> str:
        """Changes whenever the source does, so that no verdict outlives the text it was about."""
        return hashlib.sha256("\0".join((self.name, *self.text)).encode()).hexdigest()[:12]


class Call(Protocol):
    """What is needed of a `functools.partial`, so that its arguments can be made to wait."""

    @property
    def func(self) -> Callable[..., Outputs]: ...
    @property
    def args(self) -> tuple[Any, ...]: ...
    @property
    def keywords(self) -> dict[str, Any]: ...
    def __call__(self) -> Outputs: ...


@dataclass(frozen=True)
class Probe:
    """One comparison of an operation's kernel with its twin, on the same deterministic inputs.

    tolerance: of the largest magnitude of each output, or of `least` where that is larger, as it
        must be for an output that should vanish. Integers must be equal.
    expected: the outputs by the twin from the same inputs in float32; None where the twin itself
        computes in float32. In 16 bits the twin's own error can be larger than the kernel's.
    """

    metal: Call
    twin: Call
    tolerance: float
    least: float = 0.0
    expected: Call | None = None


@dataclass(frozen=True, eq=False)
class Operation:
    """A fused operation.

    sizes: the names of what tells one shape from another, in the order in which calls give them.
    supports: whether the kernels take a shape at all.
    probes: small and edge cases of a shape first and the shape itself, which is timed, last.
    """

    name: str
    sizes: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    supports: Callable[[Shape], bool]
    probes: Callable[[Shape], Iterator[Probe]]

    def shape(self, *sizes: Size) -> Shape:
        """The sizes by name; a dtype as its name."""
        named = zip(self.sizes, sizes, strict=True)
        return {
            name: size if isinstance(size, int | str) else name_of(size) for name, size in named
        }

    @functools.cached_property
    def version(self) -> str:
        """Changes with the kernels' text and with the module that launches them.

        Where an app was bundled without its source, with the package's version.
        """
        try:
            module = inspect.getsource(sys.modules[self.probes.__module__])
        except OSError:
            module = __version__
        launch = hashlib.sha256(module.encode()).hexdigest()[:12]
        return "-".join([*(kernel.version for kernel in self.kernels), launch])


def name_of(dtype: mx.Dtype) -> str:
    """ "bfloat16" """
    return str(dtype).split(".")[-1]


def is_float(shape: Shape, key: str = "dtype") -> bool:
    """Whether a shape's dtype is one that every kernel takes."""
    return shape[key] in ("float32", "float16", "bfloat16")


def launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    *,
    template: Template,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """Queue a kernel: `grid` counts threads, `outputs` are (shape, dtype).

    Every input takes an array: where a variant of a kernel does not read one, any other input
    stands in for it, which costs nothing.
    """
    return _built(kernel, mx.fast.metal_kernel)(
        inputs=list(inputs),
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


class _Built(Protocol):
    """What `mx.fast.metal_kernel` gives."""

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
    ) -> list[mx.array]: ...


@functools.cache
def _built(kernel: Kernel, build: Callable[..., _Built]) -> _Built:
    header, body = kernel.text
    return build(
        name=f"dgemma_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=body,
        header=header,
        ensure_row_contiguous=kernel.contiguous,
    )
