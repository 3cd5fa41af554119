"""Kernel text to a shared library: threadgroup declarations rewritten, compiled by clang, kept on
disk.
"""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from msl import toolchain

# What MLX's metal::utils() puts before every custom kernel.
PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n'
_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-w",
    "-ffp-contract=off",
    *("-Xclang", "-ffloat16-excess-precision=none"),  # half rounds after every operation
    *("-Xclang", "-cl-single-precision-constant"),  # 0.1 is a float in MSL
    *("-mavx2", "-mfma", "-mf16c"),
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-strict-aliasing"),
]
_MODES = {
    # guard pages, divergence and barriers only
    "fast": ["-O2", "-gline-tables-only"],
    # the same with multiplications and additions fused, as a GPU compiler may
    "contract": ["-O2", "-gline-tables-only", "-ffp-contract=fast"],
    # every load and store goes through the runtime's hooks
    "checked": [
        "-DMSLSIM_CHECKED",
        *("-O1", "-gline-tables-only", "-fsanitize=thread"),
        "-fsanitize=bounds,alignment,shift-exponent,integer-divide-by-zero,float-cast-overflow,null",
        *("-fno-sanitize-recover=", "-fsanitize-recover=all"),
        *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
        *("-mllvm", "-tsan-instrument-read-before-write=1"),
        *("-mllvm", "-tsan-instrument-atomics=0"),
    ],
}


class CompileError(RuntimeError):
    """clang refused the kernel."""


@dataclass(frozen=True)
class Library:
    """A loaded kernel: `base` is where it was mapped, to name the source line of an address."""

    handle: ctypes.CDLL
    path: Path
    base: int


_loaded: dict[str, Library] = {}


def library(text: str, entry: str, mode: str, prelude: str = PRELUDE) -> Library:
    """Compile and load a kernel's text with the C++ function `entry` that calls it."""
    key = _hash(text, entry, mode, prelude, _headers_hash(), _runtime().name, _FLAGS, _MODES[mode])
    if key not in _loaded:
        path = toolchain.BUILD / f"{key}.so"
        if not path.exists():
            _compile(path, text, entry, mode, prelude)
        _loaded[key] = _load(path)
    return _loaded[key]


def _compile(path: Path, text: str, entry: str, mode: str, prelude: str) -> None:
    body = re.sub(r"\ntemplate \[\[host_name.*?;\n", "\n", text, flags=re.S)
    source = f'#line 1 "kernel.metal"\n{rewrite_threadgroup(body)}\n'
    source += f'#line 1 "entry"\n{entry}'
    with tempfile.TemporaryDirectory(dir=toolchain.BUILD) as folder:
        cpp, obj, lib = (Path(folder) / f"kernel.{ext}" for ext in ("cpp", "o", "so"))
        cpp.write_text(source)
        header = ["-include-pch", str(_precompiled(prelude, mode))]
        flags = [*_language("c++"), *_FLAGS, *_MODES[mode], *_includes(), *header]
        _run([*toolchain.cxx(), *flags, "-c", str(cpp), "-o", str(obj)])
        link = [*toolchain.cxx(), "-shared", "-o", str(lib), str(obj), str(_runtime()), "-lm"]
        _run([*link, "-Wl,--build-id=none"])
        os.replace(lib, path)


@functools.cache
def _precompiled(prelude: str, mode: str) -> Path:
    """The prelude, parsed once per mode: half of a kernel's compile time."""
    path = (
        toolchain.BUILD
        / f"prelude_{_hash(prelude, _headers_hash(), __file__, _FLAGS, _MODES[mode])}.pch"
    )
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=toolchain.BUILD) as folder:
            pch = Path(folder) / "prelude.pch"
            header = toolchain.BUILD / f"{path.stem}.h"  # stays: clang checks that it is unchanged,
            if not header.exists():  # its time included, also while other processes build the same
                new = Path(folder) / "prelude.h"
                new.write_text(prelude)
                with suppress(FileExistsError):
                    os.link(new, header)
            flags = [*_language("c++-header"), *_FLAGS, *_MODES[mode], *_includes()]
            _run([*toolchain.cxx(), *flags, str(header), "-o", str(pch)])
            os.replace(pch, path)
    return path


def _includes() -> list[str]:
    return ["-I", str(toolchain.INCLUDE), "-I", str(toolchain.mlx_headers())]


def _language(name: str) -> list[str]:
    return ["-x", name]


def _load(path: Path) -> Library:
    handle = ctypes.CDLL(str(path))
    handle.mslsim_alloc.restype = ctypes.c_void_p
    handle.mslsim_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    handle.mslsim_protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with open("/proc/self/maps") as maps:
        base = next(int(m.split("-")[0], 16) for m in maps if m.rstrip().endswith(str(path)))
    return Library(handle, path, base)


@functools.cache
def _runtime() -> Path:
    """The emulator's runtime as an object file."""
    toolchain.BUILD.mkdir(parents=True, exist_ok=True)
    sources = sorted((toolchain.HERE / "runtime").iterdir())
    path = toolchain.BUILD / f"runtime_{_hash(*(s.read_text() for s in sources))}.o"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=toolchain.BUILD) as folder:
            obj = Path(folder) / "runtime.o"
            main = toolchain.HERE / "runtime" / "runtime.cpp"
            _run(
                [
                    *toolchain.cxx(),
                    "-std=c++17",
                    "-O2",
                    "-fPIC",
                    "-g1",
                    "-c",
                    str(main),
                    "-o",
                    str(obj),
                ]
            )
            os.replace(obj, path)
    return path


@functools.cache
def _headers_hash() -> str:
    return _hash(*(p.read_text() for p in sorted(toolchain.INCLUDE.rglob("*")) if p.is_file()))


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, (toolchain.version(), *parts))).encode()).hexdigest()[
        :20
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError("compile failed:\n" + done.stderr[:6000])


_DECLARATOR = re.compile(r"\s*(.*?)\b(\w+)\s*((?:\[[^\]]*\]\s*)*)$", re.S)


def rewrite_threadgroup(source: str) -> str:
    """`threadgroup T a[N], b;` becomes MSLSIM_TG(...) on the same line; pointers are left alone."""
    out, position = [], 0
    for match in re.finditer(r"\bthreadgroup\b(?!_)", source):
        before = source[: match.start()]
        line = before.rsplit("\n", 1)[-1].lstrip()
        behind = before.rstrip()
        if match.start() < position or line.startswith(("//", "#")):
            continue
        if behind and behind[-1] not in ";{}:":
            continue
        end = source.find(";", match.end())
        declaration = source[match.end() : end]
        flat = re.sub(r"\[[^\]]*\]", lambda m: "\1" * len(m.group()), declaration)
        flat = re.sub(r"<[^<>]*>", lambda m: "\0" * len(m.group()), flat)
        if any(character in flat for character in "*&(="):
            continue
        start, kind, macros = 0, None, []
        for part in flat.split(","):
            raw = declaration[start : start + len(part)]
            start += len(part) + 1
            type_text, name, dimensions = _DECLARATOR.match(raw).groups()
            kind = type_text.strip() if kind is None else kind
            macros.append(f"MSLSIM_TG({name}, {dimensions.strip()}, {kind})")
        out.append(source[position : match.start()] + " ".join(macros))
        out.append("\n" * declaration.count("\n"))
        position = end + 1
    return "".join(out) + source[position:]
