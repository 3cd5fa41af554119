"""The one decision about memory: what a model will need on this machine, and whether it fits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.checkpoint.adapter_folder import adapter_bytes
from mlx_dgemma.checkpoint.sizes import (
    context_bytes,
    packable,
    stored_bytes,
    token_bytes,
    weight_bytes,
    working_bytes,
)
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.distributed import joining
from mlx_dgemma.errors import ResourceError
from mlx_dgemma.files import expanded
from mlx_dgemma.machine.hardware import Machine, machine
from mlx_dgemma.machine.memory import gigabytes, usable
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.layer_context import STEP as CONTEXT_STEP
from mlx_dgemma.model.share import Share

LEAST_CONTEXT = 1024  # tokens that a model must have room for to be worth loading
PLANNED_CONTEXT = 8192  # tokens that a plan counts with, unless more are asked for


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose for one model at one context length.

    sliced_head: the logits of a canvas are never held whole, which costs time and saves memory.
    kv_bits: 8 where the context is kept in 8 bits. packed_total: the total if it were; None where
        it cannot be. token_bytes: what each further token adds to the context.
    advice: a sentence on what to do where the plan is tight, once that was asked.
    """

    weights: int
    context: int
    working: int
    context_tokens: int
    sliced_head: bool = False
    kv_bits: int | None = None
    packed_total: int | None = None
    token_bytes: int = 0
    advice: str | None = None

    @property
    def total(self) -> int:
        return self.weights + self.context + self.working

    def record(self) -> dict[str, int | bool | None]:
        return {
            "weights_bytes": self.weights,
            "context_bytes": self.context,
            "working_bytes": self.working,
            "total_bytes": self.total,
            "context_tokens": self.context_tokens,
            "sliced_head": self.sliced_head,
            "kv_bits": self.kv_bits,
        }

    def __str__(self) -> str:
        head = ", the head in slices" if self.sliced_head else ""
        bits = f" in {self.kv_bits} bits" if self.kv_bits else ""
        return (
            f"{gigabytes(self.total)} ({gigabytes(self.weights)} weights, "
            f"{gigabytes(self.context)} context of {self.context_tokens:,} tokens{bits}, "
            f"{gigabytes(self.working)} working memory{head})"
        )


def prepare(
    source: str | Path | None,
    *,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    context_tokens: int = PLANNED_CONTEXT,
    kv_bits: int | None = None,
    dtype: str | None = None,
    weights: bool = True,
    progress: bool = False,
) -> tuple[Path, Plan]:
    """A checkpoint's folder, fetched if need be, and the plan by which it fits this machine.

    source, revision, progress: as in `resolve_model`; None is the demo checkpoint. adapter_path:
    of an adapter, which stays beside the weights.
    context_tokens: prompt and reply together; at most what the model takes. dtype: what is
    computed in, where that is not the checkpoint's own. weights: False fetches the small files
    alone, and their bytes follow from the config.

    Raises what `resolve_model` raises, and ResourceError when the model cannot fit.
    """
    folder = CHECKPOINT
    if source is not None or revision is not None:
        from mlx_dgemma.checkpoint.hub import resolve_model  # huggingface-hub takes a moment

        folder = resolve_model(source, revision=revision, weights=weights, progress=progress)
    stored = weights or source is None or os.path.isdir(expanded(source))
    here = machine()
    config, widened = computed_config(folder, dtype)
    beside = 0 if adapter_path is None else adapter_bytes(adapter_path)
    share = current_share()
    if share is not None:  # of several processes each needs room for its part
        share.check(config)
        known, local = weight_bytes(config, share=share), share.config(config)
    else:
        known = stored_bytes(folder, widened=widened) if stored else weight_bytes(config)
        local = config
    wanted = plan_for(
        here,
        local,
        context_tokens=min(context_tokens, config.text.max_position_embeddings),
        weights=known + beside,
        kv_bits=kv_bits,
    )
    name = "The demo checkpoint" if source is None else str(source)
    return folder, replace(wanted, advice=check_fits(wanted, here, name=name))


def plan(
    config: ModelConfig,
    *,
    context_tokens: int,
    weights: int | None = None,
    canvases: int = 1,
    sliced_head: bool = False,
    kv_bits: int | None = None,
) -> Plan:
    """The plan for a context of `context_tokens`, prompt and replies together.

    weights: bytes when they are known from the files; otherwise they follow from the config.
    canvases: how many are denoised together. kv_bits: 8 for a context in 8 bits.
    """

    def made(kv_bits: int | None) -> Plan:
        return Plan(
            weights=weight_bytes(config) if weights is None else weights,
            context=context_bytes(config, context_tokens, kv_bits),
            working=working_bytes(
                config, context_tokens, canvases, sliced_head=sliced_head, kv_bits=kv_bits
            ),
            context_tokens=context_tokens,
            sliced_head=sliced_head,
            kv_bits=kv_bits,
            token_bytes=token_bytes(config.text, kv_bits),
        )

    return replace(made(kv_bits), packed_total=made(8).total if packable(config.text) else None)


