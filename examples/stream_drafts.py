"""Every denoising step of a reply, one line each: watch text appear out of noise.

python examples/stream_drafts.py [FOLDER_OR_HUB_ID] [PROMPT]
"""

import sys

from mlx_dgemma import Commit, Draft, Finish, load, stream_generate

path, prompt = [*sys.argv[1:], None, None][:2]
model, tokenizer = load(path)
prompt = prompt or "List 4 animals in alphabetical order, starting with cat."

for event in stream_generate(model, tokenizer, prompt, drafts=True, seed=1):
    match event:
        case Draft():
            share = event.accepted.mean()
            one_line = event.draft_text.replace("\n", "⏎")[:60]
            print(f"step {event.step:2}  {share:4.0%} accepted  {one_line}")
        case Commit():
            print(f"block {event.block} committed: {event.text!r}")
        case Finish():
            print(f"{event.reason}: {event.tokens_per_forward:.1f} tokens per forward")
