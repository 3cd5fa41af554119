"""A checkpoint's folder or name to a model in memory, once it is known to fit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.machine.memory import (
    LEAST_CONTEXT,
    check_fits,
    computed_config,
    plan_for,
    set_limits,
    stored_bytes,
)
from mlx_dgemma.machine.process import claim_process
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import DTYPES
from mlx_dgemma.prompt import Tokenizer, load_tokenizer


def load(
    path_or_hf_repo: str | Path | None = None,
    *,
    lazy: bool = False,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer from a folder or a Hugging Face repository.

    path_or_hf_repo: None is the bundled demo checkpoint. revision: branch, tag or commit of a
    repository. lazy: read no weight until it is used. adapter_path: a LoRA adapter in PEFT's
    format, merged on loading. dtype: "float16", "bfloat16" or "float32", of the activations; by
    default the checkpoint's, and float32 on MLX's CPU backend. In float16 the residual stream
    stays in float32.

    Raises ModelNotFoundError, CheckpointError, ResourceError (too little memory or disk), or
    InputError for a revision of the demo checkpoint, or another dtype.
    """
    model, folder = load_network(
        path_or_hf_repo, lazy=lazy, revision=revision, adapter_path=adapter_path, dtype=dtype
    )
    return model, load_tokenizer(folder, model.config.stop_ids)


def load_network(
    path_or_hf_repo: str | Path | None = None,
    *,
    lazy: bool = False,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
) -> tuple[Model, Path]:
    """The model alone, for who needs no tokenizer, and its folder; otherwise as `load`."""
    claim_process()
    if dtype is not None:
        _check_dtype(dtype)
    folder = CHECKPOINT
    if path_or_hf_repo is not None or revision is not None:
        from mlx_dgemma.checkpoint.hub import resolve_model  # huggingface-hub takes a moment

        folder = resolve_model(path_or_hf_repo, revision=revision)
    this = machine()
    if not lazy:
        config, widened = computed_config(folder, dtype)
        least = plan_for(
            this,
            config,
            context_tokens=LEAST_CONTEXT,
            weights=stored_bytes(folder, widened=widened),
        )
        check_fits(least, this, name=str(path_or_hf_repo or "The demo checkpoint"))
    set_limits(this)
    computed = None if dtype is None else getattr(mx, dtype)
    return load_model(folder, lazy=lazy, dtype=computed, adapter_path=adapter_path), folder


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not possible: use {' or '.join(map(repr, DTYPES))}.")
    if dtype != "float32" and mx.default_device() == mx.Device(mx.cpu):
        raise InputError(
            f"dtype={dtype!r} needs a GPU: MLX multiplies experts on a CPU in float32 alone; "
            "leave it out."
        )
