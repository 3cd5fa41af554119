"""The demo model's tasks: prompts drawn from seeds, each with a judge of the answer."""

from mlx_dgemma.demo.tasks import grids, letters, pictures, tools, words
from mlx_dgemma.demo.tasks.example import Example, Task, is_held_out
from mlx_dgemma.demo.tasks.fillings import InfillExample, Segment, infill_examples

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("reverse", False, letters.reverse),
        Task("sort", False, letters.sort),
        Task("count", False, letters.count),
        Task("repeat", False, letters.repeat),
        Task("sudoku", False, grids.sudoku),
        Task("tool", False, tools.tool),
        Task("think", False, letters.first_letter),
        Task("grid", True, grids.grid),
        Task("list", True, words.word_list),
        Task("sentence", True, words.sentence),
        Task("json", True, words.json_record),
    )
}

PICTURE = Task("picture", False, pictures.picture)  # its examples have a picture to be drawn


def held_out(name: str, n: int, seed: int = 0) -> list[Example]:
    """n examples of a task whose prompts were never trained on."""
    return (PICTURE if name == PICTURE.name else TASKS[name]).held_out(n, seed)


__all__ = [
    "PICTURE",
    "TASKS",
    "Example",
    "InfillExample",
    "Segment",
    "Task",
    "held_out",
    "infill_examples",
    "is_held_out",
]
