"""One prompt, one reply: the shortest program there is.

python examples/generate.py                      the bundled demo checkpoint and one of its puzzles
python examples/generate.py FOLDER_OR_HUB_ID "Why is the sky blue?"
"""

import sys

from mlx_dgemma import generate, load

path, prompt = [*sys.argv[1:], None, None][:2]
model, tokenizer = load(path)
print(generate(model, tokenizer, prompt or "Reverse the letters CANVAS", seed=1))
