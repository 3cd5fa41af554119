"""So that `python -m mlx_dgemma.chat` works, as mlx-lm's users expect."""

import sys

from mlx_dgemma.__main__ import chat

if __name__ == "__main__":
    sys.exit(chat())
