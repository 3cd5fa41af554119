"""So that `python -m mlx_dgemma.decide` and `from mlx_dgemma.decide import decide` work."""

import sys

from mlx_dgemma.decisions import decide

__all__ = ["decide"]

if __name__ == "__main__":
    from mlx_dgemma.__main__ import launch

    sys.exit(launch("decide"))
