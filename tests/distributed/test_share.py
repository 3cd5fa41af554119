"""What each rank holds and reads of a checkpoint, counted without other processes."""

from __future__ import annotations

import json
from math import prod

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.benchmark.synthetic import published_config, synthetic_config
from mlx_dgemma.checkpoint.parts import cut, held_bytes, identity, own_parts, read_part
from mlx_dgemma.checkpoint.sizes import ITEM_SIZE, context_bytes, weight_bytes
from mlx_dgemma.checkpoint.tensorfile import TensorFile
from mlx_dgemma.checkpoint.weights import match, read_headers
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError
from mlx_dgemma.headers import CODES
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.parameters import parameter_shapes
from mlx_dgemma.model.share import Share, bounds

DEMO = ModelConfig.from_folder(CHECKPOINT)
FOUR_BIT = ModelConfig.from_dict(
    {**published_config(), "quantization": synthetic_config("26b-4bit")["quantization"]}
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Names, shapes and bytes of the published 4-bit layout; holes that read as zeros."""
    folder = tmp_path_factory.mktemp("published")
    header, offset = {}, 0
    for name, (shape, dtype) in parameter_shapes(FOUR_BIT).items():
        end = offset + prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_make_the_whole(size):
    """Of every tensor of the demo: each number is held, and once unless all ranks hold it."""
    headers = read_headers(CHECKPOINT)
    sources = match(DEMO, headers, "demo")
    wholes = {name: mx.arange(prod(source.shape(headers))) for name, source in sources.items()}
    for name, whole in wholes.items():
        shape = sources[name].shape(headers)
        parts = [Share(rank, size).part(DEMO, name) for rank in range(size)]
        if parts[-1] is None:
            continue
        held = [cut(whole.reshape(shape), part) for part in parts if part is not None]
        for array, part in zip(held, [part for part in parts if part is not None], strict=True):
            assert array.shape == part.shape(shape), name
        numbers = np.concatenate([np.array(array).reshape(-1) for array in held])
        found, times = np.unique(numbers, return_counts=True)
        assert found.size == whole.size, name
        repeats = "k_proj" in name or "v_proj" in name
        assert repeats or (times == 1).all(), name


def test_parts_are_read_as_they_are_cut():
    headers = read_headers(CHECKPOINT)
    sources = match(DEMO, headers, "demo")
    path = next(iter(headers.values())).path
    tensors = mx.load(str(path))
    with_parts = own_parts(
        Share(1, 2), DEMO, {n: s.read(tensors) for n, s in sources.items()}, sources, headers
    )
    assert not any("vision" in name or "self_conditioning" in name for name in with_parts)
    for name, array in with_parts.items():
        part = Share(1, 2).part(DEMO, name)
        whole = sources[name].read(tensors)
        expected = whole if part is None else cut(whole, part)
        assert array.dtype == expected.dtype, name
        assert mx.array_equal(array, expected).item(), name


@pytest.mark.parametrize(("size", "most"), [(2, 0.54), (4, 0.30), (8, 0.21)])
def test_no_rank_holds_much_more_than_its_share(size, most, published):
    headers = read_headers(published)
    sources = match(FOUR_BIT, headers, "published")
    whole = sum(entry.nbytes for entry in headers.values())
    for rank in range(size):
        share = Share(rank, size)
        held = sum(held_bytes(headers, sources, FOUR_BIT, share).values())
        assert held <= most * whole, (rank, held / whole)
        assert held == weight_bytes(FOUR_BIT, share=share), "what the memory plan counts"
        context = context_bytes(share.config(FOUR_BIT), 8192)
        assert context <= 0.55 * context_bytes(FOUR_BIT, 8192)


def test_only_a_ranks_bytes_are_read(published, monkeypatch):
    """Rows where they lie; a tensor that is cut by columns is read through, and its part kept."""
    read = []
    monkeypatch.setattr(TensorFile, "_read_into", lambda _, view, at: read.append(len(view)))
    file = TensorFile(published / "model.safetensors")
    share, layer = Share(1, 2), "model.decoder.layers.5."
    for name, fraction in (
        ("self_attn.q_proj.weight", 1 / 2),
        ("experts.gate_up_proj.weight", 6 / 11),
        ("experts.gate_up_proj.scales", 6 / 11),
        ("mlp.up_proj.weight", 17 / 33),
        ("self_attn.o_proj.weight", 1.0),
    ):
        read.clear()
        name = layer + name
        whole = file.entries[name].nbytes
        held = read_part(file, name, share.part(FOUR_BIT, name))
        assert sum(read) == round(whole * fraction), name
        assert "experts" not in name or max(read) < whole / 128, "one expert at a time"
        assert held.nbytes <= round(whole * 6 / 11), name
    file.close()


def test_how_many_machines_are_possible():
    for size in (2, 4, 8):
        Share(0, size).check(FOUR_BIT)
    with pytest.raises(
        InputError, match=r"3 machines, as it has 16 attention heads: use 2 or 4 or 8"
    ):
        Share(0, 3).check(FOUR_BIT)
    with pytest.raises(InputError, match="704 in groups of 64"):
        Share(0, 16).check(FOUR_BIT)
    assert bounds(11, 4) == [(0, 2), (2, 5), (5, 8), (8, 11)]


def test_checkpoints_are_told_apart(tmp_path):
    """By a number in any tensor that changed where it is looked at, and by the config."""
    headers = read_headers(CHECKPOINT)
    known = identity(b"{}", headers)
    assert identity(b"{}", headers) == known
    assert identity(b"{ }", headers) != known
    some = dict(list(headers.items())[:-1])
    assert identity(b"{}", some) != known
