"""What Apple's compiler would refuse, found on Linux.

Three passes: rules on the text, clang's C++ for OpenCL front end (whose rules on address spaces are
Metal's) over declarations of the Metal library, and rules on the syntax tree it prints.
"""

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msl import toolchain
from msl.wrapper import METAL_TYPE, Body, Template, dtype_name, text_for

_WARNINGS_AS_ERRORS = (
    "vla",
    "return-type",
    "uninitialized",
    "conditional-uninitialized",
    "sometimes-uninitialized",
    "bitwise-op-parentheses",
    "dangling",
    "shift-count-overflow",
    "division-by-zero",
    "tautological-compare",
)
_SILENCED = ("unknown-attributes", "ignored-attributes", "unused-value", "duplicate-decl-specifier")
_EXTENSIONS = (
    "+cl_khr_fp16,-__opencl_c_generic_address_space,-cl_khr_fp64,-__opencl_c_fp64,"
    "-__opencl_c_program_scope_global_variables"
)
_FLAGS = [
    "--target=x86_64-linux-gnu",
    *("-x", "cl", "-cl-std=clc++2021", f"-cl-ext={_EXTENSIONS}"),
    *("-cl-single-precision-constant", "-cl-no-stdinc"),
    "-Wpre-c++17-compat",
    *(f"-Werror={name}" for name in _WARNINGS_AS_ERRORS),
    *(f"-Wno-{name}" for name in _SILENCED),
    "-ferror-limit=30",
    "-fsyntax-only",
]
_ADDRESS_SPACE = re.compile(r"\b(device|constant|threadgroup|thread|threadgroup_imageblock)\b")
_TEXT_RULES = [
    (r"\bstd\s*::", "std:: does not exist in MSL"),
    (r"\bdouble\b", "double is not supported in Metal"),
    (r"\blong\s+long\b", "'long long' is not supported in Metal"),
    (r"\bgoto\b", "goto is not supported in Metal"),
    (r"\b(?:try|catch|throw)\b", "exceptions are not supported in Metal"),
    (r"\b(?:typeid|dynamic_cast)\b", "RTTI is not supported in Metal"),
    (r"\b(?:malloc|free|printf|memcpy|memset|assert)\s*\(", "C library call"),
    (r"\bthread_local\b|\bregister\b", "storage class not supported in Metal"),
    (r"#\s*include\s*<(?!metal_)", "only <metal_*> headers exist"),
    (r"\bvirtual\b", "virtual functions are not supported in Metal"),
    (r"\b(?:new|delete)\b", "new and delete are not supported in Metal"),
    (
        r"\[\s*[&=]?[^\]\[]*\]\s*\([^()]*\)\s*(?:->\s*\w+\s*)?\{",
        "lambda: needs Metal 3.2, and MLX compiles as 3.1 on macOS 14",
    ),
    (r"\b__(?:builtin|attribute)\w*", "compiler builtin: not portable to Apple's compiler"),
    (
        r"\bmemory_order_(?:acquire|release|acq_rel|seq_cst|consume)\b",
        "atomics before MSL 3.2 are relaxed only",
    ),
    (r"\basm\b", "inline assembly"),
    (r"\d(?:bf|BF)\b", "bf literal suffix: not in the emulator's subset"),
]


@dataclass(frozen=True, order=True)
class Finding:
    """`part` is "header" or "source"; lines count from 1 in that part, 0 where there is none."""

    part: str
    line: int
    message: str


def lint(
    body: Body,
    inputs: list[tuple[tuple[int, ...], str]],
    output_dtypes: list[str],
    template: Template | None = None,
) -> list[Finding]:
    """Everything wrong with a kernel for inputs of these (shape, dtype name)."""
    found = set(_text_findings(body, inputs))
    found |= set(_clang_findings(body, inputs, output_dtypes, template, bool(found)))
    return sorted(found)


