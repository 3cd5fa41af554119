"""So that `python -m mlx_dgemma.infill` works."""

import sys

from mlx_dgemma.__main__ import infill

if __name__ == "__main__":
    sys.exit(infill())
