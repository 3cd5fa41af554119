"""So that `python -m mlx_dgemma.models` works."""

import sys

from mlx_dgemma.__main__ import models

if __name__ == "__main__":
    sys.exit(models())
