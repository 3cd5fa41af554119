"""So that `python -m mlx_dgemma.convert` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.__main__ import convert

if __name__ == "__main__":
    sys.exit(convert())
