"""So that `python -m mlx_dgemma.server` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.__main__ import server

if __name__ == "__main__":
    sys.exit(server())
