"""A picture of one coloured shape, as a record and as pixels."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

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
