"""LoRA adapters made and merged by peft itself, against ours: merged and applied at load."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.adapters import read_adapter
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.model.config import ModelConfig

BOTH_QO = r"model\.(decoder|encoder\.language_model)\.layers\.\d+\.self_attn\.[qo]_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from random_checkpoint import Dims, write

    dims = Dims(hidden=64, dense=64, expert_width=64, canvas=8, dtype="float32")
    return write(tmp_path_factory.mktemp("base"), dims)


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
    """(folder, wrapped model) of an adapter with these settings."""
    from peft_adapters import make_adapter

    def make(**settings):
        folder = tmp_path_factory.mktemp("adapter")
        return folder, make_adapter(base, folder, **settings)

    return make


SETTINGS = {
    "linear": {"r": 4, "lora_alpha": 8, "target_modules": BOTH_QO},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": BOTH_QO,
        "rank_pattern": {"o_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    },
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": BOTH_QO, "use_rslora": True},
    "experts": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": BOTH_QO,
        "target_parameters": [
            f"{side}.layers.0.experts.{name}"
            for side in ("decoder", "encoder.language_model")
            for name in ("gate_up_proj", "down_proj")
        ],
        "rank_pattern": {"down_proj": 3},
    },
    "down alone": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": BOTH_QO,
        "target_parameters": [
            "decoder.layers.1.experts.down_proj",
            "encoder.language_model.layers.1.experts.down_proj",
        ],
    },
}


def pefts_deltas(wrapped):
    """Weight name -> delta of the decoder's modules, as peft itself computes it. (Its merged model
    is no oracle: it adds the encoder's delta to the tied weight as well.)"""
    found = {}
    for name, module in wrapped.named_modules():
        if not hasattr(module, "get_delta_weight") or ".decoder." not in name:
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", "weight")
        found[f"{path}.{parameter}"] = module.get_delta_weight("default").detach().numpy()
    return found


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_merging_equals_pefts(kind, make, base, tmp_path, read_tensors):
    folder, wrapped = make(**SETTINGS[kind], same_encoder=True)
    convert(base, tmp_path / "out", to_hf=True, adapter_path=folder)
    found, before = read_tensors(tmp_path / "out"), read_tensors(base)
    deltas = pefts_deltas(wrapped)
    assert len(deltas) == len(read_adapter(folder, ModelConfig.from_folder(base)).decoder)
    assert len(deltas) >= 5
    for name, tensor in found.items():
        if name not in before:
            continue
        expected = np.array(before[name]) + deltas.pop(name, 0.0)
        ours = np.array(tensor)
        assert np.abs(ours - expected).max() < 1e-5 * max(1.0, np.abs(expected).max()), name
    assert not deltas


def logits_of(model):
    cache = model.make_cache()
    model.prefill([[3, 4, 5, 6]], cache)
    return np.array(model.denoise(mx.arange(8)[None] + 10, cache))


def test_applied_at_load_equals_merged(make, base, tmp_path):
    folder, _ = make(**SETTINGS["experts"], same_encoder=True)
    convert(base, tmp_path / "merged", adapter_path=folder)
    expected = logits_of(load_model(tmp_path / "merged"))
    ours = logits_of(load_model(base, adapter_path=folder))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(ours - logits_of(load_model(base))).max() > 1e-2
    unread = load_model(base, adapter_path=folder, lazy=True)
    with ThreadPoolExecutor(1) as another:  # what is unread belongs to no thread
        lazy = another.submit(logits_of, unread).result()
    assert np.abs(lazy - expected).max() < 1e-4 * np.abs(expected).max()


def test_kinds_that_cannot_be_merged(make, base):
    config = ModelConfig.from_folder(base)
    for settings, match in (
        ({"r": 4, "target_modules": BOTH_QO, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 4, "target_modules": BOTH_QO, "lora_bias": True}, "lora_bias"),
        (
            {"r": 4, "target_modules": r"model\.decoder\.embed_tokens"},
            "embedding table",
        ),
        ({"r": 4, "target_modules": ["lm_head"]}, "embedding table"),
    ):
        folder, _ = make(**settings)
        with pytest.raises(CheckpointError, match=match):
            read_adapter(folder, config)


def test_damaged_and_foreign_adapters(make, base, tmp_path):
    config = ModelConfig.from_folder(base)
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json"):
        read_adapter(tmp_path, config)
    good, _ = make(**SETTINGS["experts"], same_encoder=True)

    def changed(edit, name):
        folder = shutil.copytree(good, tmp_path / name)
        tensors = mx.load(str(folder / "adapter_model.safetensors"))
        mx.eval(tensors)
        edit(tensors)
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
        return folder

    first = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(CheckpointError, match="lora_B only"):
        read_adapter(changed(lambda t: t.pop(first), "half"), config)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        read_adapter(changed(lambda t: t.update({first: t[first] * float("nan")}), "nan"), config)
    with pytest.raises(CheckpointError, match="another model"):
        read_adapter(changed(lambda t: t.update({first: t[first][:, :32]}), "narrow"), config)
    with pytest.raises(CheckpointError, match="no low-rank delta"):
        read_adapter(changed(lambda t: t.update({"x.magnitude": t[first]}), "stray"), config)
    (good / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="copy the adapter again"):
        read_adapter(good, config)
    settings = json.loads((good / "adapter_config.json").read_text())
    (good / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="IA3"):
        read_adapter(good, config)


RANK = 256
PAIR_BYTES = 4 * RANK * (128 + 4 * 32)  # A and B of a q_proj of the converter tests' model


@pytest.fixture
def large(tmp_path, tensors):
    """An adapter of every q_proj, larger than the weights it changes, written without peft."""
    generator = np.random.default_rng(2)
    names = [name for name in tensors if name.endswith("self_attn.q_proj.weight")]
    matrices = {}
    for name in names:
        rows, columns = tensors[name].shape
        for side, shape in {"A": (RANK, columns), "B": (rows, RANK)}.items():
            values = generator.standard_normal(shape).astype(np.float32) * 0.01
            for both in ("decoder", "encoder.language_model"):
                module = name.removesuffix(".weight").replace("decoder", both)
                key = f"base_model.model.{module}.lora_{side}.weight"
                matrices[key] = mx.array(values)
    folder = tmp_path / "large"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), matrices)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, names


def peak_of(work):
    """(result, bytes held afterwards, most bytes held meanwhile) beside what was there before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = work()
    return result, mx.get_active_memory() - before, mx.get_peak_memory() - before


def test_an_adapter_stays_in_its_file(large, checkpoint, tmp_path):
    """Checking it reads a matrix at a time, converting with it a pair at a time."""
    folder, names = large
    config = ModelConfig.from_folder(checkpoint)
    adapter, held, peak = peak_of(lambda: read_adapter(folder, config))
    assert len(adapter.deltas) == len(names) >= 6
    assert held == 0
    assert peak < 3 * PAIR_BYTES
    _, _, plain = peak_of(lambda: convert(checkpoint, tmp_path / "plain"))
    _, _, merged = peak_of(lambda: convert(checkpoint, tmp_path / "out", adapter_path=folder))
    assert merged < plain + 6 * PAIR_BYTES  # both passes' pairs are compared
