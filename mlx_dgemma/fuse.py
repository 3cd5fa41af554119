"""So that `python -m mlx_dgemma.fuse` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.__main__ import fuse

if __name__ == "__main__":
    sys.exit(fuse())