def plan_for(
    machine: Machine,
    config: ModelConfig,
    *,
    context_tokens: int,
    weights: int | None = None,
    kv_bits: int | None = None,
) -> Plan:
    """The plan that suits a machine: with the head in slices only where that makes it fit.

    What the GPU keeps resident by default is tried first, then all that can be used; a plan that
    fits neither is for `check_fits` to refuse.
    """
    whole, sliced = (
        plan(
            config,
            context_tokens=context_tokens,
            weights=weights,
            sliced_head=in_slices,
            kv_bits=kv_bits,
        )
        for in_slices in (False, True)
    )
    room = usable(machine)
    if room is None:
        return whole
    resident = min(room, machine.limit or room) if machine.metal else room
    for bound in (resident, room):
        for candidate in (whole, sliced):
            if candidate.total <= bound:
                return candidate
    return whole


def check_fits(wanted: Plan, machine: Machine, *, name: str = "This model") -> str | None:
    """Refuses a plan that this machine's memory cannot hold.

    Returns a sentence of advice where the plan fits the memory but not what the GPU keeps
    resident by default, else None. Raises ResourceError with the numbers and a way out.
    """
    room = usable(machine)
    if room is None or machine.memory is None:
        return None
    if wanted.total > room:
        raise ResourceError(
            f"{name} needs {wanted}, and this machine has {gigabytes(machine.memory)}, of which "
            f"{gigabytes(room)} can be used; {_way_out(wanted, room)}."
        )
    if machine.metal and machine.limit is not None and wanted.total > machine.limit:
        megabytes = -(-wanted.total // (1 << 20)) + 512
        return (
            f"{name} needs {gigabytes(wanted.total)}, but macOS keeps only "
            f"{gigabytes(machine.limit)} resident for the GPU by default; raise that until the "
            f"next restart with: sudo sysctl iogpu.wired_limit_mb={megabytes}"
        )
    return None


def _way_out(wanted: Plan, room: int) -> str:
    packed = wanted.packed_total
    if wanted.kv_bits is None and packed is not None and packed <= room:
        return f"with the context in 8 bits ({gigabytes(packed)}) it fits: --kv-bits 8"
    if wanted.token_bytes:
        over = -(-(wanted.total - room) // wanted.token_bytes)
        tokens = (wanted.context_tokens - over) // CONTEXT_STEP * CONTEXT_STEP
        if tokens >= PLANNED_CONTEXT:  # for less, every command would plan that much again
            return f"a context of {tokens:,} tokens fits"
    return (
        "use a checkpoint with fewer bits (`mlx_dgemma.convert --recipe small` writes the "
        "smallest), or a machine with more memory"
    )


def slices_head(config: ModelConfig, context_tokens: int, kv_bits: int | None = None) -> bool:
    """Whether a request needs its head in slices to fit this machine.

    Follows from config and machine alone, not from what is free now: rounding differs between
    the two heads, and a seed must repeat its reply.
    """
    share = current_share()
    return plan_for(
        _here(),
        config if share is None else share.config(config),
        context_tokens=_planned_tokens(config, context_tokens),
        weights=weight_bytes(config, share=share),
        kv_bits=kv_bits,
    ).sliced_head


def canvases_together(
    config: ModelConfig,
    context_tokens: int,
    most: int,
    *,
    sliced_head: bool = False,
    kv_bits: int | None = None,
) -> int:
    """How many canvases this machine can denoise at once, 1 to `most`.

    Follows from config and machine alone, as `slices_head` does and for the same reason.
    """
    here = _here()
    room = usable(here)
    if room is None:
        return most
    if here.metal:
        room = min(room, here.limit or room)
    share = current_share()

    def fits(canvases: int) -> bool:
        wanted = plan(
            config if share is None else share.config(config),
            context_tokens=_planned_tokens(config, context_tokens),
            weights=weight_bytes(config, share=share),
            canvases=canvases,
            sliced_head=sliced_head,
            kv_bits=kv_bits,
        )
        return wanted.total <= room

    return next((count for count in range(most, 1, -1) if fits(count)), 1)


def current_share() -> Share | None:
    """What this process holds of a model; None where it holds all."""
    team = joining.current()
    return None if team is None else Share(team.rank, team.size)


def _planned_tokens(config: ModelConfig, asked: int) -> int:
    return min(max(asked, PLANNED_CONTEXT), config.text.max_position_embeddings)


@cache
def _here() -> Machine:
    """Read once: a request should not wait for a dozen answers from the system."""
    return machine()


def in_float32(config: ModelConfig) -> ModelConfig:
    """The same model as a GPU holds it that computes in float32."""
    return replace(config, text=replace(config.text, dtype="float32"))


def computed_config(folder: str | Path, dtype: str | None) -> tuple[ModelConfig, bool]:
    """A checkpoint's config as it is computed in `dtype`, and whether that widens what is stored.

    On a GPU float32 takes the place of every 16-bit float; None is the checkpoint's own dtype.
    """
    config = ModelConfig.from_folder(folder)
    widened = dtype == "float32" and mx.default_device() != mx.Device(mx.cpu)
    return (in_float32(config) if widened else config), widened
