"""The oracles' checkpoints, as tests/model uses them; a stub of the Hub."""

import sys
from pathlib import Path

from tests.checkpoint.conftest import hub

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

__all__ = ["hub"]
