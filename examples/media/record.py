"""Draws the README's picture: one reply's canvas at several of its steps, from a real run.

python examples/media/record.py [--model FOLDER] [--task sentence] [--seed 9] [--frames 5]
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mlx_dgemma import Commit, Draft, load, stream_generate
from mlx_dgemma.cli.draft_view import Pieces, bars, paint
from mlx_dgemma.demo.tasks import held_out

WIDTH = 64
CELL = 12.2  # the width of a character in rich's SVG
OUTPUT = Path(__file__).with_name("canvas.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--task", default="sentence")
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()

    model, tokenizer = load(asked.model)
    (example,) = held_out(asked.task, 1, asked.seed)
    drafts: list[Draft] = []
    answer = ""
    for event in stream_generate(model, tokenizer, example.messages, drafts=True, seed=asked.seed):
        if isinstance(event, Draft):
            drafts.append(event)
        elif isinstance(event, Commit):
            answer += event.text

    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(Text(example.messages[-1]["content"], "bold"))
    pieces = Pieces(tokenizer.decode, tokenizer.control_ids)
    for draft in chosen(drafts, asked.frames):
        console.print(Text(f"\nstep {draft.step}", "dim"))
        console.print(paint(draft, pieces, tokenizer.stop_ids))
        console.print(bars(draft, WIDTH))
    console.print(Text("\ncommitted", "dim"))
    console.print(answer)
    right = example.verify(answer)
    title = f"mlx_dgemma.generate --demo {asked.task} --seed {asked.seed}"
    asked.output.write_text(tidy(console.export_svg(title=title, unique_id="canvas")) + "\n")
    print(f"{asked.output}: {len(drafts)} steps, {'a right' if right else 'not a right'} answer")


def tidy(svg: str) -> str:
    """Without fonts from the network, and without leading spaces, which some viewers misplace."""
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    cell = r'x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"([^>]*)>((?:&#160;)+)'

    def moved(found: re.Match[str]) -> str:
        spaces = len(found[5]) // len("&#160;")
        x, length = float(found[1]) + spaces * CELL, float(found[3]) - spaces * CELL
        return f'x="{x:g}" y="{found[2]}" textLength="{length:g}"{found[4]}>'

    return re.sub(cell, moved, svg)


def chosen(drafts: list[Draft], frames: int) -> list[Draft]:
    """The first, the last and evenly spaced drafts between them."""
    last = len(drafts) - 1
    places = sorted({round(i * last / max(frames - 1, 1)) for i in range(frames)})
    return [drafts[place] for place in places]


if __name__ == "__main__":
    main()
