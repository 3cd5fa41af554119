"""An app as somebody bundles it: it counts its starts, believes in a GPU, and answers once."""

import json
import os
import sys


def main() -> None:
    from mlx_dgemma import generate, load
    from mlx_dgemma.kernels import dispatch, self_checks, verdicts

    dispatch.available = lambda: True
    model, tokenizer = load()
    reply = generate(model, tokenizer, "Count from 3 to 9.", seed=1)
    told = {
        "reply": reply,
        "frozen": bool(sys.frozen),
        "can_start_python": self_checks.can_start_python(),
        "verdicts": {key: found.reason for key, found in verdicts.remembered().items()},
    }
    print(json.dumps(told))


with open(os.environ["STARTS"], "a") as file:  # before anything that may start it again
    file.write("started\n")
main()
