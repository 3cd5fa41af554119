"""Reading a checkpoint folder: shards, layouts, and every complaint in one message.

Headers are checked before a tensor is touched. Tensors are read lazily, when first used; the
vision tower stays on disk until an image arrives.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma.checkpoint.adapters import read_adapter
from mlx_dgemma.checkpoint.merged import refuse_merged
from mlx_dgemma.checkpoint.parts import drop_absent, own_parts
from mlx_dgemma.checkpoint.sources import Source
from mlx_dgemma.distributed.team import Team
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import reading_weights
from mlx_dgemma.headers import INDEX, SINGLE, Entry, read_header, read_weight_map
from mlx_dgemma.model.config import DTYPES as FLOATS
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.float16 import use_unit
from mlx_dgemma.model.layers import Weights
from mlx_dgemma.model.low_rank import LowRank
from mlx_dgemma.model.names import MOST_NAMES, VISION_TOWER, is_tied_duplicate, tied_to, together
from mlx_dgemma.model.network import Model
from mlx_dgemma.model.packing import quantization_of
from mlx_dgemma.model.parameters import matrices, parameter_shapes

# On the CPU backend quantized and 16-bit products are slow, and 16-bit ones inaccurate: a model
# whose float32 weights fit in this many bytes is expanded at load.
EXPAND_BYTES = 2 << 30
_EXPERTS = re.compile(
    r"(?P<experts>model\.decoder\.layers\.\d+\.experts)\.(?:(?P<expert>\d+)\.)?"
    r"(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)(?:\.(?P<suffix>weight|scales|biases))?"
)
# Tensors that other savers write and no network needs: rope tables, bounds of unclipped layers.
_IGNORED = re.compile(r"rotary_emb\.|\.(?:input|output)_(?:min|max)$")


def load_model(
    folder: str | Path,
    lazy: bool = False,
    dtype: mx.Dtype | None = None,
    adapter_path: str | Path | None = None,
    unit: int = 1,
    team: Team | None = None,
) -> Model:
    """Read a DiffusionGemma checkpoint folder, in either layout.

    lazy: read no weights and keep the published parameter tree. Otherwise the text weights are
        read now, and q/k/v and gate/up are joined.
    dtype: of activations; by default the checkpoint's, and float32 on MLX's CPU backend, where a
        model under EXPAND_BYTES is also expanded to float32 weights.
    adapter_path: an adapter of PEFT's or mlx-lm's form, whose deltas stay beside the weights.
    unit: in which both branches of a layer compute, see `model.float16`.
    team: the processes that hold the model together; of what they divide this one reads its part
        alone, also with `lazy`.
    Raises ModelNotFoundError or CheckpointError.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    headers = read_headers(folder)
    sources = match(config, headers, str(folder))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if adapter_path is not None:
        refuse_merged(folder, Path(adapter_path))
    adapter = None if adapter_path is None else read_adapter(adapter_path, config)
    stored = getattr(mx, sources["model.decoder.norm.weight"].dtype(headers))
    model = Model(config, dtype or (mx.float32 if on_cpu else stored), team)

    # What stays unread belongs to no thread, so that any thread may be the first to use it.
    unbound = mx.new_thread_unsafe_stream(mx.cpu)
    with mx.stream(unbound):
        tensors: dict[str, mx.array] = {}
        for path in sorted({header.path for header in headers.values()}):
            tensors.update(_load_shard(path))
        parameters = {name: source.read(tensors) for name, source in sources.items()}
    if model.share is not None:
        with reading_weights(folder):
            parameters = own_parts(model.share, config, parameters, sources, headers)
        drop_absent(model, parameters)
    if adapter is not None:
        parameters |= adapter.own_parameters(model.share, config)
    fill(model, parameters)
    if unit > 1:
        with mx.stream(unbound):
            use_unit(model, unit)
    if not lazy:
        with reading_weights(folder):
            settle(model, unbound)
    if adapter is not None:
        adapter.attach(model)
    if model.local.vision is not None:
        model.reread_vision = partial(
            _leave_vision_unread,
            sources=sources,
            headers=headers,
            settled=not lazy,
            unbound=unbound,
        )
    return model


