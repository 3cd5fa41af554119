"""The life of every rank but 0: it loads its part of what rank 0 names, and computes for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from mlx_dgemma.checkpoint.adapter_folder import adapter_identity
from mlx_dgemma.checkpoint.agreement import facts, identity_of, own_shapes
from mlx_dgemma.checkpoint.plan import LEAST_CONTEXT, prepare
from mlx_dgemma.checkpoint.random_weights import (
    check_synthetic,
    synthetic_facts,
    synthetic_model,
)
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.distributed.channel import Message
from mlx_dgemma.distributed.link import measure
from mlx_dgemma.distributed.team import Follower
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import set_limits
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.following import Following, spoken
from mlx_dgemma.model.share import Share


def serve(team: Follower) -> NoReturn:
    """Does what rank 0 asks until that ends; then this process ends."""
    try:
        _serve(team)
    except (DGemmaError, OSError, RuntimeError, MemoryError) as error:
        team.wait_for_verdict(error)
        team.fail(spoken(error))
    sys.exit(0)


def _serve(team: Follower) -> None:
    following = Following(team)
    found: tuple[Path, dict[str, Any]] | None = None
    for message in team.messages():
        if message.op == "prepare":
            with _refusing(team):
                folder, adapter = _prepare(**message.fields)
                found = folder, {"adapter_path": adapter, "dtype": message.fields["dtype"]}
                shapes = own_shapes(folder, message.fields["dtype"])
                team.answer(**facts(identity_of(folder), shapes, adapter_identity(adapter)))
        elif message.op == "synthetic":
            with _refusing(team):
                raw = message.fields["raw"]
                config = ModelConfig.from_dict(raw)
                check_synthetic(config, LEAST_CONTEXT, name="The synthetic model")
                team.answer(**synthetic_facts(Share(team.rank, team.size), raw))
        elif message.op == "draw":
            _settle(team, message)
            number = message.fields["number"]
            with explained():
                following.models[number] = synthetic_model(message.fields["raw"], team=team)
        elif message.op == "load":
            assert found is not None
            _settle(team, message)
            number, dtype = message.fields["number"], found[1]["dtype"]
            with explained():  # held there alone, so that it can be forgotten
                following.models[number] = load_model(
                    found[0],
                    dtype=None if dtype is None else getattr(mx, dtype),
                    adapter_path=found[1]["adapter_path"],
                    unit=message.fields["unit"],
                    team=team,
                )
        elif message.op == "loaded":
            team.answer()
        elif message.op == "measure":
            measure(team, **message.fields)
        else:
            with explained():
                following.do(message)


@contextmanager
def _refusing(team: Follower) -> Iterator[None]:
    """What this rank cannot load, rank 0 refuses to its user; a model before stays."""
    try:
        yield
    except DGemmaError as error:
        team.refuse(spoken(error))


def _settle(team: Follower, message: Message) -> None:
    """Takes what rank 0 has settled."""
    team.unequal = message.fields["unequal"]
    dispatch.settle(message.fields["kernels"])


def _prepare(
    model: str | None, revision: str | None, adapter_path: str | None, dtype: str | None
) -> tuple[Path, str | None]:
    """The folder of what rank 0 named, and the adapter's, once this machine can hold its part."""
    folder, _ = prepare(
        model,
        revision=revision,
        adapter_path=adapter_path,
        context_tokens=LEAST_CONTEXT,
        dtype=dtype,
    )
    set_limits(machine())
    dispatch.prepare(own_shapes(folder, dtype))
    return folder, adapter_path
