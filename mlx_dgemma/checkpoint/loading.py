"""A checkpoint's folder or name to a model in memory, once it is known to fit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_dgemma.checkpoint.agreement import agree, number_model, own_shapes
from mlx_dgemma.checkpoint.audits import choose
from mlx_dgemma.checkpoint.plan import LEAST_CONTEXT, prepare
from mlx_dgemma.checkpoint.serving import serve
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.distributed import joining
from mlx_dgemma.distributed.team import Follower, Leader
from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.machine.gpu_failures import explained
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import set_limits
from mlx_dgemma.machine.process import claim_process
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import DTYPES
from mlx_dgemma.prompt import Tokenizer, load_tokenizer
from mlx_dgemma.prompt.chat_template import read_template


def load(
    path_or_hf_repo: str | Path | None = None,
    *,
    lazy: bool = False,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
    chat_template: str | Path | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer from a folder or a Hugging Face repository.

    path_or_hf_repo: None is the bundled demo checkpoint. revision: branch, tag or commit of a
    repository. lazy: read no weight until it is used. adapter_path: a LoRA adapter of PEFT's or
    mlx-lm's form, kept beside the weights, each delta in the pass it was trained in. dtype:
    "float16", "bfloat16" or "float32", of the activations; by default the checkpoint's, float32 on
    MLX's CPU backend, and float16 on M1 and M2 for a checkpoint that has passed its audit (see
    checkpoint.audits). In float16 the residual stream stays in float32. chat_template: a file with
    a Jinja template, or its text, in the place of the checkpoint's. group: the processes that hold
    the model together, as `connect` gives it. On rank 0 the model is then used as any
    other. On the other ranks this call serves rank 0 and ends the process, quietly, once rank 0 has
    ended: the same script runs on all of them.

    Raises ModelNotFoundError, CheckpointError, ResourceError (too little memory or disk), or
    InputError for a revision of the demo checkpoint, another dtype, or a template that cannot be
    read.
    """
    template = None if chat_template is None else read_template(chat_template)
    model, folder = load_network(
        path_or_hf_repo,
        lazy=lazy,
        revision=revision,
        adapter_path=adapter_path,
        dtype=dtype,
        group=group,
    )
    tokenizer = load_tokenizer(folder, model.config.stop_ids)
    if template is not None:
        tokenizer.chat_template = template
    return model, tokenizer


def load_network(
    path_or_hf_repo: str | Path | None = None,
    *,
    lazy: bool = False,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, Path]:
    """The model without its tokenizer, and its folder; otherwise as `load`."""
    claim_process()
    team = joining.current() if group is None else joining.join(group)
    if isinstance(team, Follower):
        serve(team)
    if dtype is not None:
        _check_dtype(dtype)
    if lazy:
        from mlx_dgemma.checkpoint.hub import resolve_model  # huggingface-hub takes a moment

        folder = resolve_model(path_or_hf_repo, revision=revision)
    else:
        folder, _ = prepare(
            path_or_hf_repo,
            revision=revision,
            adapter_path=adapter_path,
            context_tokens=LEAST_CONTEXT,
            dtype=dtype,
        )
    dtype, unit = choose(folder, dtype, adapted=adapter_path is not None)
    set_limits(machine())
    shapes = own_shapes(folder, dtype)
    if not lazy:  # the checks need memory of their own, which the weights will take
        dispatch.prepare(shapes)
    computed = None if dtype is None else getattr(mx, dtype)
    number = 0
    if isinstance(team, Leader):
        number = agree(
            team,
            folder,
            shapes,
            named=path_or_hf_repo is not None or revision is not None,
            adapter_path=adapter_path,
            dtype=dtype,
            unit=unit,
        )
    with explained():
        model = load_model(
            folder, lazy=lazy, dtype=computed, adapter_path=adapter_path, unit=unit, team=team
        )
    if isinstance(team, Leader):
        number_model(team, model, number)
        team.ask("loaded")
    return model, folder


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not possible: use {' or '.join(map(repr, DTYPES))}.")
    if dtype != "float32" and mx.default_device() == mx.Device(mx.cpu):
        raise InputError(
            f"dtype={dtype!r} needs a GPU: MLX multiplies experts on a CPU in float32 alone; "
            "leave it out."
        )
