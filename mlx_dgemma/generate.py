"""So that `python -m mlx_dgemma.generate` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.__main__ import generate

if __name__ == "__main__":
    sys.exit(generate())
