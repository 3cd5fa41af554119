"""A command that several processes run: rank 0 speaks and decides, the others compute for it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_dgemma.distributed import starting
from mlx_dgemma.errors import DGemmaError

if TYPE_CHECKING:
    from mlx_dgemma.distributed.team import Leader


@contextmanager
def together() -> Iterator[None]:
    """Rank 0 comes through, and a process that is alone; a rank that serves only by its end."""
    try:
        team = None if starting.launched() is None else _joined()
    except DGemmaError as error:
        if "--json" in sys.argv and os.environ.get("MLX_RANK") == "0":
            _print_json(str(error), type(error).__name__)
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if team is None:
        yield
        return
    if "--json" in sys.argv:
        team.announce = _print_json
    try:
        yield
    except RuntimeError as error:
        team.wait_for_verdict(error)
        raise


def _joined() -> Leader | None:
    """Rank 0's team, or None where it is alone; any other rank serves, and ends with it."""
    starting.arrive()
    # Imports MLX, which takes a while: the others know by now that this process is here.
    from mlx_dgemma.checkpoint.serving import serve
    from mlx_dgemma.distributed import joining
    from mlx_dgemma.distributed.team import Follower, Leader

    team = joining.join()
    if isinstance(team, Follower):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when the work ends
        serve(team)
    return team if isinstance(team, Leader) else None


def _print_json(why: str, kind: str = "ResourceError") -> None:
    print(json.dumps({"error": {"type": kind, "message": why}}, ensure_ascii=False))
