"""Every mistake is one sentence, the source is untouched and nothing half-written stays."""

import json
import shutil
from collections import namedtuple

import mlx.core as mx
import pytest

from mlx_dgemma.convert import convert
from mlx_dgemma.errors import CheckpointError, InputError, ModelNotFoundError, ResourceError


@pytest.fixture
def source(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "source")


@pytest.fixture
def sharded(write, config, tensors, tmp_path):
    return write(tmp_path / "source", config, tensors, shards=3)


def refused(source, tmp_path, error, match, **flags):
    with pytest.raises(error, match=match) as caught:
        convert(source, tmp_path / "out", quantize=True, **flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard(sharded, tmp_path):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(sharded, tmp_path, CheckpointError, "truncated")


def test_a_file_that_is_no_safetensors(source, tmp_path):
    (source / "model.safetensors").write_bytes(b"<!DOCTYPE html>")
    refused(source, tmp_path, CheckpointError, r"truncated or no safetensors file")


def test_a_damaged_header(source, tmp_path):
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:30] = b"!!!!!!!!!!"
    path.write_bytes(content)
    refused(source, tmp_path, CheckpointError, "damaged header")


def test_a_missing_shard(sharded, tmp_path):
    (sharded / "model-00003-of-00003.safetensors").unlink()
    refused(sharded, tmp_path, CheckpointError, "model-00003-of-00003.safetensors is missing")


def test_an_index_that_promises_too_much(sharded, tmp_path):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.decoder.extra"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    refused(sharded, tmp_path, CheckpointError, "model.decoder.extra")


def test_missing_unexpected_and_misshapen_tensors_in_one_message(write, config, tensors, tmp_path):
    damaged = dict(tensors)
    del damaged["model.decoder.norm.weight"]
    damaged["model.decoder.surprise"] = tensors["model.decoder.norm.weight"]
    scalar = "model.decoder.layers.0.layer_scalar"
    damaged[scalar] = tensors["model.decoder.norm.weight"]
    source = write(tmp_path / "source", config, damaged)
    match = r"missing: model.decoder.norm.weight.*unexpected: model.decoder.surprise.*layer_scalar"
    refused(source, tmp_path, CheckpointError, match)


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("lm_head.weight", "model.decoder.embed_tokens.weight"),
        (
            "model.encoder.language_model.layers.0.experts.down_proj",
            "model.decoder.layers.0.experts.down_proj",
        ),
    ],
)
def test_duplicates_that_disagree(copy, original, write, config, tensors, tmp_path):
    source = write(tmp_path / "source", config, {**tensors, copy: tensors[original] + 1})
    refused(source, tmp_path, CheckpointError, f"{copy}.*one tied weight")


def test_the_same_tensor_in_two_shards_that_disagree(sharded, tmp_path):
    name = "model.decoder.norm.weight"
    for number in (1, 2, 3):
        path = sharded / f"model-{number:05d}-of-00003.safetensors"
        held = mx.load(str(path))
        if name in held:
            continue
        mx.eval(held)
        held[name] = mx.zeros((128,), mx.bfloat16)
        mx.save_safetensors(str(path), held)
        break
    refused(sharded, tmp_path, CheckpointError, f"{name} in .*different numbers")


def test_another_model(source, tmp_path):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
    refused(source, tmp_path, CheckpointError, "llama")


def test_a_folder_without_a_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, CheckpointError, "config.json")
    refused(tmp_path / "nowhere", tmp_path, ModelNotFoundError, "nowhere")


def test_float8_sources_are_refused(write, config, tensors, tmp_path):
    source = write(tmp_path / "source", config, tensors)
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["model.decoder.norm.weight"]
    begin, end = entry["data_offsets"]
    entry.update(dtype="F8_E4M3", shape=[end - begin])
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    refused(source, tmp_path, CheckpointError, "model.decoder.norm.weight")


def test_too_little_disk(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 1000))
    refused(source, tmp_path, ResourceError, "MB are needed and 0 MB are free")
    assert not list(tmp_path.glob("*.partial"))


def test_a_target_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out", quantize=True)


def test_a_full_disk_while_writing(source, tmp_path, monkeypatch):
    from mlx_dgemma.convert.shards import ShardWriter

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", full)
    refused(source, tmp_path, ResourceError, "No space left on device.*run the same command again")


def test_targets_that_would_destroy_something(source, tmp_path):
    with pytest.raises(InputError, match="cannot be the source"):
        convert(source, source, quantize=True, overwrite=True)
    with pytest.raises(InputError, match="cannot be the source"):
        convert(source, source / "inner", quantize=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="add --overwrite"):
        convert(source, tmp_path / "notes", quantize=True)
    with pytest.raises(InputError, match="holds no checkpoint"):
        convert(source, tmp_path / "notes", quantize=True, overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_overwrite_replaces_a_checkpoint_whole(source, tmp_path):
    convert(source, tmp_path / "out", recipe="8bit")
    (tmp_path / "out" / "stale.txt").write_text("old")
    with pytest.raises(InputError, match="exists"):
        convert(source, tmp_path / "out", recipe="4bit")
    convert(source, tmp_path / "out", recipe="4bit", overwrite=True)
    assert json.loads((tmp_path / "out/conversion.json").read_text())["recipe"] == "4bit"
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failed_overwrite_keeps_the_old_checkpoint(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "out", recipe="8bit")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mlx_dgemma.convert.conversion._write_companions", fail)
    with pytest.raises(ResourceError, match="Input/output error"):
        convert(source, tmp_path / "out", recipe="4bit", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_source_is_never_touched(source, tmp_path):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    convert(source, tmp_path / "out", quantize=True)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    assert before == after
