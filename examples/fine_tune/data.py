"""Writes a small data set for `mlx_dgemma.lora`: a task that the demo model does not know.

python examples/fine_tune/data.py DATA
"""

import json
import random
import string
import sys
from pathlib import Path

SPLITS = {"train": 500, "valid": 40, "test": 100}


def conversation(rng: random.Random) -> dict:
    """Every letter twice."""
    word = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 6)))
    return {
        "messages": [
            {"role": "user", "content": f"Double the letters {word}"},
            {"role": "assistant", "content": "".join(2 * letter for letter in word)},
        ]
    }


def main(folder: Path) -> None:
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(dict.fromkeys(json.dumps(conversation(rng)) for _ in range(1000)))
    for split, count in SPLITS.items():
        taken, lines = lines[:count], lines[count:]
        (folder / f"{split}.jsonl").write_text("\n".join(taken) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
