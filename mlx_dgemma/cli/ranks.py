"""A command that several processes run: rank 0 speaks and decides, the others compute for it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_dgemma.checkpoint.serving import serve
from mlx_dgemma.distributed import joining, starting
from mlx_dgemma.distributed.team import Follower, Leader
from mlx_dgemma.errors import DGemmaError


@contextmanager
def together() -> Iterator[None]:
    """Rank 0 comes through, and a process that is alone; a rank that serves only by its end."""
    if not starting.launched():
        yield
        return
    try:
        team = joining.join()
    except DGemmaError as error:
        if "--json" in sys.argv and os.environ.get("MLX_RANK") == "0":
            _print_json(str(error), type(error).__name__)
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if isinstance(team, Follower):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when the work ends
        serve(team)
    if isinstance(team, Leader) and "--json" in sys.argv:
        team.announce = _print_json
    try:
        yield
    except RuntimeError as error:
        if isinstance(team, Leader):
            team.wait_for_verdict(error)
        raise
    finally:
        joining.leave()


def _print_json(why: str, kind: str = "ResourceError") -> None:
    print(json.dumps({"error": {"type": kind, "message": why}}, ensure_ascii=False))
