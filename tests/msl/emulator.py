"""mx.fast.metal_kernel without a Mac: the same call, executed by the emulator."""

import ctypes as C
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from msl.build import library
from msl.launch import Buffer, KernelError, Options, Result, launch
from msl.wrapper import Body, Template, dtype_name, text_for


def to_numpy(value) -> tuple[np.ndarray, str]:
    """(array, dtype name); bfloat16 travels as its bits in uint16."""
    if isinstance(value, mx.array):
        if value.dtype == mx.bfloat16:
            return np.array(value.view(mx.uint16)), "bfloat16"
        return np.array(value), dtype_name(value.dtype)
    if isinstance(value, (bool, int, float)):
        kind = {bool: np.bool_, int: np.int32, float: np.float32}[type(value)]
        return np.array(value, dtype=kind), np.dtype(kind).name
    return np.asarray(value), np.asarray(value).dtype.name


class MetalKernel:
    """Constructor and call as in MLX; `mode` is "checked", "fast" or "contract" (see build)."""

    def __init__(
        self,
        name: str,
        input_names: list[str],
        output_names: list[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: dict | None = None,
    ) -> None:
        self.body = Body(
            name, list(input_names), list(output_names), source, header, atomic_outputs
        )
        self.contiguous = ensure_row_contiguous
        self.result: Result | None = None

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream=None,
        mode: str = "checked",
        options: Options | None = None,
    ) -> list[mx.array]:
        arrays = dict(zip(self.body.input_names, map(to_numpy, inputs), strict=True))
        dtypes = [dtype_name(dtype) for dtype in output_dtypes]
        text = text_for(self.body, [(a.shape, d) for a, d in arrays.values()], dtypes, template)
        if verbose:
            print(text.text)
        outputs = dict(
            zip(self.body.output_names, zip(output_shapes, dtypes, strict=True), strict=True)
        )
        buffers = []
        for binding in text.bindings:
            if binding.kind == "in":
                buffers.append(self._input(binding.name, arrays[binding.name][0]))
            elif binding.kind == "out":
                buffers.append(_output(binding.name, *outputs[binding.name], init_value))
            else:
                buffers.append(self._shape(binding.kind, binding.name, arrays[binding.name][0]))
        options = dataclasses.replace(options or Options(), checked=mode == "checked")
        self.result = launch(
            library(text.text, _entry(text), mode), buffers, grid, threadgroup, options
        )
        if self.result.issues:
            raise KernelError(self.result.issues)
        filled = {buffer.name: buffer.data for buffer in buffers if buffer.output}
        return [_to_mlx(filled[name], *outputs[name]) for name in self.body.output_names]

    def _input(self, name: str, array: np.ndarray) -> Buffer:
        if self.contiguous or array.size == 0:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        else:  # the strides stay: expose the whole span of the buffer behind the view
            low, high = np.lib.array_utils.byte_bounds(array)
            assert low == array.__array_interface__["data"][0], "negative strides: not emulated"
            data = np.frombuffer((C.c_uint8 * (high - low)).from_address(low), np.uint8).copy()
        return Buffer(name, data, array.itemsize)

    def _shape(self, kind: str, name: str, array: np.ndarray) -> Buffer:
        strided = np.ascontiguousarray(array) if self.contiguous else array
        values = {
            "_shape": np.array(array.shape, np.int32),
            "_strides": np.array([s // array.itemsize for s in strided.strides], np.int64),
            "_ndim": np.array([array.ndim], np.int32),
        }[kind]
        return Buffer(name + kind, values.view(np.uint8).copy(), values.itemsize)


def _output(name: str, shape, dtype: str, init_value: float | None) -> Buffer:
    element = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    count = math.prod(shape)
    data = np.zeros(count * element, np.uint8)
    if init_value is not None and count:
        data = np.array(mx.full((count,), init_value).astype(getattr(mx, dtype)).view(mx.uint8))
    return Buffer(name, data.copy(), element, output=True, initialised=init_value is not None)


def _to_mlx(data: np.ndarray, shape, dtype: str) -> mx.array:
    if dtype == "bfloat16":
        return mx.array(data.view(np.uint16)).view(mx.bfloat16).reshape(shape)
    return mx.array(data.view(dtype)).reshape(shape)


def _entry(text) -> str:
    """The C function through which the runtime starts one GPU thread."""
    arguments = [f"{binding.cast}b[{index}]" for index, binding in enumerate(text.bindings)]
    for attribute, _, field in text.attributes:
        if field is None:
            raise NotImplementedError(attribute)
        arguments.append(f"a->{field}")
    signature = "void mslsim_kernel_entry(void** b, const mslsim_attrs* a)"
    return f'extern "C" {signature} {{ {text.call}({", ".join(arguments)}); }}\n'


@dataclasses.dataclass(frozen=True)
class Launched:
    """One call of a kernel by the code under test."""

    body: Body
    inputs: list[mx.array]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    template: Template | None
    result: Result


@contextmanager
def installed(mode: str = "checked", options: Options | None = None) -> Iterator[list[Launched]]:
    """Code under test runs its real kernels here, as on a Mac; yields what it launched."""
    launched: list[Launched] = []

    def metal_kernel(*args, **kwargs):
        kernel = MetalKernel(*args, **kwargs)

        def call(*, inputs, output_shapes, output_dtypes, template=None, **kwargs):
            signature = (inputs, output_shapes, output_dtypes, template)
            names = ("inputs", "output_shapes", "output_dtypes", "template")
            keywords = dict(zip(names, signature, strict=True))
            outputs = kernel(mode=mode, options=options, **keywords, **kwargs)
            launched.append(Launched(kernel.body, *signature, kernel.result))
            return outputs

        return call

    real = mx.fast.metal_kernel, mx.metal.is_available, mx.default_device
    mx.fast.metal_kernel = metal_kernel
    mx.metal.is_available = lambda: True
    mx.default_device = lambda: mx.Device(mx.gpu)
    try:
        yield launched
    finally:
        mx.fast.metal_kernel, mx.metal.is_available, mx.default_device = real
