"""4x4 sudoku: puzzles with one solution, and grids that fit a few clues."""

import itertools
import random
from functools import lru_cache

from mlx_dgemma.demo.tasks.example import Example, ask

BLANK = "_"
_UNITS = (
    [range(4 * row, 4 * row + 4) for row in range(4)]
    + [range(column, 16, 4) for column in range(4)]
    + [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
)


def is_grid(cells: str) -> bool:
    """Whether 16 digits are a valid 4x4 sudoku."""
    return len(cells) == 16 and all(
        sorted(cells[i] for i in unit) == list("1234") for unit in _UNITS
    )


@lru_cache
def all_grids() -> tuple[str, ...]:
    """The 288 valid grids, 16 digits each."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    pairs = [
        top + below
        for top, below in itertools.product(rows, rows)
        if all(len(set(top[i : i + 2] + below[i : i + 2])) == 4 for i in (0, 2))
    ]
    return tuple(grid for grid in map("".join, itertools.product(pairs, pairs)) if is_grid(grid))


def as_rows(cells: str) -> str:
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))


def fits(cells: str, clues: str) -> bool:
    return all(clue in (BLANK, cell) for cell, clue in zip(cells, clues, strict=True))


def _judge(clues: str, text: str) -> bool:
    rows = text.strip().split("\n")
    cells = "".join(rows)
    return [len(row) for row in rows] == [4] * 4 and is_grid(cells) and fits(cells, clues)


def _hide(grid: str, blanks: int, rng: random.Random) -> str:
    hidden = set(rng.sample(range(16), blanks))
    return "".join(BLANK if i in hidden else cell for i, cell in enumerate(grid))


def _solutions(clues: str, limit: int) -> int:
    return sum(
        1 for _ in itertools.islice((grid for grid in all_grids() if fits(grid, clues)), limit)
    )


def _example(task: str, prompt: str, clues: str, grid: str) -> Example:
    messages = ask(f"{prompt}\n{as_rows(clues)}")
    return Example(task, messages, as_rows(grid), lambda text, thought=None: _judge(clues, text))


def sudoku(rng: random.Random) -> Example:
    """5 to 10 blanks and exactly one solution."""
    grid = rng.choice(all_grids())
    while True:
        clues = _hide(grid, rng.randint(5, 10), rng)
        if _solutions(clues, 2) == 1:
            return _example(
                "sudoku", rng.choice(["Solve this sudoku:", "Complete the sudoku:"]), clues, grid
            )


def grid(rng: random.Random) -> Example:
    """A few clues that leave many grids open."""
    cells = rng.choice(all_grids())
    while True:
        clues = _hide(cells, rng.randint(12, 15), rng)
        if _solutions(clues, 4) == 4:
            return _example(
                "grid",
                rng.choice(["Write a sudoku grid like this:", "Make a sudoku from:"]),
                clues,
                cells,
            )
