"""What the processes of one model must have in common before they compute: program, checkpoint, and
which operations run as kernels.

A verdict on a kernel rests on times, which differ between machines, and a kernel rounds otherwise
than its twin. So all take what rank 0 found, except a kernel that some rank cannot use.
"""

from __future__ import annotations

import itertools
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma._version import __version__
from mlx_dgemma.checkpoint.adapter_folder import adapter_identity
from mlx_dgemma.checkpoint.parts import identity
from mlx_dgemma.checkpoint.plan import computed_config, current_share
from mlx_dgemma.checkpoint.weights import read_headers
from mlx_dgemma.distributed.channel import Message
from mlx_dgemma.distributed.team import Leader
from mlx_dgemma.errors import CheckpointError, InputError
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.kernels.self_checks import Request
from mlx_dgemma.kernels.verdicts import chip, mlx_version
from mlx_dgemma.model import Model
from mlx_dgemma.model.kernel_shapes import kernel_shapes

_numbers = itertools.count(1)
# A repository in the Hub's cache, which lies elsewhere on another machine.
_CACHED = re.compile(
    r".*/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]+)"
)


def own_shapes(folder: Path, dtype: str | None) -> list[Request]:
    """The shapes in which this process will ask for the fused operations."""
    config, share = computed_config(folder, dtype)[0], current_share()
    return kernel_shapes(config if share is None else share.config(config), dtype)


def facts(checkpoint: str, shapes: Sequence[Request], adapter: str = "") -> dict[str, Any]:
    """What is compared between the ranks. checkpoint, adapter: what tells each from another."""
    return {
        "program": f"mlx_dgemma {__version__} with MLX {mlx_version()}",
        "checkpoint": checkpoint,
        "adapter": adapter,
        "chip": chip(),
        "device": str(mx.default_device()),
        "kernels": dispatch.choices(shapes),
    }


def identity_of(folder: Path) -> str:
    """What tells a checkpoint from every other: its configuration and headers."""
    return identity((folder / "config.json").read_bytes(), read_headers(folder))


def next_number() -> int:
    """Of a model that several processes hold together."""
    return next(_numbers)


def number_model(team: Leader, model: Model, number: int) -> None:
    """Gives rank 0's model the number of the other ranks' parts, which they keep as long."""
    model.number = number
    weakref.finalize(model, team.later, "forget_model", number=number)


def agree(
    team: Leader,
    folder: Path,
    shapes: Sequence[Request],
    *,
    named: bool,
    adapter_path: str | Path | None,
    dtype: str | None,
    unit: int,
) -> int:
    """Makes the other ranks find the same model, and compares what they say with rank 0.

    The number by which the others know the model from now on (`Model.number`).

    named: False where it is the demo's. dtype, unit: what rank 0 computes in, so all do.

    Raises ResourceError with what a rank cannot do, InputError or CheckpointError where it has
    another program, checkpoint or adapter; each names the rank.
    """
    adapter = adapter_identity(adapter_path)  # what rank 0 lacks is no fault of another
    path = os.path.abspath(folder) if named else None
    cached = _CACHED.match(path or "")
    name = f"{cached['owner']}/{cached['name']}" if cached else path
    answers = team.ask(
        "prepare",
        model=name,
        revision=cached["commit"] if cached else None,
        adapter_path=None if adapter_path is None else os.path.abspath(adapter_path),
        dtype=dtype,
    )
    own = facts(identity_of(folder), shapes, adapter)
    number, chosen = next_number(), settle_choices(team, own, answers)
    team.tell("load", number=number, kernels=chosen, unequal=team.unequal, unit=unit)
    return number


def settle_choices(
    team: Leader, own: Mapping[str, Any], answers: Mapping[int, Message]
) -> dict[str, bool]:
    """Compares rank 0's facts with the others' and settles which operations run as kernels here;
    that choice, for the others. Raises what `agree` raises."""
    chosen: dict[str, bool] = own["kernels"]
    for rank, answer in answers.items():
        theirs, who = answer.fields, team.name(rank)
        if theirs["program"] != own["program"]:
            raise InputError(
                f"{who} runs {theirs['program']}, and rank 0 {own['program']}: install the same "
                "on both."
            )
        if theirs["checkpoint"] != own["checkpoint"]:
            raise CheckpointError(
                f"{who} has another checkpoint under this name than rank 0: copy rank 0's."
            )
        if theirs["adapter"] != own["adapter"]:
            raise CheckpointError(
                f"{who} has another adapter under this name than rank 0: copy rank 0's."
            )
        if theirs["device"].split(",")[0] != own["device"].split(",")[0]:
            raise InputError(
                f"{who} computes on {theirs['device']}, and rank 0 on {own['device']}: use one "
                "kind of device."
            )
        chosen = {key: on and theirs["kernels"].get(key, False) for key, on in chosen.items()}
    team.unequal = any(answer.fields["chip"] != own["chip"] for answer in answers.values())
    dispatch.settle(chosen)
    return chosen
