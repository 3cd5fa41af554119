"""LoRA adapters made and merged by peft itself, against ours: merged and applied at load."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.adapters import merge_parameters, read_adapter
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.model.config import ModelConfig

DECODER_Q = r"model\.decoder\.layers\.\d+\.self_attn\.[qo]_proj"
BOTH_Q = r"model\.(decoder|encoder\.language_model)\.layers\.\d+\.self_attn\.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from random_checkpoint import Dims, write

    dims = Dims(hidden=64, dense=64, expert_width=64, canvas=8, dtype="float32")
    return write(tmp_path_factory.mktemp("base"), dims)


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
    """Train-free adapters: peft wraps the model, every LoRA weight is drawn at random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    torch.set_num_threads(2)

    def make(*, same_encoder=False, zero_encoder=False, **settings):
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(base, dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(**settings))
        torch.manual_seed(1)
        parameters = dict(wrapped.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.1)
            for name, parameter in parameters.items():
                if "lora_" in name and "encoder.language_model" in name:
                    if same_encoder:
                        parameter.copy_(
                            parameters[name.replace("encoder.language_model", "decoder")]
                        )
                    if zero_encoder and "lora_B" in name:
                        parameter.zero_()
        folder = tmp_path_factory.mktemp("adapter")
        wrapped.save_pretrained(folder)
        return folder, wrapped

    return make


SETTINGS = {
    "linear": {"r": 4, "lora_alpha": 8, "target_modules": DECODER_Q},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": DECODER_Q,
        "rank_pattern": {"o_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    },
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": DECODER_Q, "use_rslora": True},
    "experts": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": DECODER_Q,
        "target_parameters": [
            "decoder.layers.0.experts.gate_up_proj",
            "decoder.layers.0.experts.down_proj",
        ],
        "rank_pattern": {"down_proj": 3},
    },
    "down alone": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": DECODER_Q,
        "target_parameters": ["decoder.layers.1.experts.down_proj"],
    },
}


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_merging_equals_pefts(kind, make, base, tmp_path, read_tensors):
    folder, wrapped = make(**SETTINGS[kind])
    convert(base, tmp_path / "out", to_hf=True, adapter_path=folder)
    found = read_tensors(tmp_path / "out")
    merged = wrapped.merge_and_unload()
    changed = 0
    before = read_tensors(base)
    for name, parameter in merged.named_parameters(remove_duplicate=False):
        if name not in found:
            continue
        ours, theirs = np.array(found[name]), parameter.detach().numpy()
        assert np.abs(ours - theirs).max() < 1e-5 * max(1.0, np.abs(theirs).max()), name
        changed += not np.array_equal(np.array(before[name]), ours)
    assert changed == len(read_adapter(folder, ModelConfig.from_folder(base)).deltas)
    assert changed >= 5


def logits_of(model):
    cache = model.make_cache()
    model.prefill([[3, 4, 5, 6]], cache)
    return np.array(model.denoise(mx.arange(8)[None] + 10, cache))


def test_applied_at_load_equals_merged(make, base, tmp_path):
    folder, _ = make(**SETTINGS["experts"])
    convert(base, tmp_path / "merged", adapter_path=folder)
    expected = logits_of(load_model(tmp_path / "merged"))
    ours = logits_of(load_model(base, adapter_path=folder))
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(ours - logits_of(load_model(base))).max() > 1e-2
    unread = load_model(base, adapter_path=folder, lazy=True)
    with ThreadPoolExecutor(1) as another:  # what is unread belongs to no thread
        lazy = another.submit(logits_of, unread).result()
    assert np.abs(lazy - expected).max() < 1e-4 * np.abs(expected).max()


def test_applied_to_a_quantized_model(make, base, tmp_path):
    """Two roundings, so within two quantization steps of the merged matrix."""
    folder, _ = make(**SETTINGS["experts"])
    convert(base, tmp_path / "eight", recipe="8bit", dtype="float32")
    convert(base, tmp_path / "merged", adapter_path=folder, dtype="float32")
    ours = load_model(tmp_path / "eight", adapter_path=folder, lazy=True)
    merged = load_model(tmp_path / "merged", lazy=True)
    for number in (0, 1):
        for path in (("self_attn", "q_proj"), ("experts", "down_proj")):
            found, expected = (
                model.model.decoder.layers[number][path[0]][path[1]] for model in (ours, merged)
            )
            step = float(found.scales.max())
            dense = found.dense(mx.float32)
            assert mx.abs(dense.weight - expected.weight).max().item() <= 2 * step


def test_encoder_deltas_must_be_the_decoders(make, base):
    config = ModelConfig.from_folder(base)
    differing, _ = make(r=4, target_modules=BOTH_Q)
    with pytest.raises(CheckpointError, match="trained apart"):
        read_adapter(differing, config)
    equal, _ = make(r=4, target_modules=BOTH_Q, same_encoder=True)
    assert len(read_adapter(equal, config).deltas) == 5
    encoder_alone, _ = make(r=4, target_modules=BOTH_Q.replace("decoder|", ""))
    with pytest.raises(CheckpointError, match="trained apart"):
        read_adapter(encoder_alone, config)
    untrained, _ = make(r=4, target_modules=BOTH_Q.replace("decoder|", ""), zero_encoder=True)
    assert read_adapter(untrained, config).deltas == {}


def test_kinds_that_cannot_be_merged(make, base):
    config = ModelConfig.from_folder(base)
    for settings, match in (
        ({"r": 4, "target_modules": DECODER_Q, "use_dora": True}, "use_dora"),
        ({"r": 4, "target_modules": DECODER_Q, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 4, "target_modules": DECODER_Q, "lora_bias": True}, "lora_bias"),
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
    good, _ = make(**SETTINGS["experts"])

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
    with pytest.raises(CheckpointError, match="missing or damaged"):
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
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        for side, shape in {"A": (RANK, columns), "B": (rows, RANK)}.items():
            values = generator.standard_normal(shape).astype(np.float32) * 0.01
            matrices[f"{lora}{side}.weight"] = mx.array(values)
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
    assert merged < plain + 3 * PAIR_BYTES


def test_merging_at_load_replaces_one_tensor_after_the_other(large, checkpoint):
    folder, _ = large
    config = ModelConfig.from_folder(checkpoint)
    parameters = mx.load(str(checkpoint / "model.safetensors"))
    mx.eval(parameters)
    before = {name: np.array(tensor.astype(mx.float32)) for name, tensor in parameters.items()}
    adapter = read_adapter(folder, config)
    _, held, peak = peak_of(lambda: merge_parameters(parameters, adapter, config, read=True))
    assert held < 2 * PAIR_BYTES
    assert peak < 4 * PAIR_BYTES
    for name, tensor in parameters.items():
        changed = not np.array_equal(np.array(tensor.astype(mx.float32)), before[name])
        assert changed == (name in adapter.deltas)
