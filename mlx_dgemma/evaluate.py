"""So that `python -m mlx_dgemma.evaluate` works."""

import sys

from mlx_dgemma.__main__ import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
