"""Elementwise chains as one launch, where the backend can: the twins' only use of mx.compile."""

import functools
import shutil
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

from mlx_dgemma.kernels.gradients import on_cpu, wanted

Arrays = TypeVar("Arrays", mx.array, tuple[mx.array, mx.array])


def fused(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Run an elementwise function through mx.compile, for any shape.

    MLX's CPU backend compiles by calling a C++ compiler; without one the plain function runs, with
    the same values. So it does for gradients (see `gradients`).
    """
    compiled: Callable[..., Arrays] = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def call(*arrays: mx.array) -> Arrays:
        return compiled(*arrays) if not wanted() and _can_compile() else function(*arrays)

    return call


@functools.cache
def _can_compile() -> bool:
    return not on_cpu() or shutil.which("g++") is not None
