"""Checks of kernels on this machine: what is not known yet is found out, once, and remembered.

A program's checks run in one child process, since a kernel that hangs or crashes would take its
caller with it; where one does, another child goes on with the next. A frozen app (PyInstaller,
py2app) has no Python to start: its checks run in the app itself, and one that an app twice did not
survive is not tried again. Nothing here is fatal: whatever goes wrong keeps the twin.
"""

import functools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dgemma.kernels import checking, verdicts
from mlx_dgemma.kernels.checking import Findings
from mlx_dgemma.kernels.registry import Operation, Shape
from mlx_dgemma.kernels.verdicts import Verdict

TIMEOUT = 120.0  # seconds for one check, compilation included
STARTING = 120.0  # seconds until the child begins its first
CUT_OFF = "the program ended while it checked this kernel"
CUT_OFF_TWICE = f"{CUT_OFF}, twice"
_log = logging.getLogger("mlx_dgemma.kernels")


class Request(NamedTuple):
    """An operation at a shape."""

    operation: Operation
    shape: Shape

    @property
    def key(self) -> str:
        return verdicts.verdict_key(self.operation, self.shape)


def judged(requests: Sequence[Request], *, again: bool = False) -> list[Verdict]:
    """A verdict per request: the remembered one if it lasts, or that of a check made now.

    again: check even where a verdict is known; a busy machine may have been in the way.
    """
    known = verdicts.remembered()
    found = {
        request.key: known[request.key]
        for request in requests
        if not again and request.key in known and known[request.key].lasting
    }
    new = [request for request in requests if request.key not in found]
    if new:
        _announce(len(new))
        started = time.perf_counter()
        for request, findings in _findings(new):
            verdict = found[request.key] = verdicts.judge(findings)
            verdicts.remember({request.key: verdict})
            if not verdict.enabled:
                _log.info("the %s kernel is off: %s", request.operation.name, verdict.reason)
        won = sum(found[request.key].enabled for request in new)
        _log.warning(
            "%d of %d shapes run as kernels (checked in %.0f s); mlx_dgemma.doctor says why",
            *(won, len(new), time.perf_counter() - started),
        )
    return [found[request.key] for request in requests]


def _announce(count: int) -> None:
    """Say what will be waited for."""
    _log.warning(
        "checking Metal kernels in %d shapes, once on this machine, before they are used; this "
        "takes up to a minute, and MLX_DGEMMA_KERNELS=off does without them",
        count,
    )


def _findings(requests: Sequence[Request]) -> Iterator[tuple[Request, Findings]]:
    return _by_child(requests) if can_start_python() else _in_this_process(requests)


def can_start_python() -> bool:
    """Whether `sys.executable` is Python: in a frozen app it is the app, which must not be started
    a second time."""
    if getattr(sys, "frozen", False) or not sys.executable:
        return False
    return "python" in Path(sys.executable).name.lower()


def _in_this_process(requests: Sequence[Request]) -> Iterator[tuple[Request, Findings]]:
    for request in requests:
        before = verdicts.remembered().get(request.key)
        survived = before is None or before.reason != CUT_OFF
        reason = CUT_OFF if survived else CUT_OFF_TWICE
        mark = Verdict(False, reason, lasting=not survived, when=time.time())
        verdicts.remember({request.key: mark})  # what is found if this is its end
        findings = checking.check(*request)
        mx.clear_cache()
        yield request, findings


def command() -> list[str]:
    """The child's command line."""
    return [sys.executable, "-m", "mlx_dgemma.kernels.probe"]


def _by_child(requests: Sequence[Request]) -> Iterator[tuple[Request, Findings]]:
    """Every request's findings, from as many children as it takes."""
    left = list(requests)
    while left:
        for findings in _answers(tuple(left)):
            yield left.pop(0), findings


def _answers(requests: Sequence[Request]) -> Iterator[Findings]:
    """What one child finds, in order; its last answer may be that it ended within a check."""
    asked = json.dumps([(operation.name, shape) for operation, shape in requests])
    environment = {**os.environ, "MLX_DGEMMA_KERNELS": "off"}
    try:
        child = subprocess.Popen(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    except OSError as error:
        yield from [_cut_off(f"the self-check could not start: {error}")] * len(requests)
        return
    lines, told = queue.SimpleQueue[str | None](), list[str]()
    pipes = (
        threading.Thread(target=_read, args=(child, lines), daemon=True),
        threading.Thread(target=lambda: told.extend(child.stderr or ()), daemon=True),
    )
    for pipe in pipes:
        pipe.start()
    begun, answered = False, 0
    try:
        _ask(child, asked)
        while answered < len(requests):
            line = lines.get(timeout=TIMEOUT if begun else STARTING)
            if line is None:
                child.wait()
                pipes[1].join()
                ended = _ended(child.returncode, told)
                # One that never began would never begin: another child would not either.
                yield from [ended] * (1 if begun else len(requests) - answered)
                return
            answer = _parsed(line)
            begun = begun or "begins" in answer
            if "findings" in answer:
                answered += 1
                yield Findings(**answer["findings"])
    except queue.Empty:
        if begun:
            yield _cut_off(f"the self-check did not finish within {TIMEOUT:g} s")
        else:
            late = _cut_off(f"the self-check did not begin within {STARTING:g} s")
            yield from [late] * len(requests)
    finally:
        child.kill()
        child.wait()


def _ask(child: subprocess.Popen[str], asked: str) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(asked)
        child.stdin.close()
    except BrokenPipeError:
        pass  # it has ended, which its output will say


def _read(child: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def _parsed(line: str) -> dict[str, Any]:
    """A line of the child's answers; empty for what a library writes there."""
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _ended(status: int, told: Sequence[str]) -> Findings:
    """A child ended within a check. MLX ends a process where a kernel does not compile and nobody
    could catch it, so what it said counts too."""
    said = "".join(told)
    if checking.is_refusal(said):
        return Findings(f"it does not compile: {' '.join(said.split())[-300:]}")
    if status < 0:
        return _cut_off(f"the self-check died of signal {-status}")
    lines = said.strip().splitlines() or ["no message"]
    return _cut_off(f"the self-check ended with status {status}: {lines[-1][:300]}")


def _cut_off(reason: str) -> Findings:
    return replace(Findings(reason), lasting=False)


@functools.cache
def first_judged(operation: Operation, shape: tuple[tuple[str, int | str], ...]) -> Verdict:
    """The verdict on one operation, asked for once per process."""
    return judged([Request(operation, dict(shape))])[0]
