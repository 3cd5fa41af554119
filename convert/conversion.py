"""Convert a checkpoint: choose the recipe, plan, stream, and put the result in its place."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_dgemma.checkpoint.adapters import Adapter, read_adapter
from mlx_dgemma.checkpoint.hub import local_folder
from mlx_dgemma.checkpoint.merged import JOURNAL, refuse_merged
from mlx_dgemma.convert import card
from mlx_dgemma.convert.choice import choose_recipe
from mlx_dgemma.convert.origin import (
    check_space_for,
    provenance_of,
    resolve_source,
    source_revision,
)
from mlx_dgemma.convert.plan import Plan, make_plan
from mlx_dgemma.convert.recipes import Precision, Recipe, Rule
from mlx_dgemma.convert.shards import SHARD_BYTES, file_digest, write_json
from mlx_dgemma.convert.source import (
    Source,
    compare_duplicates,
    dense_shapes,
    describe_source,
    open_source,
    packing_of,
)
from mlx_dgemma.convert.stream import DTYPES, write_shards
from mlx_dgemma.convert.workspace import Workspace, check_target
from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.files import check_name, expanded, read_json
from mlx_dgemma.headers import INDEX

if TYPE_CHECKING:
    from mlx_dgemma.convert.measure import Measurement

# Files that belong to a model and are copied as they are.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = {"config.json", INDEX, JOURNAL, "adapter_config.json"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a conversion did, or with `written` False would do."""

    source: str
    revision: str | None
    target: str
    recipe: str
    layout: str
    dtype: str
    parameters: int
    total_size: int
    source_bytes: int
    bits_per_weight: float
    shards: tuple[str, ...]
    resumed: tuple[str, ...]
    alternatives: tuple[str, ...]
    seconds: float
    written: bool
    uploaded_to: str | None = None
    measured: dict[str, Any] | None = None
    table: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    quantize: bool = False,
    recipe: str | Recipe | None = None,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    quant_predicate: str | None = None,
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    dequantize: bool = False,
    requantize: bool = False,
    to_hf: bool = False,
    adapter_path: str | Path | None = None,
    revision: str | None = None,
    upload_repo: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    measure: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint folder or Hub repository to `mlx_path`.

    Holds at most a few slices of 64 MB at a time. An interrupted conversion goes on where it
    was when called again with the same arguments; the output appears under its name only when
    it is whole. `recipe` is a name (see `recipes.RECIPES`) or a Recipe; `quantize` alone means
    "4bit"; `requantize` packs every matrix as the source does, and copies those that nothing
    changes. `dry_run` writes nothing, and of a Hub repository reads the headers alone unless it
    is to measure. `measure` also compares the recipe and its neighbours with the source
    (`measure.py`) and writes the figures into the model card. `progress(what, done, total)` is
    called with bytes.

    Raises InputError, ModelNotFoundError, CheckpointError or ResourceError; the source is never
    touched.
    """
    began = time.perf_counter()
    chosen = choose_recipe(
        quantize=quantize,
        recipe=recipe,
        q_bits=q_bits,
        q_group_size=q_group_size,
        q_mode=q_mode,
        quant_predicate=quant_predicate,
        rules=rules,
        dequantize=dequantize,
        to_hf=to_hf,
    )
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}.")
    check_name(mlx_path)
    target = expanded(mlx_path).resolve()
    remote = local_folder(hf_path) is None
    if remote and not dry_run:
        small = resolve_source(str(hf_path), revision, weights=False)
        check_target(target, small, overwrite=overwrite)
        check_space_for(small, target, chosen, dtype)
    if remote and dry_run and not measure:
        opened = describe_source(str(hf_path), revision)
    else:
        folder = resolve_source(str(hf_path), revision, download_progress=progress is not None)
        if not dry_run:
            check_target(target, folder, overwrite=overwrite)
        opened = open_source(folder)
    with opened as source:
        explicit = recipe is not None or to_hf or dequantize or chosen.default is not None
        again = requantize and not explicit and source.quantized
        if again:
            chosen, explicit = as_in(source), True
        _check_quantization(source, str(hf_path), dequantize=dequantize, explicit=explicit)
        adapter = None if adapter_path is None else read_adapter(adapter_path, source.config)
        if adapter is not None:
            refuse_merged(source.folder, adapter.folder)
            adapter.check_mergeable()
        keep = to_hf or dequantize or again or not explicit
        plan = make_plan(
            source.config,
            source.raw_config,
            dense_shapes(source.config),
            chosen,
            dtype=dtype or _default_dtype(source, keep=keep),
            layout="hf" if to_hf else "mlx",
            shard_bytes=shard_bytes,
        )
        resumed: list[str] = []
        if not dry_run:
            companions(source.folder)  # refuses now, not after the weights
            provenance = provenance_of(str(hf_path), source, plan, adapter)
            workspace = Workspace(
                target, source.folder, plan.fingerprint(provenance), provenance, overwrite=overwrite
            )
            resumed = _write(workspace, source, plan, adapter, provenance, progress)
        report = Report(
            source=str(hf_path),
            revision=source_revision(source.folder),
            target=str(mlx_path),
            recipe=chosen.name,
            layout=plan.layout,
            dtype=plan.dtype,
            parameters=plan.parameters,
            total_size=plan.total_size,
            source_bytes=sum(tensor.nbytes for tensor in source.tensors.values()),
            bits_per_weight=plan.bits_per_weight,
            shards=tuple(shard.filename for shard in plan.shards),
            resumed=tuple(resumed),
            alternatives=plan.alternatives,
            seconds=time.perf_counter() - began,
            written=not dry_run,
        )
    if measure:
        measured = _measure(
            source.folder, target, chosen, adapter, dry_run=dry_run, progress=progress
        )
        report = replace(report, measured=measured.as_dict(), table=measured.table())
    if upload_repo is not None and not dry_run:
        uploaded_to = card.upload(target, upload_repo, progress=progress is not None)
        report = replace(report, uploaded_to=uploaded_to)
    return report


def _measure(
    folder: Path,
    target: Path,
    recipe: Recipe,
    adapter: Adapter | None,
    *,
    dry_run: bool,
    progress: Progress | None,
) -> Measurement:
    """Compare the recipe and its neighbours with the source; the figures go into the card."""
    from mlx_dgemma.convert import measure

    recipes = measure.neighbours(recipe)
    written = None if dry_run else target
    found = measure.measure(
        folder,
        recipes,
        driver=written,
        adapter=adapter,
        scratch=target.parent,
        convert=convert,
        progress=progress,
    )
    if not dry_run:
        readme = target / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(f"{text}\n## Measured\n\n{found.table()}\n", encoding="utf-8")
        journal = read_json(target / JOURNAL)
        record = {"bytes": readme.stat().st_size, "sha256": file_digest(readme)}
        journal["files"][readme.name] = record
        write_json(target / JOURNAL, journal)
    return found


def _check_quantization(source: Source, name: str, *, dequantize: bool, explicit: bool) -> None:
    if dequantize and not source.quantized:
        raise InputError(f"{name} is not quantized, so there is nothing to dequantize.")
    if source.quantized and not explicit:
        raise InputError(
            f"{name} is quantized already; add -d to dequantize it, "
            "or -q or --recipe to quantize it again."
        )


def as_in(source: Source) -> Recipe:
    """The recipe that packs every matrix as a quantized source does."""
    found: dict[str, Precision | None] = {}
    for name, tensor in source.tensors.items():
        how = packing_of(tensor)
        own = None if how is None else Precision(how.bits, how.group_size, how.mode)
        found[name.removesuffix(".weight")] = own
    ((usual, _),) = Counter(filter(None, found.values())).most_common(1)
    rules = [Rule(name, own) for name, own in found.items() if own != usual]
    return Recipe("as before", "every matrix as the source packs it", usual, tuple(rules))


def _default_dtype(source: Source, *, keep: bool) -> str:
    """The checkpoint's own dtype where nothing changes, else a 16-bit one."""
    own = source.config.text.dtype
    return own if keep or own == "float16" else "bfloat16"


