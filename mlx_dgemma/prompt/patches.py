"""Pictures become patches, exactly as transformers' `Gemma4ImageProcessorPil` makes them.

A picture is resized, its shape kept, to the largest whole number of soft-token squares within a
budget, and cut into patches. Small pictures grow; a budget is a maximum, not what comes out.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.section import Section
from mlx_dgemma.model.vision import ImagePatches
from mlx_dgemma.prompt.pictures import Picture

BUDGETS = (70, 140, 280, 560, 1120)
_SOURCE = "processor_config.json"


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A picture as the network reads it.

    name, width, height: of the picture it was made from. columns, rows: of patches.
    values: uint8 [rows * columns, 3 * patch_size**2], a patch's rows of RGB pixels.
    soft_tokens: placeholders it takes in a prompt.
    """

    name: str
    width: int
    height: int
    columns: int
    rows: int
    values: np.ndarray
    soft_tokens: int

    @property
    def patches(self) -> ImagePatches:
        """Pixels float32 in 0..1, and every patch's column and row."""
        # A table of the 256 products, which the reference computes in float64 one by one.
        scale = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        row, column = np.divmod(np.arange(self.rows * self.columns), self.columns)
        return ImagePatches(scale[self.values], np.stack([column, row], axis=-1))

    @cached_property
    def key(self) -> int:
        """A negative number that pictures share only when the network sees the same in them."""
        digest = hashlib.sha256(f"{self.columns}x{self.rows}".encode())
        digest.update(self.values.tobytes())
        return -1 - (int.from_bytes(digest.digest()[:8], "big") >> 2)


@dataclass(frozen=True)
class ImageProcessor:
    """How one checkpoint cuts pictures.

    patch_size: pixels of a patch's side. pooling: patches of a soft token's side.
    image_tokens, frame_tokens: the default budgets of an image and of a video's frame.
    num_frames: frames sampled of a video. places: patches that a row or column may have.
    """

    patch_size: int
    pooling: int
    places: int
    image_tokens: int = 280
    frame_tokens: int = 70
    num_frames: int = 32

    @classmethod
    def from_config(cls, config: ModelConfig) -> ImageProcessor:
        """Raises CheckpointError when the model has no vision tower, or when its
        processor_config.json asks for something else than the network or this code does."""
        vision = config.vision
        if vision is None:
            raise CheckpointError("This checkpoint has no vision tower, so it cannot read images.")
        whole = Section(config.processor, _SOURCE)
        nested = whole.get("image_processor") is not None
        images = whole.section("image_processor") if nested else whole
        frames = Section(whole.get("video_processor", {}), _SOURCE, "video_processor.")
        for section in (images, frames):
            section.only("patch_size", (vision.patch_size,), vision.patch_size)
            pooling = vision.pooling_kernel_size
            section.only("pooling_kernel_size", (pooling,), pooling)
            section.only("resample", (Image.Resampling.BICUBIC,), Image.Resampling.BICUBIC)
            section.only("do_resize", (True,), True)
            section.only("do_rescale", (True,), True)
            if section.get("do_normalize", False):  # with zero and one it changes nothing
                section.only("image_mean", ([0.0] * 3,), [0.0] * 3)
                section.only("image_std", ([1.0] * 3,), [1.0] * 3)
        default = config.vision_soft_tokens_per_image
        return cls(
            patch_size=vision.patch_size,
            pooling=vision.pooling_kernel_size,
            places=vision.position_embedding_size,
            image_tokens=images.only("max_soft_tokens", BUDGETS, default),
            frame_tokens=frames.only("max_soft_tokens", BUDGETS, 70),
            num_frames=frames.integer("num_frames", 32, maximum=10_000),
        )

    def size(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """(width, height) in pixels to which a picture of this size is brought."""
        if budget not in BUDGETS:
            raise InputError(
                f"{budget} image tokens are not possible: choose {', '.join(map(str, BUDGETS))}."
            )
        side = self.pooling * self.patch_size
        factor = math.sqrt(budget * side**2 / (height * width))
        # In units of `side`; one of the two may round down to nothing on an extreme shape.
        across, down = math.floor(factor * width / side), math.floor(factor * height / side)
        if down == 0:
            across, down = min(width // height, budget), 1
        elif across == 0:
            across, down = 1, min(height // width, budget)
        return across * side, down * side

    def prepare(self, picture: Picture, budget: int | None = None) -> PreparedImage:
        """The picture in at most `budget` soft tokens.

        Raises InputError for another budget than BUDGETS, and for a shape so long that the
        network has no positions for it.
        """
        image, patch = picture.image, self.patch_size
        width, height = self.size(*image.size, budget or self.image_tokens)
        columns, rows = width // patch, height // patch
        if max(columns, rows) > self.places:
            raise InputError(
                f"{picture.name} is too long: it makes {max(columns, rows)} patches in a row, and "
                f"the model has places for {self.places}; crop it or give it fewer image tokens."
            )
        if image.size != (width, height):
            try:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            except (MemoryError, ValueError, OSError) as error:
                raise InputError(
                    f"{picture.name} is too long and narrow to be scaled: crop it."
                ) from error
        pixels = np.asarray(image).reshape(rows, patch, columns, patch, 3)
        return PreparedImage(
            name=picture.name,
            width=picture.image.width,
            height=picture.image.height,
            columns=columns,
            rows=rows,
            values=pixels.swapaxes(1, 2).reshape(rows * columns, 3 * patch * patch),
            soft_tokens=rows * columns // self.pooling**2,
        )
