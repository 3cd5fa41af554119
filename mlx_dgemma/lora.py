"""So that `python -m mlx_dgemma.lora` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.__main__ import lora

if __name__ == "__main__":
    sys.exit(lora())
