"""So that `python -m mlx_dgemma.benchmark` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
