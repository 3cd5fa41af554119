"""So that `python -m mlx_dgemma.infill` and `from mlx_dgemma.infill import infill` work."""

import sys

from mlx_dgemma.infilling import edit, infill, refine, regenerate

__all__ = ["edit", "infill", "refine", "regenerate"]

if __name__ == "__main__":
    from mlx_dgemma.__main__ import launch

    sys.exit(launch("infill"))
