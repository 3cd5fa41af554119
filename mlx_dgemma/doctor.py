"""So that `python -m mlx_dgemma.doctor` works."""

import sys

from mlx_dgemma.__main__ import doctor

if __name__ == "__main__":
    sys.exit(doctor())
