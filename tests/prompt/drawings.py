"""Pictures for tests, drawn from a seed."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageDraw


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shades with fine noise, as a camera's sensor gives."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    noisy = smooth + rng.normal(0, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def screenshot(width: int, height: int) -> Image.Image:
    """Flat areas, hard edges and letters."""
    image = Image.new("RGB", (width, height), (250, 250, 252))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, width, height // 12), fill=(32, 90, 180))
    for line in range(height // 8, height, 14):
        pen.text((9, line), "the quick brown fox 0123456789 " * 4, fill=(20, 20, 20))
    return image


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The file's bytes."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def animation(count: int = 5, form: str = "GIF", duration: object = 100) -> bytes:
    """Frames of one shade each: frame i is 40 * i grey, 24x16 pixels."""
    frames = [Image.new("RGB", (24, 16), (40 * i,) * 3) for i in range(count)]
    options = {"lossless": True} if form == "WEBP" else {}
    return saved(
        frames[0], form, save_all=True, append_images=frames[1:], duration=duration, **options
    )


def gif(frames: int, between: bytes = b"", size: tuple[int, int] = (1, 1)) -> bytes:
    """A GIF of frames of one pixel each, with something between them."""
    head = b"GIF89a" + struct.pack("<HHBBB", *size, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + (between + frame) * frames + b";"
