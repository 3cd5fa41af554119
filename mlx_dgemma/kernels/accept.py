"""Accept and renoise: from the entropies of a canvas to the next canvas, with nothing for the host
to wait on.

The lowest entropies are accepted while the sum of those below stays within the entropy bound;
accepted positions take their sample, all others a fresh uniform id. The choice is made again at
every step. Pinned positions keep their id and take no part in the choice, the draft comparison or
the mean.

The only thing the host needs is one row of three numbers per canvas: does the draft equal the
previous one, the mean entropy, is everything finite.

Metal kernels: checked by emulation on Linux; not yet run on Apple hardware.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_dgemma.kernels import dispatch, registry

_LAST = 3e38  # sorts after every real entropy and, unlike Inf, survives arithmetic


class Accepted(NamedTuple):
    """The next canvas and what the stop test reads."""

    canvas: mx.array  # [B, C] int32
    accepted: mx.array  # [B, C] bool; never true at a pinned position
    # [B, 3] float32: draft equals the previous one (0 or 1), mean entropy (nats), finite (0 or 1)
    status: mx.array


def accept_renoise(
    canvas: mx.array,
    entropy: mx.array,
    draft: mx.array,
    sample: mx.array,
    fresh: mx.array,
    previous_draft: mx.array | None,
    entropy_bound: float,
    *,
    pinned: mx.array | None = None,
) -> Accepted:
    """Choose the accepted positions of each canvas and renoise the others.

    All arrays are [B, C]: the canvas that was denoised, entropies in nats, the argmax draft, the
    sample, fresh uniform ids, the previous step's draft (None on a first step: never equal), and a
    mask of pinned positions. Positions are kept in ascending order of entropy, the lowest index
    first among equals, where inclusive cumsum - own <= entropy_bound in float32.
    """
    run = metal if dispatch.use(OPERATION, entropy.dtype, entropy.shape[1]) else twin
    return run(canvas, entropy, draft, sample, fresh, previous_draft, entropy_bound, pinned=pinned)


def twin(
    canvas: mx.array,
    entropy: mx.array,
    draft: mx.array,
    sample: mx.array,
    fresh: mx.array,
    previous_draft: mx.array | None,
    entropy_bound: float,
    *,
    pinned: mx.array | None = None,
) -> Accepted:
    """The same in plain MLX operations."""
    batch, length = entropy.shape
    if pinned is None:
        pinned = mx.zeros((batch, length), dtype=mx.bool_)
    free = mx.logical_not(pinned)
    finite = mx.logical_or(mx.isfinite(entropy), pinned)
    eligible = mx.logical_and(free, finite)
    usable = mx.where(eligible, entropy, _LAST)

    rank = _ranks(usable)
    positions = mx.broadcast_to(mx.arange(length, dtype=mx.int32), (batch, length))
    order = mx.put_along_axis(mx.zeros_like(rank), rank, positions, axis=1)
    # Zeros after the eligible: a GPU sums in parallel, where _LAST would drown all it is added to.
    ascending = mx.take_along_axis(mx.where(eligible, entropy, 0.0), order, axis=1)
    within = mx.cumsum(ascending, axis=1) - ascending <= entropy_bound
    accepted = mx.logical_and(mx.take_along_axis(within, rank, axis=1), eligible)

    renoised = mx.where(accepted, sample, fresh)
    next_canvas = mx.where(pinned, canvas, renoised).astype(mx.int32)

    counted = mx.maximum(free.sum(axis=1), 1)
    mean = mx.where(free, entropy, 0.0).sum(axis=1) / counted
    if previous_draft is None:
        equal = mx.zeros((batch,), dtype=mx.bool_)
    else:
        equal = mx.logical_or(draft == previous_draft, pinned).all(axis=1)
    status = mx.stack(
        [equal.astype(mx.float32), mean, finite.all(axis=1).astype(mx.float32)], axis=1
    )
    return Accepted(next_canvas, accepted, status)


def _ranks(values: mx.array) -> mx.array:
    """Place of each value in ascending order, the lowest index first among equals: [B, C] int32."""
    length = values.shape[1]
    index = mx.arange(length)
    left, right = values[:, :, None], values[:, None, :]
    before = mx.logical_or(
        right < left, mx.logical_and(right == left, index[None, :] < index[:, None])
    )
    return before.sum(axis=2).astype(mx.int32)


_KERNEL = registry.Kernel(
    "accept",
    inputs=("canvas", "entropy", "draft", "sample", "fresh", "previous", "pinned", "bound"),
    outputs=("next_canvas", "accepted", "status"),
)


def _supports(shape: registry.Shape) -> bool:
    return shape["dtype"] == "float32" and 0 < int(shape["length"]) <= 512


def metal(
    canvas: mx.array,
    entropy: mx.array,
    draft: mx.array,
    sample: mx.array,
    fresh: mx.array,
    previous_draft: mx.array | None,
    entropy_bound: float,
    *,
    pinned: mx.array | None = None,
) -> Accepted:
    """The same as one Metal kernel, a threadgroup per canvas."""
    batch, length = entropy.shape
    threads = -(-length // 32) * 32
    ids = [array.astype(mx.int32) for array in (canvas, draft, sample, fresh)]
    previous = ids[1] if previous_draft is None else previous_draft.astype(mx.int32)
    outputs = registry.launch(
        _KERNEL,
        [
            ids[0],
            entropy,
            *ids[1:],
            previous,
            ids[0] if pinned is None else pinned,
            mx.array([entropy_bound], dtype=mx.float32),
        ],
        template=[
            ("TG", threads),
            ("HAS_PREVIOUS", previous_draft is not None),
            ("HAS_PINNED", pinned is not None),
        ],
        grid=(threads, batch, 1),
        threadgroup=(threads, 1, 1),
        outputs=[
            ((batch, length), mx.int32),
            ((batch, length), mx.bool_),
            ((batch, 3), mx.float32),
        ],
    )
    return Accepted(*outputs)


def _probes(shape: registry.Shape) -> Iterator[registry.Probe]:
    for batch, length in ((2, 33), (4, int(shape["length"]))):
        entropy, ids = mx.random.uniform(shape=(batch, length), key=mx.random.key(length)), []
        for key in range(5):
            ids.append(mx.random.randint(0, 99, (batch, length), key=mx.random.key(key)))
        # a quarter is certain; sums of halves are exact, so no order of addition moves the cut
        entropy = mx.where(entropy < 0.25, 0.0, mx.round(entropy * 8) / 2)
        for previous, pinned in ((None, None), (ids[4], ids[4] < 20)):
            canvas, draft, sample, fresh = ids[:4]
            yield registry.Probe(
                partial(metal, canvas, entropy, draft, sample, fresh, previous, 2.0, pinned=pinned),
                partial(twin, canvas, entropy, draft, sample, fresh, previous, 2.0, pinned=pinned),
                tolerance=1e-6,
            )


OPERATION = registry.Operation("accept", ("dtype", "length"), (_KERNEL,), _supports, _probes)
