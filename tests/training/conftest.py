"""The oracles' checkpoints, as tests/model uses them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
