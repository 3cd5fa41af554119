"""A pass through the layers on its way: when it is sent to the device, and one that has begun."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_dgemma.model.backbone import Layer
from mlx_dgemma.model.canvas_subset import Held

# Layers that `Model.begin` sends. MLX lets its caller go on while ten command buffers wait, which
# these do not fill; with a whole pass the caller would wait until the device is nearly done.
AHEAD = 3


def is_sent(layers: int) -> bool:
    """Whether a pass is sent to the device once so many of its layers are described: 1, then 2, 4
    and 8 more at a time. Describing all thirty takes Python several milliseconds, in which a GPU
    would have nothing to do; many small pieces cost more than they gain."""
    return layers in (1, 3) or layers % 8 == 7


class Begun(NamedTuple):
    """A decoder pass that the device has begun.

    x: [B, C, H], or [B, S, H] of some positions, what leaves its first `layers` layers. held: what
    the pass keeps of the canvases, and computes of them.
    """

    x: mx.array
    layers: int
    held: Held | None = None


@dataclass
class EncoderPass:
    """layers: views that the encoder pass runs instead of the decoder's, where an adapter changes
    the passes differently; None where both run the same."""

    layers: list[Layer] | None = None
