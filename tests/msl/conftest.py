"""Makes the emulator importable as `msl`, and the references beside the kernels' tests."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE.parent, HERE.parent / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
