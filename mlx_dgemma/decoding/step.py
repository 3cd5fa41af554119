"""What one denoising step did, while it is still on the device."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.draws import Place


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch; draft, accepted and entropy are computed, others when read.

    rows: which rows of the batch are still being denoised, one line of every array each, and one
    place, whose step counts up from 1. canvas int32 [b, C] is what the step was given; draft int32
    [b, C] the argmax; sample int32 [b, C]; accepted bool [b, C]; entropy float32 [b, C], nats.
    computed: bool [b, C], on the host: the positions that the step computed; the others are as they
    were last computed.
    """

    places: tuple[Place, ...]
    rows: tuple[int, ...]
    canvas: mx.array
    draft: mx.array
    sample: mx.array
    accepted: mx.array
    entropy: mx.array
    computed: np.ndarray