def _leave_vision_unread(
    model: Model,
    sources: Mapping[str, Source],
    headers: Mapping[str, Entry],
    settled: bool,
    unbound: mx.Stream,
) -> None:
    """Put the vision tower back on the disk, as it was before the first image."""
    names = [name for name in sources if name.startswith(VISION_TOWER)]
    widened = _is_widened(model)
    with mx.stream(unbound):
        tensors: dict[str, mx.array] = {}
        for path in sorted({headers[part].path for n in names for part in sources[n].parts}):
            tensors.update(_load_shard(path))
        fill(model, {name: sources[name].read(tensors) for name in names})
        if settled:
            _convert(model, model.model.encoder.vision_tower, widened)


def settle(model: Model, unbound: mx.Stream | None = None) -> None:
    """Bring a filled model into the form that this backend computes in, and read its weights.

    On the CPU backend in float32 a small model becomes dense, laid out for its matrix product, and
    a large one keeps its 16-bit weights: twice their size is too much.
    unbound: where tensors that stay unread are converted once somebody reads them.
    """
    widened = _is_widened(model)
    with mx.stream(unbound or mx.new_thread_unsafe_stream(mx.cpu)):
        small = _convert(model, model, widened)
    model.prepare()
    if small:
        for module in model.model.decoder.modules():
            if isinstance(module, Weights):
                module.store_transposed()
    mx.eval(model.model.decoder.parameters())
    mx.eval(model.model.encoder.language_model.parameters())


def _is_widened(model: Model) -> bool:
    """Whether this is the CPU backend in float32.

    Ask before a stream of the CPU is entered: inside, the CPU is the default device everywhere.
    """
    return mx.default_device() == mx.Device(mx.cpu) and model.dtype == mx.float32


def _convert(model: Model, part: nn.Module, widened: bool) -> bool:
    """Bring a part of the model into the form that `settle` describes; True for a small model."""
    small = widened and _dense_bytes(model.config) <= EXPAND_BYTES
    if small:
        expand(model, part)
    if small or not widened:
        cast(model, part)
    return small


def fill(model: Model, parameters: Mapping[str, mx.array]) -> None:
    """Put named tensors into the tree, where packed matrices take the place of dense ones."""
    for name in parameters:
        path = name.removesuffix(".scales")
        packing = quantization_of(model.config.quantization, path)
        if path != name and packing is not None:
            parent, attribute = _find(model, path)
            held = parent[attribute]
            if isinstance(held, LowRank):
                parent, attribute, held = held, "linear", held.linear
            parent[attribute] = held.pack(packing)
    for name, tensor in parameters.items():
        module, attribute = _find(model, name)
        module[attribute] = tensor


def expand(model: Model, part: nn.Module | None = None) -> None:
    """Make every matrix dense in the activation dtype, in the model or a part of it; what is
    unread stays unread."""
    part = model if part is None else part
    for name, module in part.named_modules():
        if isinstance(module, Weights):
            parent, attribute = _find(part, name)
            parent[attribute] = module.dense(model.dtype)


def cast(model: Model, part: nn.Module | None = None) -> None:
    """Bring every float tensor to the activation dtype, so that none widens the activations."""
    (model if part is None else part).apply(
        lambda tensor: (
            tensor.astype(model.dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
        )
    )


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor the folder's shards hold; CheckpointError on a missing or damaged shard."""
    index = folder / INDEX
    if not os.path.exists(index):
        if not os.path.exists(folder / SINGLE):
            raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}; download it again.")
        return read_header(folder / SINGLE).entries

    weight_map = read_weight_map(index)
    headers: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        headers.update(read_header(folder / shard).entries)
    absent = [name for name in weight_map if name not in headers]
    if absent:
        raise CheckpointError(f"{index} lists tensors its shards do not hold: {together(absent)}.")
    return headers


