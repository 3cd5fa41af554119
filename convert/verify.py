"""Is a checkpoint folder what it claims to be? Names, shapes, digests, numbers, a forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.merged import JOURNAL
from mlx_dgemma.convert.origin import resolve_source
from mlx_dgemma.convert.shards import file_digest
from mlx_dgemma.convert.source import Packed, Source, Tensor, open_source, slices
from mlx_dgemma.convert.stream import is_finite
from mlx_dgemma.errors import CheckpointError, DGemmaError
from mlx_dgemma.files import is_plain, read_json
from mlx_dgemma.headers import INDEX
from mlx_dgemma.model.section import Section
from mlx_dgemma.prompt import load_tokenizer
from mlx_dgemma.untrusted_json import printable

# Scales of the mx and nv modes are floats in a byte; these bytes mean NaN.
_NAN_SCALES = {"mxfp4": (0xFF,), "mxfp8": (0xFF,), "nvfp4": (0x7F, 0xFF)}


@dataclass(frozen=True)
class Verification:
    """What was checked. problems: one sentence each; empty when the checkpoint is sound."""

    path: str
    checked: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def verify(
    path: str | Path,
    *,
    revision: str | None = None,
    forward: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Check a checkpoint folder (or a downloaded Hub repository).

    forward: also run a prompt of four tokens and one canvas through the network, which needs
        the memory that running the model needs.
    Raises ModelNotFoundError when there is nothing to check.
    """
    folder = resolve_source(str(path), revision)
    checked: list[str] = []
    problems: list[str] = []
    try:
        with open_source(folder) as source:
            checked.append("config, index, names, shapes and dtypes")
            problems += _index_problems(source)
            journal = folder / JOURNAL
            if os.path.exists(journal):
                problems += _digest_problems(folder)
                checked.append("digests of all files")
            problems += _number_problems(source, progress)
            checked.append("no NaN or Inf in any tensor")
            if os.path.exists(folder / "tokenizer.json"):
                load_tokenizer(folder, source.config.stop_ids)
                checked.append("tokenizer")
    except CheckpointError as error:
        problems.append(str(error))
    if forward and not problems:
        try:
            problems += _forward_problems(folder)
            checked.append("a forward pass")
        except DGemmaError as error:
            problems.append(str(error))
    return Verification(str(path), tuple(checked), tuple(problems))


def _index_problems(source: Source) -> list[str]:
    path = source.folder / INDEX
    if not os.path.exists(path):
        return []
    stored = sum(entry.nbytes for file in source.files.values() for entry in file.entries.values())
    metadata = Section(Section(read_json(path), str(path)).get("metadata", {}), str(path))
    claimed = metadata.integer("total_size", stored, minimum=0, maximum=2**62)
    if claimed != stored:
        return [f"{path}: total_size is {claimed:,} but the shards hold {stored:,} bytes."]
    return []


def _digest_problems(folder: Path) -> list[str]:
    journal = Section(read_json(folder / JOURNAL), str(folder / JOURNAL))
    problems = []
    for part in ("shards", "files"):
        if journal.get(part) is None:
            continue
        records = journal.section(part)
        for name in records.values:
            if not is_plain(name):
                raise CheckpointError(f"{folder / JOURNAL} names {printable(name)}, no file here.")
            expected, path = records.section(name).text("sha256"), folder / name
            if not os.path.exists(path):
                problems.append(f"{path} is missing; {JOURNAL} lists it.")
            elif file_digest(path) != expected:
                problems.append(f"{path} is not the file that was written: its digest differs.")
    return problems


def _number_problems(source: Source, progress: Callable[[str, int, int], None] | None) -> list[str]:
    problems = []
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    done = 0
    for name, tensor in source.tensors.items():
        if not _sound(tensor):
            problems.append(f"{name} holds NaN or Inf.")
        done += tensor.nbytes
        if progress is not None:
            progress("checking numbers", done, total)
    return problems


def _sound(tensor: Tensor) -> bool:
    """No NaN or Inf among the stored floats; packed integers cannot hold one."""
    if not isinstance(tensor, Packed):
        return all(is_finite(tensor.rows(*part)) for part in slices(tensor.shape))
    nan = _NAN_SCALES.get(tensor.packing.mode)
    parts = [tensor.scales, *([tensor.biases] if tensor.biases is not None else [])]
    for part in parts:
        for start, stop in slices(part.shape):
            rows = part.rows(start, stop)
            if nan is None and not is_finite(rows):
                return False
            if nan is not None and np.isin(np.array(rows), nan).any():
                return False
    return True


def _forward_problems(folder: Path) -> list[str]:
    from mlx_dgemma.checkpoint.weights import load_model

    model = load_model(folder)
    cache = model.make_cache()
    vocabulary = model.config.text.vocab_size
    model.prefill(mx.arange(4)[None] % vocabulary, cache)
    canvas = mx.arange(model.config.canvas_length)[None] % vocabulary
    logits = model.denoise(canvas, cache)
    if not mx.isfinite(logits).all().item():
        return [f"{folder}: a forward pass gives NaN or Inf."]
    return []
