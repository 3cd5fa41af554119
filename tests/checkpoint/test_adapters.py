"""Loaded adapters against the UNMERGED peft model: each delta acts in its own pass."""

import json
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch", reason="peft on PyTorch is the oracle")
pytest.importorskip("peft", reason="peft is the oracle")
sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

from peft_adapters import BOTH, DECODER, ENCODER, LINEAR, make_adapter, reference_of, save_as_mlx
from random_checkpoint import Dims, write
from transformers_oracle import assert_close

from mlx_dgemma.checkpoint.adapter_folder import adapter_bytes
from mlx_dgemma.checkpoint.adapters import read_adapter
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.config import ModelConfig

IDS = np.array([[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 3, 23, 8, 4, 6, 26, 43, 38]])
CANVAS = np.arange(8)[None] + 10
EXPERTS = [
    "decoder.layers.0.experts.gate_up_proj",
    "decoder.layers.0.experts.down_proj",
    "decoder.layers.3.experts.down_proj",
]
BOTH_EXPERTS = [*EXPERTS, *(n.replace("decoder", "encoder.language_model") for n in EXPERTS)]
OTHER = r"|model\.decoder\.self_conditioning\.\w+_proj|model\.decoder\.layers\.\d+\.router\.proj"
KINDS = {
    "decoder alone": {"target_modules": DECODER + LINEAR + OTHER},
    "encoder alone": {"target_modules": ENCODER + LINEAR},
    "both equal": {"target_modules": BOTH + LINEAR, "same_encoder": True},
    "both different": {"target_modules": BOTH + LINEAR},
    "untrained encoder": {"target_modules": BOTH + LINEAR, "zero_encoder": True},
    "some projections": {
        "target_modules": BOTH + r"(self_attn\.k_proj|self_attn\.v_proj|mlp\.up_proj)",
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {r"layers\.[12]\.self_attn\.k_proj": 3},
        "use_rslora": True,
    },
    "dora of the decoder": {"target_modules": DECODER + LINEAR, "use_dora": True},
    "dora of both, equal": {
        "target_modules": BOTH + r"(self_attn\.[ko]_proj|mlp\.(up|down)_proj)",
        "use_dora": True,
        "same_encoder": True,
    },
    "experts of the decoder": {"target_modules": DECODER + LINEAR, "target_parameters": EXPERTS},
    "experts of both": {"target_modules": BOTH + LINEAR, "target_parameters": BOTH_EXPERTS},
    "experts of both, equal": {
        "target_modules": BOTH + LINEAR,
        "target_parameters": BOTH_EXPERTS,
        "same_encoder": True,
    },
}
EQUAL = [kind for kind in KINDS if "equal" in kind]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints in 32 and 16 bits, and quantized ones, each with what they hold dequantized."""
    dims = Dims(hidden=64, dense=64, expert_width=64, canvas=8)
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for name in ("float32", "bfloat16"):
        folder = write(root / name, dims.with_(dtype=name))
        found[name] = (folder, folder)
    for recipe in ("8bit", "4bit", "mxfp4"):
        packed, dense = root / recipe, root / f"{recipe}-dense"
        convert(found["float32"][0], packed, recipe=recipe, dtype="float32")
        convert(packed, dense, dequantize=True, to_hf=True, dtype="float32")
        found[recipe] = (packed, dense)
    return found


# What the second step is told of a first one: the same for both sides, so that rounding in one
# step is not magnified by the next.
SIGNAL = np.random.default_rng(3).standard_normal((1, 8, 97)).astype(np.float32) * 3


def ours(model):
    """Logits of a first step, and of one that is conditioned on SIGNAL."""
    cache = model.make_cache()
    model.prefill(IDS, cache)
    steps = (None, mx.array(SIGNAL))
    return [np.array(model.denoise(mx.array(CANVAS), cache, signal)) for signal in steps]


def theirs(wrapped):
    reference = reference_of(wrapped)
    reference.prefill(IDS)
    return [reference.denoise(CANVAS, signal) for signal in (None, SIGNAL)]


@pytest.fixture(scope="module")
def adapted(bases, tmp_path_factory):
    """(checkpoint, adapter folder, wrapped model, its logits) of a kind and a base, made once."""

    @cache
    def adapted(kind, base="float32"):
        loaded, dense = bases[base]
        folder = tmp_path_factory.mktemp("adapter")
        wrapped = make_adapter(dense, folder, r=4, lora_alpha=8, **KINDS[kind])
        return loaded, folder, wrapped, theirs(wrapped)

    return adapted


def check(model, expected):
    """Unapplied, or applied in the wrong pass, the deltas move the logits by a tenth and more."""
    for one, other in zip(ours(model), expected, strict=True):
        assert_close(one, other, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unmerged_model_is_the_oracle(kind, adapted):
    loaded, folder, _, expected = adapted(kind)
    model = load_model(loaded, adapter_path=folder)
    check(model, expected)
    plain = ours(load_model(loaded))
    assert np.abs(ours(model)[0] - plain[0]).max() > 0.05 * np.abs(plain[0]).max()
    # Both passes run the same layers only where their deltas are the same.
    assert (model.encoder_pass.layers is None) == (kind in EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("bfloat16", "both different"),
        ("8bit", "experts of both"),
        ("4bit", "both different"),
        ("4bit", "dora of the decoder"),
        ("4bit", "experts of both"),
        ("mxfp4", "experts of both"),
    ],
)
def test_on_16_bit_and_quantized_bases(base, kind, adapted):
    loaded, folder, _, expected = adapted(kind, base)
    check(load_model(loaded, adapter_path=folder), expected)
    check(load_model(loaded, adapter_path=folder, lazy=True), expected)


@pytest.mark.parametrize("base", ["float32", "4bit"])
def test_mlx_lms_form_acts_in_both_passes(base, adapted, tmp_path):
    loaded, _, wrapped, expected = adapted("both equal", base)
    save_as_mlx(wrapped, tmp_path, scale=2.0)
    model = load_model(loaded, adapter_path=tmp_path)
    check(model, expected)
    assert model.encoder_pass.layers is None


def test_mlx_lms_form_of_experts(adapted, tmp_path):
    """The same numbers in both forms give the same logits, both expert matrices included."""
    loaded, folder, _, expected = adapted("experts of both, equal")
    adapter = read_adapter(folder, ModelConfig.from_folder(loaded))
    tensors = {}
    for name, delta in adapter.decoder.items():
        factors = delta.read()
        turned = len(delta.shape) == 3
        module = name.removesuffix(".weight")
        tensors[f"{module}.lora_a"] = factors.a.swapaxes(-1, -2) if turned else factors.a
        tensors[f"{module}.lora_b"] = factors.b.swapaxes(-1, -2) if turned else factors.b
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert sum(".experts." in name for name in adapter.decoder) == len(EXPERTS)
    check(load_model(loaded, adapter_path=tmp_path), expected)
    assert adapter_bytes(tmp_path) == sum(t.nbytes for t in tensors.values())
    assert adapter_bytes(folder) == 2 * adapter_bytes(tmp_path)
    assert adapter_bytes(tmp_path / "absent") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_only_equal_deltas_are_merged(kind, adapted, tmp_path):
    loaded, folder, _, expected = adapted(kind)
    out = tmp_path / "merged"
    if kind in EQUAL:
        convert(loaded, out, adapter_path=folder, dtype="float32")
        check(load_model(out), expected)
        return
    how = "in the (encoder|decoder) alone" if "alone" in kind else "(differently|alone)"
    with pytest.raises(CheckpointError, match=rf"{how}.*give --adapter-path when"):
        convert(loaded, out, adapter_path=folder)
    assert not list(tmp_path.iterdir())


def test_a_context_belongs_to_both_passes_deltas(adapted):
    kinds = ("decoder alone", "encoder alone", "both different", "experts of both")
    loaded = adapted(kinds[0])[0]
    prints = [load_model(loaded).fingerprint()]
    for kind in kinds:
        folder = adapted(kind)[1]
        prints.append(load_model(loaded, adapter_path=folder).fingerprint())
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 9}))
        prints.append(load_model(loaded, adapter_path=folder).fingerprint())
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert len(set(prints)) == len(prints) == 9
