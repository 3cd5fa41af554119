"""So that `python -m mlx_dgemma.completion` works."""

import sys

from mlx_dgemma.__main__ import completion

if __name__ == "__main__":
    sys.exit(completion())
