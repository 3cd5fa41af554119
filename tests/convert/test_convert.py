"""Numbers: what is written is what MLX quantizes, from every form of source."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.recipes import RECIPES, Precision, parse_rule
from mlx_dgemma.convert.shards import file_digest
from mlx_dgemma.convert.verify import verify
from mlx_dgemma.errors import CheckpointError, InputError


def stored_name(name):
    """A Hugging Face name in the community's layout."""
    return (
        f"{name}.weight" if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else name
    )


def assert_quantized(read, folder, tensors, dtype=mx.bfloat16, kept=None):
    """Every tensor of `folder` is MLX's own quantization of the source's; or what is `kept`, of a
    module that the source holds in the same precision."""
    config = json.loads((folder / "config.json").read_text())
    block = config.get("quantization") or {}
    found = read(folder)
    for name, values in tensors.items():
        name = stored_name(name)
        module = name.removesuffix(".weight")
        source = mx.array(values).astype(dtype)
        if f"{module}.scales" not in found:
            assert found[name].dtype == dtype
            assert mx.array_equal(found.pop(name), source), name
            continue
        how = block.get(module, {k: v for k, v in block.items() if not isinstance(v, dict)})
        parts = mx.quantize(source, how["group_size"], how["bits"], how.get("mode", "affine"))
        if kept is not None and how["bits"] == kept["bits"]:
            parts = [kept[f"{module}.{suffix}"] for suffix in ("weight", "scales", "biases")]
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            assert mx.array_equal(found.pop(f"{module}.{suffix}"), part), f"{module}.{suffix}"
    assert not found


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_writes_what_mlx_quantizes(
    recipe, checkpoint, tensors, tmp_path, read_tensors
):
    target = tmp_path / "out"
    report = convert(checkpoint, target, recipe=recipe)
    assert_quantized(read_tensors, target, tensors)
    stored = sum(array.nbytes for array in read_tensors(target).values())
    assert report.total_size == stored
    assert report.written
    assert not target.with_name("out.partial").exists()


def test_many_slices_and_shards_change_nothing(checkpoint, tmp_path, read_tensors, monkeypatch):
    whole = tmp_path / "whole"
    convert(checkpoint, whole, quantize=True)
    monkeypatch.setattr("mlx_dgemma.convert.source.slices.__defaults__", (40_000,))
    parts = tmp_path / "parts"
    report = convert(checkpoint, parts, quantize=True, shard_bytes=30_000)
    assert len(report.shards) > 10
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.shards)
    expected, found = read_tensors(whole), read_tensors(parts)
    assert expected.keys() == found.keys() == index["weight_map"].keys()
    assert all(mx.array_equal(expected[name], found[name]) for name in expected)


