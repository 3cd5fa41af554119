"""Pictures of one coloured shape, and questions about them."""

from __future__ import annotations

import random

from mlx_dgemma.demo.tasks.example import Example
from mlx_dgemma.demo.tasks.shapes import COLORS, PLACES, SHAPES, Picture


def picture(rng: random.Random) -> Example:
    """What it is, its color, or where it is."""
    seen = Picture(
        shape=rng.choice(SHAPES),
        color=rng.choice(list(COLORS)),
        place=rng.choice(list(PLACES)),
        width=rng.choice([112, 128, 144]),
        height=rng.choice([112, 128, 144]),
        radius=rng.randint(16, 26),
        shift=(rng.randint(-5, 5), rng.randint(-5, 5)),
        background=(rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255)),
    )
    question, answer = rng.choice(
        [
            ("What is in the picture?", f"A {seen.color} {seen.shape} {seen.place}."),
            ("Describe the picture.", f"A {seen.color} {seen.shape} {seen.place}."),
            ("What color is the shape?", seen.color),
            ("Where is the shape?", seen.place),
        ]
    )
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]
    return Example(
        "picture",
        messages,
        answer,
        lambda text, thought=None: text.strip() == answer,
        picture=seen,
    )
