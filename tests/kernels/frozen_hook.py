"""Runs in the bundled app before its own code, for test_frozen.py: it counts the app's starts, lets
it believe in a GPU, and says at its end what the app was and what it found out about kernels."""

import atexit
import json
import os
import sys
import time


def tell() -> None:
    from mlx_dgemma.kernels import self_checks, verdicts

    told = {
        "frozen": bool(sys.frozen),
        "can_start_python": self_checks.can_start_python(),
        "package": sys.modules["mlx_dgemma"].__file__,
        "verdicts": {key: found.reason for key, found in verdicts.remembered().items()},
    }
    with open(os.environ["TOLD"], "w") as file:
        json.dump(told, file)


with open(os.environ["STARTS"], "a") as file:  # before anything that may start it again
    file.write(f"started {time.time():.0f}\n")

from mlx_dgemma.kernels import dispatch  # noqa: E402

dispatch.available = lambda: True
atexit.register(tell)
