"""The kernel text MLX makes of a body: a port of mlx/backend/common/metal_kernel.cpp.

`text_for` is our port; `text_from_mlx` asks the installed MLX for its own, by tracing an export
with verbose=True, which works without a Metal back end. The tests hold the two equal.
"""

import ctypes
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

METAL_TYPE = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "float32": "float",
    "bfloat16": "bfloat16_t",
}
# Metal's thread attributes in MLX's order: name, type, the emulator's field (None: not emulated).
ATTRIBUTES = [
    ("dispatch_quadgroups_per_threadgroup", "uint", None),
    ("dispatch_simdgroups_per_threadgroup", "uint", "sgptg"),
    ("dispatch_threads_per_threadgroup", "uint3", "dtptg"),
    ("grid_origin", "uint3", None),
    ("grid_size", "uint3", "tpg"),
    ("quadgroup_index_in_threadgroup", "uint", None),
    ("quadgroups_per_threadgroup", "uint", None),
    ("simdgroup_index_in_threadgroup", "uint", "sgit"),
    ("simdgroups_per_threadgroup", "uint", "sgptg"),
    ("thread_execution_width", "uint", "tps"),
    ("thread_index_in_quadgroup", "uint", None),
    ("thread_index_in_simdgroup", "uint", "tiis"),
    ("thread_index_in_threadgroup", "uint", "tiit"),
    ("thread_position_in_grid", "uint3", "tpig"),
    ("thread_position_in_threadgroup", "uint3", "tpit"),
    ("threadgroup_position_in_grid", "uint3", "tgpig"),
    ("threadgroups_per_grid", "uint3", "tgpg"),
    ("threads_per_grid", "uint3", "tpg"),
    ("threads_per_simdgroup", "uint", "tps"),
    ("threads_per_threadgroup", "uint3", "tptg"),
]
_CONSTANT_BELOW = 8  # inputs of fewer elements are passed in the constant address space
_SHAPE_PARAMETERS = [
    ("_shape", "const constant int* ", "(const int*)"),
    ("_strides", "const constant int64_t* ", "(const int64_t*)"),
    ("_ndim", "const constant int& ", "*(const int*)"),
]

Template = list[tuple[str, mx.Dtype | int | bool]]


def dtype_name(dtype) -> str:
    if isinstance(dtype, mx.Dtype):
        return str(dtype).replace("mlx.core.", "")
    return np.dtype(dtype).name


@dataclass(frozen=True)
class Body:
    """What is passed to mx.fast.metal_kernel."""

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str = ""
    atomic_outputs: bool = False


@dataclass(frozen=True)
class Binding:
    """One buffer parameter: kind "in", "out", "_shape", "_strides" or "_ndim", and its C++ cast."""

    kind: str
    name: str
    cast: str


@dataclass(frozen=True)
class Text:
    """A complete kernel: what MLX compiles, and how the emulator calls it."""

    text: str
    call: str
    bindings: list[Binding]
    attributes: list[tuple[str, str, str | None]]


