"""Where a test may be skipped when an oracle is missing; how property tests draw."""

from __future__ import annotations

import importlib
import os

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure. CI draws the same examples every time; a run by hand, new ones.
settings.register_profile(
    "project",
    deadline=None,
    derandomize=os.environ.get("CI") is not None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("project")

# Else MLX multiplies float32 in TF32 on an M5, and what is compared in float32 would not agree.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# One thread for PyTorch: of two, one waits in a loop for the other, which other processes hold up;
# small networks took ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What tests compare with or drive; all of it comes with the dev extra.
ORACLES = ("torch", "transformers", "mlx_vlm", "peft", "av", "pydantic_ai", "playwright", "lm_eval")


def pytest_sessionstart() -> None:
    """With REQUIRE_ORACLES=1 (`.ci/run` sets it) an oracle that cannot be imported ends the run.

    Elsewhere its tests are skipped, and say why.
    """
    if os.environ.get("REQUIRE_ORACLES") != "1":
        return
    for name in ORACLES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken install raises anything
            raise pytest.UsageError(
                f"{name} cannot be imported ({error}), and REQUIRE_ORACLES=1 forbids skipping what "
                "it is needed for: pip install -e '.[dev,server,clients]'"
            ) from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