def without_comments(source: str) -> str:
    """Comments and strings blanked; offsets and line numbers stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), source, flags=re.S)


def _text_findings(body: Body, inputs) -> Iterator[Finding]:
    for part, text in (("header", body.header), ("source", body.source)):
        if not text.isascii():
            yield Finding(part, 0, "non-ASCII character: MLX passes the source as an ASCII string")
        clean = without_comments(text)
        for pattern, message in _TEXT_RULES:
            for match in re.finditer(pattern, clean):
                yield Finding(part, clean.count("\n", 0, match.start()) + 1, message)
    clean = without_comments(body.source)
    for name, (shape, _) in zip(body.input_names, inputs, strict=True):
        for suffix in ("_shape", "_strides", "_ndim"):
            used = re.search(rf"\b{name}{suffix}\b", clean)
            if name + suffix in body.source and not used:
                message = f"'{name}{suffix}' only in a longer name or a comment: MLX still adds it"
                yield Finding("source", 0, message)
        small = math.prod(shape) < 8
        if small and re.search(rf"\bdevice\b[^;=]*=\s*[^;]*\b{name}\b", clean):
            message = f"'{name}' has fewer than 8 elements and so is `constant`, bound as device"
            yield Finding("source", 0, message)


def _clang_findings(
    body: Body, inputs, output_dtypes, template: Template | None, flawed: bool
) -> Iterator[Finding]:
    plain = Body(body.name, body.input_names, body.output_names, body.source, "", False)
    text = text_for(plain, inputs, output_dtypes, None).text
    for name, value in template or []:
        if isinstance(value, (bool, int)):
            text = f"enum {{ {name} = {int(value)} }}; {text}"
        else:
            text = f"typedef {METAL_TYPE[dtype_name(value)]} {name}; {text}"
    signature = text[: text.index(body.source)].count("\n")  # no rewriting adds a line
    text = text.replace("[[kernel]] void", "__kernel void")
    for space in ("const device", "const constant", "device"):
        text = text.replace(f"{space} bool*", f"{space} uchar*")  # no bool buffers in OpenCL
    text, header = (
        re.sub(r"(?:\bmetal::)?\bvec<([^<>]+)>\s*\(", r"metal::mk<vec<\1>>(", part)
        for part in (text, body.header)
    )
    header_lines = header.count("\n") + 1
    full = header + "\n" + text

    def at(line: int, message: str) -> Finding:
        if line <= header_lines:
            return Finding("header", line, message)
        return Finding("source", line - header_lines - signature, message)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.metal"
        path.write_text(full)
        declarations = str(toolchain.HERE / "include_lint")
        command = [*toolchain.clang(), *_FLAGS, "-I", declarations, "-include", "msllint.h"]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True)
        found = [at(line, message) for line, message in _diagnostics(done.stderr)]
        yield from found
        if done.returncode and not found and not flawed:
            yield Finding("?", 0, done.stderr[:500])
        if done.returncode == 0:
            tree = subprocess.run(
                [*command, "-Xclang", "-ast-dump=json", str(path)], capture_output=True, text=True
            )
            for offset, message in _Tree(full).findings(json.loads(tree.stdout)):
                yield at(full.count("\n", 0, offset) + 1, message)


def _diagnostics(stderr: str) -> Iterator[tuple[int, str]]:
    for match in re.finditer(r"kernel\.metal:(\d+):\d+: (?:fatal )?error: (.*)", stderr):
        yield int(match.group(1)), "clang: " + match.group(2)
    later = r"kernel\.metal:(\d+):\d+: warning: (.*) \[-Wpre-c\+\+17-compat\]"
    for match in re.finditer(later, stderr):
        # `if constexpr` is used by MLX's own kernels: Apple's compiler takes it
        if not re.search("constexpr if|decomposition", match.group(2)):
            yield int(match.group(1)), "C++17 feature; MSL 3 is C++14: " + match.group(2)
    for match in re.finditer(r"msllint\.h:\d+:\d+: error: (.*)", stderr):
        user = re.search(r"kernel\.metal:(\d+):\d+: note: in instantiation", stderr[match.end() :])
        yield int(user.group(1)) if user else 1, "clang: " + match.group(1)


class _Tree:
    """Rules clang does not enforce: explicit address spaces, no recursion, no static locals."""

    def __init__(self, text: str) -> None:
        self.clean = without_comments(text)
        self.found: list[tuple[int, str]] = []
        self.calls: dict[str, set[str]] = {}
        self.names: dict[str, tuple[str, int]] = {}

    def findings(self, unit: dict) -> list[tuple[int, str]]:
        for child in unit.get("inner", []):
            self._walk(child, None)
        for function, (name, offset) in self.names.items():
            if self._reaches_itself(function):
                self.found.append((offset, f"recursion through '{name}'"))
        return self.found

    def _walk(self, node: dict, function: str | None) -> None:
        kind, offset = node.get("kind"), _offset(node.get("loc", {}))
        if kind in ("FunctionDecl", "CXXMethodDecl") and offset is not None:
            function = node["id"]
            self.names[function] = (node.get("name"), offset)
            self.calls.setdefault(function, set())
        declares = kind in ("ParmVarDecl", "VarDecl", "FieldDecl") and not node.get("isImplicit")
        if declares and offset is not None:
            self._declaration(node, kind, offset, function)
        if function:
            if kind == "DeclRefExpr" and node.get("referencedDecl", {}).get("kind") in (
                "FunctionDecl",
                "CXXMethodDecl",
            ):
                self.calls[function].add(node["referencedDecl"]["id"])
            if kind == "MemberExpr" and node.get("referencedMemberDecl"):
                self.calls[function].add(node["referencedMemberDecl"])
        for child in node.get("inner", []):
            if isinstance(child, dict):
                self._walk(child, function)

    def _declaration(self, node: dict, kind: str, offset: int, function: str | None) -> None:
        name, qualified = node.get("name", ""), node["type"]["qualType"]
        begin, end = _offset(node["range"]["begin"]), _offset(node["range"]["end"])
        if begin is None or end is None or self.clean[offset : offset + len(name)] != name:
            return
        # back to the delimiter: `thread` is an empty macro here, so clang's range begins behind it
        begin = max(self.clean.rfind(delimiter, 0, begin) for delimiter in "(,;{}") + 1
        spelled = self.clean[begin:offset]
        behind = self.clean[offset:].split(";")[0].split(",")[0]
        array_parameter = kind == "ParmVarDecl" and re.match(r"\w+\s*\[(?!\[)", behind)
        pointer = "*" in spelled or "&" in spelled or array_parameter
        explicit = _ADDRESS_SPACE.search(spelled) or re.search(
            r"__(global|local|constant)", qualified
        )
        if pointer and not explicit and "auto" not in spelled and "(" not in spelled:
            self.found.append((offset, f"pointer or reference '{name}' without an address space"))
        if kind != "VarDecl":
            return
        constant = re.search(r"__constant|\bconstant\b", qualified + spelled)
        if function is None and not constant and "*" not in spelled:
            self.found.append((offset, "program scope variable must be in constant address space"))
        if function and node.get("storageClass") == "static" and "const" not in spelled:
            self.found.append((offset, "static local variable"))

    def _reaches_itself(self, function: str) -> bool:
        seen, open_ = set(), list(self.calls[function])
        while open_:
            called = open_.pop()
            if called == function:
                return True
            if called not in seen and called in self.calls:
                seen.add(called)
                open_ += self.calls[called]
        return False


def _offset(location: dict) -> int | None:
    location = location.get("expansionLoc", location)
    return None if "includedFrom" in location else location.get("offset")
