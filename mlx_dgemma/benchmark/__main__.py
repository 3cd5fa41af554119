"""So that `python -m mlx_dgemma.benchmark` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.__main__ import benchmark

if __name__ == "__main__":
    sys.exit(benchmark())
