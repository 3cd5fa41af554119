"""Which process MLX belongs to: its threads and its GPU queue do not survive a fork."""

from __future__ import annotations

import os

from mlx_dgemma.errors import InputError

_owner: int | None = None


def claim_process() -> None:
    """Notes that this process computes; InputError in one that was forked from such a process.

    There, whatever MLX is asked to compute would wait for ever for threads that are not there.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    elif _owner != os.getpid():
        raise InputError(
            "This process was forked from one that had loaded a model, where MLX cannot go on: "
            "start processes with multiprocessing.set_start_method('spawn'), or load the model "
            "in the new process alone."
        )
