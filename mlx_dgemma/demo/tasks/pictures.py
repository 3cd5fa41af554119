"""Pictures of one coloured shape, and questions about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mlx_dgemma.demo.tasks.example import Example

SHAPES = ["circle", "square", "triangle"]
COLORS = {
    "red": (208, 32, 32),
    "green": (32, 144, 48),
    "blue": (40, 72, 208),
    "yellow": (232, 200, 24),
    "purple": (136, 40, 168),
    "black": (24, 24, 24),
}
PLACES = {
    "at the top left": (0.25, 0.25),
    "at the top right": (0.75, 0.25),
    "in the center": (0.5, 0.5),
    "at the bottom left": (0.25, 0.75),
    "at the bottom right": (0.75, 0.75),
}


@dataclass(frozen=True)
class Picture:
    """One shape on a light ground; lengths in pixels, `background` is RGB."""

    shape: str
    color: str
    place: str
    width: int = 128
    height: int = 128
    radius: int = 22
    shift: tuple[int, int] = (0, 0)
    background: tuple[int, int, int] = (255, 255, 255)

    def draw(self) -> Image.Image:
        image = Image.new("RGB", (self.width, self.height), self.background)
        across, down = PLACES[self.place]
        x, y = across * self.width + self.shift[0], down * self.height + self.shift[1]
        r, pen, color = self.radius, ImageDraw.Draw(image), COLORS[self.color]
        if self.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        elif self.shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=color)
        else:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color)
        return image


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