def split_experts(tensors):
    found = {}
    for name, values in tensors.items():
        if name.endswith("gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            found[name.replace("gate_up", "gate")] = gate
            found[name.replace("gate_up", "up")] = up
        else:
            found[name] = values
    return found


def single_experts(tensors):
    found = {}
    for name, values in split_experts(tensors).items():
        prefix, _, projection = name.partition(".experts.")
        if projection:
            for number, expert in enumerate(values):
                found[f"{prefix}.experts.{number}.{projection}.weight"] = expert
        else:
            found[name] = values
    return found


def with_duplicates(tensors):
    found = dict(tensors)
    found["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    name = "model.decoder.layers.1.experts.down_proj"
    found[name.replace("decoder", "encoder.language_model")] = tensors[name]
    name = "model.decoder.layers.2.self_attn.q_proj.weight"
    found[name.replace("decoder", "encoder.language_model")] = tensors[name]
    return found


@pytest.mark.parametrize("form", [split_experts, single_experts, with_duplicates])
def test_other_savers_forms_give_the_same_files(
    form, config, tensors, checkpoint, write, tmp_path, read_tensors
):
    source = write(tmp_path / "source", config, form(tensors), shards=3)
    convert(source, tmp_path / "out", quantize=True)
    assert_quantized(read_tensors, tmp_path / "out", tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_precisions_of_a_source(dtype, config, tensors, write, tmp_path, read_tensors):
    config["dtype"] = config["text_config"]["dtype"] = dtype
    source = write(tmp_path / "source", config, tensors, dtype=getattr(mx, dtype))
    report = convert(source, tmp_path / "out", quantize=True)
    written = {"float32": "bfloat16", "float16": "float16"}[dtype]
    assert report.dtype == written
    assert_quantized(read_tensors, tmp_path / "out", tensors, getattr(mx, written))
    copied = convert(source, tmp_path / "copy")
    assert copied.dtype == dtype
    assert_quantized(read_tensors, tmp_path / "copy", tensors, getattr(mx, dtype))


def test_requantize_and_dequantize(checkpoint, tensors, tmp_path, read_tensors):
    convert(checkpoint, tmp_path / "eight", recipe="8bit")
    with pytest.raises(InputError, match="quantized already"):
        convert(tmp_path / "eight", tmp_path / "copy")
    convert(tmp_path / "eight", tmp_path / "same", requantize=True)
    stored, again = (read_tensors(tmp_path / name) for name in ("eight", "same"))
    assert set(stored) == set(again)
    assert all(mx.array_equal(tensor, again[name]) for name, tensor in stored.items())
    blocks = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("eight", "same")]
    assert blocks[0]["quantization"] == blocks[1]["quantization"]
    convert(tmp_path / "eight", tmp_path / "dense", dequantize=True)
    dense = read_tensors(tmp_path / "dense")
    name = "model.decoder.layers.0.experts.down_proj.weight"
    packed = mx.quantize(mx.array(tensors[name.removesuffix(".weight")]).astype(mx.bfloat16), 64, 8)
    assert mx.array_equal(dense[name], mx.dequantize(*packed, 64, 8))
    assert "quantization" not in json.loads((tmp_path / "dense/config.json").read_text())
    with pytest.raises(InputError, match="is not quantized"):
        convert(checkpoint, tmp_path / "again", dequantize=True)

    convert(tmp_path / "eight", tmp_path / "four", recipe="4bit")
    as_dense = {
        key.replace(".weight", "") if ".experts." in key else key: np.array(
            value.astype(mx.float32)
        )
        for key, value in dense.items()
    }
    assert_quantized(read_tensors, tmp_path / "four", as_dense, kept={**stored, "bits": 8})


def test_to_hf_and_back(checkpoint, tensors, tmp_path, read_tensors):
    convert(checkpoint, tmp_path / "mlx")
    report = convert(tmp_path / "mlx", tmp_path / "hf", to_hf=True)
    assert report.layout == "hf"
    found = read_tensors(tmp_path / "hf")
    assert found.keys() == tensors.keys()
    assert all(
        mx.array_equal(found[name].astype(mx.float32), mx.array(tensors[name])) for name in found
    )
    with pytest.raises(InputError, match="goes without -q"):
        convert(checkpoint, tmp_path / "no", to_hf=True, quantize=True)


def test_our_loader_computes_with_what_was_written(checkpoint, tmp_path):
    """The 4-bit model's logits are those of its dequantized copy."""
    convert(checkpoint, tmp_path / "four", quantize=True, dtype="float32")
    convert(tmp_path / "four", tmp_path / "dense", dequantize=True)
    logits = []
    for name in ("four", "dense"):
        model = load_model(tmp_path / name, dtype=mx.float32)
        cache = model.make_cache()
        model.prefill([[3, 4, 5, 6]], cache)
        logits.append(np.array(model.denoise(mx.arange(8)[None] + 10, cache)))
    assert np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max() < 1e-4


def test_companions_are_copied_and_digests_recorded(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out", recipe="quality")
    out = tmp_path / "out"
    assert (out / "tokenizer_config.json").read_text() == "{}"
    assert (out / "generation_config.json").exists()
    journal = json.loads((out / "conversion.json").read_text())
    assert journal["complete"]
    assert journal["recipe"] == "quality"
    for name, record in {**journal["shards"], **journal["files"]}.items():
        assert record["sha256"] == file_digest(out / name)
    listed = {*journal["shards"], *journal["files"], "conversion.json"}
    assert {path.name for path in out.iterdir()} == listed
    card = (out / "README.md").read_text()
    assert "quality" in card
    assert "bits per weight" in card


def test_rules_and_custom_bits_reach_the_files(checkpoint, tensors, tmp_path, read_tensors):
    rules = [parse_rule("*.self_attn.*=6/32"), parse_rule("*router*=16")]
    convert(checkpoint, tmp_path / "out", q_bits=3, rules=rules)
    assert_quantized(read_tensors, tmp_path / "out", tensors)
    block = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert block["bits"] == 3
    assert block["model.decoder.layers.0.self_attn.q_proj"] == Precision(6, 32).as_config(
        full=False
    )


def test_dry_run_writes_nothing(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "out", recipe="small", dry_run=True)
    assert not report.written
    assert report.total_size > 0
    assert list(tmp_path.iterdir()) == []


def test_conflicting_choices_are_refused(checkpoint, tmp_path):
    for flags in (
        {"recipe": "4bit", "q_bits": 4},
        {"recipe": "4bit", "quant_predicate": "mixed_4_6"},
        {"dequantize": True, "quantize": True},
        {"quant_predicate": "mixed_4_6", "q_mode": "mxfp4"},
        {"dtype": "float8"},
    ):
        with pytest.raises(InputError):
            convert(checkpoint, tmp_path / "out", **flags)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte_once(checkpoint, tmp_path):
    seen = []
    report = convert(
        checkpoint, tmp_path / "out", quantize=True, progress=lambda *event: seen.append(event)
    )
    converted = [event for event in seen if event[0] == "converting"]
    assert converted[-1][1] == converted[-1][2] == report.source_bytes
    assert [event[1] for event in converted] == sorted(event[1] for event in converted)


def test_nan_and_overflow_are_told_apart(config, tensors, write, tmp_path):
    damaged = dict(tensors)
    name = "model.decoder.layers.3.mlp.up_proj.weight"
    damaged[name] = tensors[name].copy()
    damaged[name][5, 7] = np.nan
    source = write(tmp_path / "nan", config, damaged)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or Inf"):
        convert(source, tmp_path / "out", quantize=True)
    damaged[name][5, 7] = 1e6
    source = write(tmp_path / "large", config, damaged)
    with pytest.raises(CheckpointError, match="beyond the range of float16"):
        convert(source, tmp_path / "out", quantize=True, dtype="float16")
    assert not list(tmp_path.glob("out*"))


def test_a_folder_reached_by_relative_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(checkpoint, "mlx_model", quantize=True)
    assert (Path("mlx_model") / "config.json").exists()


def test_nan_in_weights_that_no_prompt_reaches(config, tensors, write, tmp_path):
    """Loading does not look at every number: `verify` does, and what meets one says so."""
    damaged = dict(tensors)
    name = next(n for n in tensors if "vision" in n and tensors[n].ndim == 2)
    damaged[name] = tensors[name].copy()
    damaged[name][0, 1] = np.nan
    source = write(tmp_path / "nan", config, damaged)
    model = load_model(source)
    cache = model.make_cache()
    model.prefill([2, 5, 6], cache)
    assert bool(mx.isfinite(model.denoise(mx.array([[1, 2, 3, 4]]), cache)).all())
    assert verify(source).problems == (f"{name} holds NaN or Inf.",)