def text_for(
    body: Body,
    inputs: list[tuple[tuple[int, ...], str]],
    output_dtypes: list[str],
    template: Template | None,
) -> Text:
    """The text MLX generates for inputs of these (shape, dtype name)."""
    arguments = [
        str(int(value)) if isinstance(value, (bool, int)) else METAL_TYPE[dtype_name(value)]
        for _, value in template or []
    ]
    name = _kernel_name(body.name, arguments, inputs, output_dtypes)
    text = body.header
    if template:
        text += f"template <{', '.join(_template_parameter(*pair) for pair in template)}>\n"
    text += f"[[kernel]] void {name}(\n"

    parameters: list[str] = []
    bindings: list[Binding] = []

    def bind(declaration: str, kind: str, parameter: str, cast: str) -> None:
        parameters.append(f"  {declaration} [[buffer({len(parameters)})]]")
        bindings.append(Binding(kind, parameter, cast))

    for parameter, (shape, dtype) in zip(body.input_names, inputs, strict=True):
        space = "constant" if math.prod(shape) < _CONSTANT_BELOW else "device"
        kind = METAL_TYPE[dtype]
        mark, star = ("&", "*") if len(shape) == 0 else ("*", "")
        bind(f"const {space} {kind}{mark} {parameter}", "in", parameter, f"{star}(const {kind}*)")
        if len(shape) > 0:
            for suffix, declaration, cast in _SHAPE_PARAMETERS:
                if parameter + suffix in body.source:
                    bind(f"{declaration}{parameter}{suffix}", suffix, parameter, cast)
    for parameter, dtype in zip(body.output_names, output_dtypes, strict=True):
        kind = METAL_TYPE[dtype]
        kind = f"atomic<{kind}>" if body.atomic_outputs else kind
        bind(f"device {kind}* {parameter}", "out", parameter, f"({kind}*)")

    used = [attribute for attribute in ATTRIBUTES if attribute[0] in body.source]
    declared = [f"  {kind} {attribute} [[{attribute}]]" for attribute, kind, _ in used]
    first_output = len(bindings) - len(body.output_names)
    text += "".join(line + ",\n" for line in parameters[:first_output])
    text += _join_like_mlx(parameters[first_output:], first_output, body, bool(used))
    text += ",\n".join(declared) + (") {\n" if used else "")
    text += body.source + "\n}\n"
    call = name + (f"<{', '.join(arguments)}>" if template else "")
    if template:
        text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({call}) {call};\n'
    return Text(text, call, bindings, used)


def _join_like_mlx(outputs: list[str], first: int, body: Body, attributes: bool) -> str:
    """MLX decides on a comma by counting inputs and outputs but not shape parameters."""
    text = ""
    for index, line in enumerate(outputs, start=first + 1):
        more = index < len(body.input_names) + len(body.output_names) or attributes
        text += line + (",\n" if more else ") {\n")
    return text


def _kernel_name(name: str, arguments: list[str], inputs, output_dtypes) -> str:
    result = "custom_kernel_" + name
    if arguments:
        joined = "<" + ", ".join(arguments) + ">"
        result += "_" + joined.replace(", ", "_").replace("<", "_").replace(">", "_")[:-1]
    for shape, dtype in inputs:
        small = "c" if math.prod(shape) < _CONSTANT_BELOW else ""
        result += "_" + METAL_TYPE[dtype] + ("s" if len(shape) == 0 else small)
    return result + "".join("_" + METAL_TYPE[dtype] for dtype in output_dtypes)


def _template_parameter(name: str, value: mx.Dtype | int | bool) -> str:
    if isinstance(value, bool):
        return f"bool {name}"
    return f"int {name}" if isinstance(value, int) else f"typename {name}"


def text_from_mlx(
    body: Body,
    inputs: list[mx.array],
    output_shapes,
    output_dtypes,
    template: Template | None,
) -> str:
    """The text the installed MLX itself would hand to the Metal compiler."""
    kernel = mx.fast.metal_kernel(
        name=body.name,
        input_names=body.input_names,
        output_names=body.output_names,
        source=body.source,
        header=body.header,
        atomic_outputs=body.atomic_outputs,
    )

    def trace(*arrays):
        return kernel(
            inputs=list(arrays),
            template=template,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            verbose=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        captured = Path(folder) / "stdout"
        with _standard_output_to(captured):
            mx.export_function(str(Path(folder) / "traced.mlxfn"), trace, *inputs)
        text = captured.read_text()
    return text.split("```\n", 1)[1].rsplit("\n```", 1)[0]


class _standard_output_to:  # noqa: N801
    """Redirects file descriptor 1, which MLX's C++ prints to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        sys.stdout.flush()
        self.saved = os.dup(1)
        descriptor = os.open(self.path, os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.close(descriptor)

    def __exit__(self, *exc) -> None:
        ctypes.CDLL(None).fflush(None)
        os.dup2(self.saved, 1)
        os.close(self.saved)