def match(config: ModelConfig, headers: Mapping[str, Entry], source: str) -> dict[str, Source]:
    """Parameter name -> where it comes from, for exactly the parameters of the network.

    Raises CheckpointError that names every missing, unexpected and misshapen tensor.
    """
    sources, strays = _sources(headers)
    scaled = {name.removesuffix(".scales") for name in sources if name.endswith(".scales")}
    table = parameter_shapes(config, "mlx", scaled)
    unused = [name for name in sources if name not in table and not _IGNORED.search(name)]
    complaints = [
        ("missing", [name for name in table if name not in sources]),
        ("unexpected", strays + unused),
    ]
    found = [f"{kind}: {together(names)}" for kind, names in complaints if names]
    misshapen = _misshapen(table, sources, headers)
    if misshapen:
        more = len(misshapen) - MOST_NAMES
        listed = ", ".join(misshapen[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")
        found.append(f"misshapen: {listed}")
    if found:
        raise CheckpointError(f"{source} does not fit its config.json; " + "; ".join(found) + ".")
    return {name: sources[name] for name in table}


def _misshapen(
    table: Mapping[str, tuple[tuple[int, ...], str]],
    sources: Mapping[str, Source],
    headers: Mapping[str, Entry],
) -> list[str]:
    wrong = []
    for name, (shape, dtype) in table.items():
        if name not in sources:
            continue
        found, kind = sources[name].shape(headers), sources[name].dtype(headers)
        allowed = FLOATS if dtype in FLOATS else (dtype,)
        if found != shape or kind not in allowed:
            is_now = "parts that do not match" if found is None else f"{kind} {list(found)}"
            wrong.append(f"{name} ({is_now}, expected {dtype} {list(shape)})")
    return wrong


def _sources(headers: Mapping[str, Entry]) -> tuple[dict[str, Source], list[str]]:
    """Sort the files' tensors into parameters; strays belong nowhere."""
    plain: dict[str, Source] = {}
    experts: dict[tuple[str, str, str], dict[int | None, str]] = {}
    strays: list[str] = []
    for name in headers:
        logical = tied_to(name) if is_tied_duplicate(name) else name
        if logical != name and logical in headers:
            continue
        found = _EXPERTS.fullmatch(logical)
        if found is None:
            plain[logical] = Source("tensor", (name,))
            continue
        expert = None if found["expert"] is None else int(found["expert"])
        key = (found["experts"], found["part"], found["suffix"] or "weight")
        slots = experts.setdefault(key, {})
        if expert in slots and logical != name:
            continue
        slots[expert] = name

    stacked: dict[tuple[str, str, str], Source] = {}
    for key, slots in experts.items():
        if None in slots:
            stacked[key] = Source("tensor", (slots[None],))
        elif sorted(s for s in slots if s is not None) == list(range(len(slots))):
            rows = tuple(Source("tensor", (slots[i],)) for i in range(len(slots)))
            stacked[key] = Source("stack", rows)
        else:
            strays += slots.values()
    for (prefix, part, suffix), source in stacked.items():
        if part in ("gate_up_proj", "down_proj"):
            plain[f"{prefix}.{part}.{suffix}"] = source
        elif part == "gate_proj":
            up = stacked.get((prefix, "up_proj", suffix))
            if up is None:
                plain[f"{prefix}.{part}.{suffix}"] = source
            else:
                plain[f"{prefix}.gate_up_proj.{suffix}"] = Source("gate_up", (source, up))
        elif (prefix, "gate_proj", suffix) not in stacked:
            plain[f"{prefix}.{part}.{suffix}"] = source
    return plain, strays


def _load_shard(path: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(path), format="safetensors")  # type: ignore[return-value]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _find(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds what has this name in the checkpoint, and its attribute."""
    *path, attribute = name.split(".")
    module: Any = model
    for step in path:
        module = _within(module, step)
        module = module[int(step)] if isinstance(module, list) else module[step]
    return _within(module, attribute), attribute


def _within(module: Any, step: str) -> Any:
    """The module itself, or the linear map whose place a low-rank delta took."""
    return module.linear if isinstance(module, LowRank) and step not in module else module


def _dense_bytes(config: ModelConfig) -> int:
    """float32 bytes of all text matrices."""
    return 4 * sum(
        math.prod(shape)
        for name, shape in matrices(config).items()
        if not name.startswith(VISION_TOWER)
    )