def _write(
    workspace: Workspace,
    source: Source,
    plan: Plan,
    adapter: Adapter | None,
    provenance: dict[str, Any],
    progress: Progress | None,
) -> list[str]:
    """Stream the plan into the workspace and publish it; returns the shards kept from before."""
    with workspace.hold():
        count = _Counter(progress, "checking", sum(s.data_bytes for s in plan.shards))
        resumed = workspace.recover(plan, count)
        workspace.check_space(plan)
        try:
            workspace.write_journal()
            compare_duplicates(source)
            parameters = source.with_adapter(adapter)
            total = sum(tensor.nbytes for tensor in parameters.values())
            write_shards(
                plan,
                source,
                parameters,
                workspace.folder,
                workspace.finished,
                lambda shard, entry: workspace.record(shard.filename, entry),
                _Counter(progress, "converting", total),
            )
            _write_companions(source.folder, workspace, plan, provenance)
            source.check_unchanged()
            workspace.publish()
        except CheckpointError:
            workspace.discard()
            raise
        except OSError as error:
            raise ResourceError(
                f"{workspace.folder}: writing failed ({error.strerror}); what is finished stays, "
                "run the same command again to go on."
            ) from error
    return resumed


def companions(folder: Path) -> list[Path]:
    """The files beside the weights that are copied as they are.

    Raises CheckpointError for a symbolic link that leads out of the folder: the output may be
    published. In the Hub's cache every file of a snapshot is a link into the repository's own
    blobs.
    """
    inside = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        inside.append(folder.absolute().parent.parent.resolve() / "blobs")
    found = []
    for path in sorted({path for pattern in _COMPANIONS for path in folder.glob(pattern)}):
        if path.name in _NOT_COPIED or not os.path.isfile(path):
            continue
        if not any(root in path.resolve().parents for root in inside):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside the checkpoint's folder; copy the "
                "file there, or remove the link."
            )
        found.append(path)
    return found


class _Counter:
    """Adds up bytes for a progress display."""

    def __init__(self, progress: Progress | None, what: str, total: int) -> None:
        self._progress, self._what, self._total, self._done = progress, what, total, 0

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._what, self._done, self._total)


def _write_companions(
    folder: Path, workspace: Workspace, plan: Plan, provenance: dict[str, Any]
) -> None:
    """Everything beside the weights: config, index, tokenizer files, card, digests."""
    out = workspace.folder
    for path in companions(folder):
        shutil.copyfile(path, out / path.name)
    write_json(out / "config.json", dict(sorted(plan.config.items())))
    write_json(out / INDEX, plan.index)
    (out / "README.md").write_text(card.model_card(plan, provenance), encoding="utf-8")
    shards = {shard.filename for shard in plan.shards}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(out.iterdir())
        if path.name not in shards and path.name not in (JOURNAL, ".lock")
    }
    workspace.write_journal(files=files, alternatives=list(plan.alternatives), complete=True)
