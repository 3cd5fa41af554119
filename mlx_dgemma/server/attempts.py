"""How often a reply that must have a form is tried, and with which seeds."""

from __future__ import annotations

from mlx_dgemma.decoding.draws import MAX_SEED
from mlx_dgemma.server.engine import Call

ATTEMPTS = 4  # the first one, and three with new seeds
_STRIDE = 1_000_003  # keeps retries apart from the seeds of other choices


def seed_of(call: Call, attempt: int) -> int:
    seed: int = call.options["seed"]
    return (seed + attempt * _STRIDE) % MAX_SEED
