"""One launch in the runtime: buffers between guard pages, a schedule, and what the checks
reported.
"""

import ctypes as C
import re
import time
from dataclasses import dataclass, field

import numpy as np

from msl.build import Library
from msl.source_lines import source_line

KINDS = {
    1: "out-of-bounds",
    2: "race-threadgroup",
    3: "race-device",
    4: "uninit-threadgroup",
    5: "uninit-device",
    6: "simd-divergence",
    7: "barrier",
    8: "undefined-behaviour",
    9: "memory-fault",
    10: "timeout",
    11: "simd-lane",
    12: "limit",
    13: "unwritten-output",
    14: "write-to-input",
}
# Orders in which threads, SIMD-groups and threadgroups may legally run.
SCHEDULES = {"in order": 0, "random": 1, "reversed": 2, "greedy": 3, "greedy random": 4}
_MAX_REPORTS = 12


@dataclass(frozen=True)
class Issue:
    """One thing a kernel did wrong, with the lines of its source that did it."""

    kind: str
    message: str
    where: list[str]
    line: int = 0

    def __str__(self) -> str:
        return f"[{self.kind}] {self.message}" + "".join(f"\n      at {w}" for w in self.where)


class KernelError(RuntimeError):
    """A launch broke a rule; `kinds` names which."""

    def __init__(self, issues: list[Issue]) -> None:
        self.issues = issues
        super().__init__("\n".join(map(str, issues)))

    @property
    def kinds(self) -> set[str]:
        return {issue.kind for issue in self.issues}


@dataclass
class Buffer:
    """Bytes of one argument; an output's are written back here."""

    name: str
    data: np.ndarray
    element: int
    output: bool = False
    initialised: bool = False


@dataclass(frozen=True)
class Options:
    """How to run: the schedule and what a GPU may do differently from IEEE arithmetic in order."""

    schedule: str = "random"
    seed: int = 0
    checked: bool = True
    strict: bool = True  # SIMD operations under divergent control flow are refused
    flush_denormals: bool = True
    reduction_order: int = 0  # of simd_sum and friends: 0 butterfly, 1 ascending, 2 descending
    jitter: int = 0  # +- this many ulp on transcendental functions
    timeout: int = 60  # seconds of processor time
    misalign: bool = False  # buffers aligned to their element only


@dataclass
class Result:
    issues: list[Issue]
    seconds: float
    accesses: int
    threadgroup_bytes: int
    notes: dict[str, int] = field(default_factory=dict)


class _Report(C.Structure):
    _fields_ = [
        ("kind", C.c_int),
        ("buf", C.c_int),
        ("off", C.c_int64),
        ("size", C.c_int),
        ("t1", C.c_int),
        ("t2", C.c_int),
        ("g1", C.c_uint32),
        ("g2", C.c_uint32),
        ("pc1", C.c_uint64),
        ("pc2", C.c_uint64),
        ("line", C.c_int),
        ("col", C.c_int),
        ("msg", C.c_char * 160),
    ]


class _Launch(C.Structure):
    _fields_ = [
        ("grid", C.c_uint32 * 3),
        ("tg", C.c_uint32 * 3),
        ("nbuf", C.c_int),
        ("bufs", C.POINTER(C.c_void_p)),
        ("sizes", C.POINTER(C.c_uint64)),
        ("flags", C.POINTER(C.c_int)),
        ("seed", C.c_uint64),
        ("shuffle", C.c_int),
        ("strict", C.c_int),
        ("ftz", C.c_int),
        ("order", C.c_int),
        ("jitter", C.c_int),
        ("timeout_s", C.c_int),
        ("max_reports", C.c_int),
        ("reports", C.POINTER(_Report)),
        ("nreports", C.c_int),
        ("base", C.c_uint64),
        ("n_switch", C.c_uint64),
        ("n_threads", C.c_uint64),
        ("n_access", C.c_uint64),
        ("tg_bytes", C.c_uint32),
        ("unwritten", C.c_int64 * 32),
        ("same_value", C.c_uint64),
    ]


def launch(
    library: Library,
    buffers: list[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    options: Options,
) -> Result:
    """Run every thread of the grid; raises nothing, the issues are in the result."""
    handle, count = library.handle, len(buffers)
    pointers, sizes, flags = (C.c_void_p * count)(), (C.c_uint64 * count)(), (C.c_int * count)()
    for index, buffer in enumerate(buffers):
        size = buffer.data.nbytes
        pointers[index] = handle.mslsim_alloc(size, buffer.element if options.misalign else 16)
        sizes[index] = size
        flags[index] = buffer.output | buffer.initialised << 1 | (not options.checked) << 3
        C.memmove(pointers[index], buffer.data.ctypes.data, size)
        if buffer.output and not buffer.initialised:
            C.memset(pointers[index], 0xFF, size)  # NaN, -1
        if not buffer.output and size:
            handle.mslsim_protect(pointers[index], size)
    reports = (_Report * _MAX_REPORTS)()
    state = _Launch(
        nbuf=count,
        bufs=pointers,
        sizes=sizes,
        flags=flags,
        seed=options.seed + 1,
        shuffle=SCHEDULES[options.schedule],
        strict=options.strict,
        ftz=options.flush_denormals,
        order=options.reduction_order,
        jitter=options.jitter,
        timeout_s=options.timeout,
        max_reports=_MAX_REPORTS,
        reports=reports,
        base=library.base,
    )
    state.grid[:], state.tg[:] = grid, threadgroup
    started = time.perf_counter()
    handle.mslsim_launch(C.byref(state))
    seconds = time.perf_counter() - started
    for index, buffer in enumerate(buffers):
        if buffer.output:
            C.memmove(buffer.data.ctypes.data, pointers[index], buffer.data.nbytes)
    handle.mslsim_free_all()
    issues = _issues(library, list(reports[: state.nreports]), buffers)
    if not issues:
        issues = [
            Issue("unwritten-output", f"'{b.name}': {n} of {b.data.nbytes} bytes never written", [])
            for b, n in zip(buffers, state.unwritten, strict=False)
            if b.output and not b.initialised and n > 0
        ]
    notes = {"switches": state.n_switch, "same value writes": state.same_value}
    return Result(issues, seconds, state.n_access, state.tg_bytes, notes)


def _issues(library: Library, reports: list[_Report], buffers: list[Buffer]) -> list[Issue]:
    base, issues = library.base, []
    lines = {
        pc: source_line(library.path, pc - base - 1)
        for r in reports
        for pc in (r.pc1, r.pc2)
        if pc > base
    }
    for report in reports:
        message = re.sub(
            r"'#(\d+)'",
            lambda m: f"'{buffers[int(m.group(1))].name}'",
            report.msg.decode(errors="replace"),
        )
        where = [f"kernel.metal:{report.line}"] if report.line else []
        for pc, thread, group in (
            (report.pc1, report.t1, report.g1),
            (report.pc2, report.t2, report.g2),
        ):
            if pc > base:
                where.append(f"{lines[pc]} (thread {thread}, threadgroup {group - 1})")
        issues.append(Issue(KINDS[report.kind], message, where, report.line))
    return issues
