"""Loading: both layouts, every quantization, every complaint, and files that are not there."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from configs import config
from mlx.utils import tree_flatten
from plain_checkpoint import random_tensors, write_plain

from mlx_dgemma.benchmark.graph import launches
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.model import ModelConfig
from mlx_dgemma.model.layers import Weights
from mlx_dgemma.model.vision import VisionTower

ORACLES = Path(__file__).parents[1] / "oracles"
IDS = np.arange(1, 41)[None] % 90
CANVAS = mx.array(np.arange(50, 62)[None])


def logits(model):
    cache = model.make_cache()
    model.prefill(IDS, cache)
    first = model.denoise(CANVAS, cache)
    return np.array(model.denoise(CANVAS, cache, first / 0.8))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return logits(load_model(write_plain(tmp_path_factory.mktemp("mlx"))))


def rewritten(tmp_path, change, layout="hf"):
    return load_model(write_plain(tmp_path, layout=layout, change=change))


def split_gate_up(tensors):
    for name in [name for name in tensors if name.endswith("gate_up_proj")]:
        gate, up = mx.split(tensors.pop(name), 2, axis=1)
        prefix = name.removesuffix("gate_up_proj")
        tensors[f"{prefix}gate_proj"], tensors[f"{prefix}up_proj"] = gate, up


def per_expert(tensors):
    split_gate_up(tensors)
    for name in [name for name in tensors if ".experts." in name]:
        prefix, part = name.rsplit(".", 1)
        for index, matrix in enumerate(tensors.pop(name)):
            tensors[f"{prefix}.{index}.{part}.weight"] = matrix


def with_duplicates(tensors):
    """What a saver that does not know about tied weights writes."""
    for name in list(tensors):
        if name.startswith("model.decoder.") and "layer_scalar" not in name:
            tied = name.replace("model.decoder.", "model.encoder.language_model.")
            tensors[tied] = tensors[name]
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    tensors["model.decoder.rotary_emb.inv_freq"] = mx.zeros(4)


def only_the_encoder(tensors):
    """The same weights under the encoder's names alone, the table as lm_head."""
    for name in list(tensors):
        if ".layers." in name and "model.decoder" in name and "layer_scalar" not in name:
            tied = name.replace("model.decoder.", "model.encoder.language_model.")
            tensors[tied] = tensors.pop(name)
    tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")


@pytest.mark.parametrize(
    "change", [lambda _: None, split_gate_up, per_expert, with_duplicates, only_the_encoder]
)
def test_hugging_face_layouts(tmp_path, change, expected):
    np.testing.assert_array_equal(logits(rewritten(tmp_path, change)), expected)


def test_shards_by_index(tmp_path, expected):
    tensors = random_tensors(ModelConfig.from_dict(config()))
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        mx.save_safetensors(str(tmp_path / shard), {name: tensors[name] for name in members})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (tmp_path / "config.json").write_text(json.dumps(config()))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(logits(load_model(tmp_path)), expected)

    index.write_text(json.dumps({"weight_map": weight_map | {"x.weight": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"do not hold: x\.weight"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"\.\./a\.safetensors.*no file of its folder"):
        load_model(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        load_model(tmp_path)


WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "head_dim": 16,
    "global_head_dim": 32,
}
ATTENTION = "model.decoder.layers.0.self_attn"
VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@pytest.mark.parametrize(
    "quantization",
    [
        {"group_size": 64, "bits": 4},
        {"group_size": 32, "bits": 3, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {
            "group_size": 32,
            "bits": 4,
            "mode": "mxfp4",
            "model.decoder.embed_tokens": {"group_size": 64, "bits": 8},  # affine: no mode
            f"{ATTENTION}.q_proj": {"group_size": 32, "bits": 8},  # differs from k and v
            f"{ATTENTION}.o_proj": False,
        },
    ],
    ids=["affine4", "affine3", "mxfp4", "mxfp8", "nvfp4", "mixed"],
)
def test_quantized_equals_its_dequantized_self(tmp_path, quantization):
    """Packed products in float32 against dense products with the dequantized weights."""
    values = config(**WIDE) | {"quantization": quantization}
    folder = write_plain(tmp_path, values)
    dense = load_model(folder)
    assert not any(m.packing for m in dense.modules() if isinstance(m, Weights))

    packed = load_model(folder, lazy=True)  # the published tree: still packed
    kinds = {
        name: module.packing
        for name, module in packed.named_modules()
        if isinstance(module, Weights) and module.packing
    }
    assert len(kinds) > 30
    if "model.decoder.embed_tokens" in quantization:
        assert kinds["model.decoder.embed_tokens"].mode == "affine"
        assert kinds[f"{ATTENTION}.k_proj"].mode == "mxfp4"
        assert f"{ATTENTION}.o_proj" not in kinds
    plain = logits(packed)
    packed.prepare()
    fused = packed.model.decoder.layers[0].self_attn
    assert ("q_proj" in fused) == ("model.decoder.embed_tokens" in quantization)
    for ours in (plain, logits(packed)):
        reference = logits(dense)
        assert np.abs(ours - reference).max() < 1e-4 * np.abs(reference).max()


def test_split_packed_experts_are_joined(tmp_path):
    """Gate and up apart, each packed: the lazily joined halves must not become silent zeros."""

    def split(tensors):
        for name in [name for name in tensors if ".experts.gate_up_proj." in name]:
            gate, up = mx.split(tensors.pop(name), 2, axis=1)
            tensors[name.replace("gate_up_proj", "gate_proj")] = gate
            tensors[name.replace("gate_up_proj", "up_proj")] = up

    values = config(**WIDE) | {"quantization": {"group_size": 64, "bits": 4}}
    whole = load_model(write_plain(tmp_path / "whole", values), lazy=True)
    apart = load_model(write_plain(tmp_path / "apart", values, change=split), lazy=True)
    np.testing.assert_array_equal(logits(apart), logits(whole))


def test_packed_sixteen_bit_scales_compute_in_float32_on_the_cpu_backend(tmp_path):
    """What a model too large to expand does: float32 activations over 16-bit scales."""
    values = config(**WIDE) | {"quantization": {"group_size": 64, "bits": 4}}
    folder = write_plain(tmp_path, values, dtype=mx.bfloat16)
    packed, dense = (load_model(folder, lazy=lazy, dtype=mx.float32) for lazy in (True, False))
    packed.prepare()
    reference = logits(dense)
    assert np.abs(logits(packed) - reference).max() < 1e-4 * np.abs(reference).max()


def test_the_vision_tower_stays_on_disk(tmp_path):
    """Loading reads the text weights; the tower's bytes come with the first image."""
    folder = write_plain(tmp_path, config() | {"vision_config": VISION})
    before = mx.get_active_memory()
    model = load_model(folder)
    tower = sum(tensor.nbytes for _, tensor in tree_flatten(model.model.encoder.vision_tower))
    loaded = mx.get_active_memory() - before
    assert 0 < loaded < tower / 4
    mx.eval(model.model.encoder.vision_tower.parameters())
    assert mx.get_active_memory() - before > tower


def test_sixteen_bit_weights_become_float32_on_the_cpu_backend(tmp_path):
    model = load_model(write_plain(tmp_path, dtype=mx.bfloat16))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert model.dtype == (mx.float32 if on_cpu else mx.bfloat16)
    assert model.model.decoder.norm.weight.dtype == model.dtype
    assert load_model(tmp_path, dtype=mx.bfloat16).embed_scale == 6.9375  # sqrt(48) in bfloat16
    assert load_model(tmp_path, dtype=mx.float32).embed_scale == pytest.approx(48**0.5)


def test_no_tensor_widens_the_activations(tmp_path):
    """A float32 norm among 16-bit weights would turn everything after it into float32."""
    values = config(**WIDE) | {"quantization": {"group_size": 64, "bits": 4}}
    model = load_model(write_plain(tmp_path, values), dtype=mx.bfloat16)
    kinds = {tensor.dtype for _, tensor in tree_flatten(model.parameters())}
    assert kinds == {mx.bfloat16, mx.uint32}
    cache = model.make_cache()
    model.prefill(IDS, cache)
    assert model.hidden(CANVAS, cache).dtype == mx.bfloat16
    assert cache.layers[0].buffers[0].dtype == mx.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """What MLX answers where a GPU is the default device: the CPU, inside a stream of the CPU."""
    entered = []

    @contextmanager
    def stream(where, real=mx.stream):
        entered.append(where)
        with real(where):
            yield
        entered.pop()

    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu if entered else mx.gpu))


@pytest.mark.parametrize("expandable", [True, False])
def test_float32_on_a_gpu_widens_every_tensor_and_unpacks_none(
    tmp_path, monkeypatch, gpu, expandable
):
    if not expandable:
        monkeypatch.setattr("mlx_dgemma.checkpoint.weights.EXPAND_BYTES", 0)
    packing = {"group_size": 64, "bits": 4}
    values = config(**WIDE) | {"vision_config": VISION, "quantization": packing}
    model = load_model(write_plain(tmp_path, values, dtype=mx.bfloat16), dtype=mx.float32)
    tower = model.model.encoder.vision_tower
    for _ in range(2):
        assert {t.dtype for _, t in tree_flatten(model.parameters())} == {mx.float32, mx.uint32}
        assert {t.dtype for _, t in tree_flatten(tower.parameters())} == {mx.float32}
        model.release_vision()
    assert model.model.decoder.embed_tokens.packing is not None


def test_the_vision_tower_is_read_before_it_computes(tmp_path, monkeypatch):
    unread = []

    def look(self, image, dtype):
        unread.append(launches([tensor for _, tensor in tree_flatten(self.parameters())]).total())
        return mx.zeros((1, VISION["hidden_size"]), dtype)

    monkeypatch.setattr(VisionTower, "__call__", look)
    model = load_model(write_plain(tmp_path, config() | {"vision_config": VISION}))
    for _ in range(2):
        model.image_features(None)
        model.release_vision()
    assert unread == [0, 0]


def test_releasing_the_vision_tower_again_and_again_needs_no_more_streams(tmp_path, monkeypatch):
    """Each would keep a thread of its own."""
    made = []
    monkeypatch.setattr(
        mx,
        "new_thread_unsafe_stream",
        lambda where, real=mx.new_thread_unsafe_stream: made.append(where) or real(where),
    )
    model = load_model(write_plain(tmp_path, config() | {"vision_config": VISION}))
    for _ in range(3):
        model.release_vision()
    assert len(made) == 1


def test_every_wrong_tensor_in_one_message(tmp_path):
    def damage(tensors):
        del tensors["model.decoder.norm.weight"]
        tensors["model.decoder.extra"] = mx.zeros(3)
        tensors["model.decoder.layers.0.router.scale"] = mx.zeros(5)
        tensors["model.decoder.layers.1.layer_scalar"] = mx.zeros(1, mx.int32)

    with pytest.raises(CheckpointError) as raised:
        rewritten(tmp_path, damage, "mlx")
    message = str(raised.value)
    assert "missing: model.decoder.norm.weight" in message
    assert "unexpected: model.decoder.extra" in message
    assert "model.decoder.layers.0.router.scale (float32 [5], expected bfloat16 [48])" in message
    assert "model.decoder.layers.1.layer_scalar (int32 [1]" in message
    assert "\n" not in message


def test_a_hundred_missing_tensors_are_all_named_in_few_words(tmp_path):
    def damage(tensors):
        per_expert(tensors)
        for name in [*tensors]:
            if "layer_scalar" in name or ".experts.2." in name or ".self_attn.q_" in name:
                del tensors[name]
        tensors["model.decoder.layers.0.experts.9.spare"] = mx.zeros(1)
        tensors["model.decoder.layers.1.experts.9.spare"] = mx.zeros(1)
        tensors["model.decoder.layers.1.experts.11.spare"] = mx.zeros(1)

    with pytest.raises(CheckpointError) as raised:
        rewritten(tmp_path, damage)
    layers = json.loads((tmp_path / "config.json").read_text())["text_config"]["num_hidden_layers"]
    everywhere = f"model.decoder.layers.{{0-{layers - 1}}}."
    message = str(raised.value)
    assert everywhere + "layer_scalar" in message
    assert everywhere + "self_attn.q_proj.weight" in message
    assert "model.decoder.layers.0.experts.9.spare" in message
    assert "model.decoder.layers.1.experts.{9,11}.spare" in message
    assert " more" not in message


def test_experts_with_a_gap(tmp_path):
    def damage(tensors):
        per_expert(tensors)
        del tensors["model.decoder.layers.1.experts.3.down_proj.weight"]

    with pytest.raises(CheckpointError) as raised:
        rewritten(tmp_path, damage)
    assert "missing: model.decoder.layers.1.experts.down_proj.weight" in str(raised.value)
    assert "layers.1.experts.{0-2,4-7}.down_proj.weight" in str(raised.value)


def test_damaged_files(tmp_path):
    with pytest.raises(ModelNotFoundError):
        load_model(tmp_path / "absent")
    shard = write_plain(tmp_path) / "model.safetensors"
    whole = shard.read_bytes()
    for damaged, named in (
        (whole[:-1], "truncated"),
        (whole[: len(whole) // 2], "truncated"),
        (whole[:50], "truncated or no safetensors"),
        (b"", "truncated or no safetensors"),
        (b"\xff" * 16 + whole[16:], "truncated or no safetensors"),
        (whole[:8] + b"x" + whole[9:], "damaged header"),
        (whole.replace(b'"F32"', b'"F99"', 1), "damaged header"),
        (whole.replace(b'"shape":[97', b'"shape":[98', 1), "damaged header"),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=named):
            load_model(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        load_model(tmp_path)


def test_encoder_and_decoder_scalars_are_two_sets(tmp_path, expected):
    def scale_encoder(tensors):
        name = "model.encoder.language_model.layers.0.layer_scalar"
        tensors[name] = tensors[name] * 2

    model = rewritten(tmp_path, scale_encoder)
    original = load_model(write_plain(tmp_path / "original"))
    empty = [np.array(m.denoise(CANVAS, m.make_cache())) for m in (model, original)]
    np.testing.assert_array_equal(*empty)  # the decoder pass has its own
    assert np.abs(logits(model) - expected).max() > 1e-2


def test_another_thread_may_own_the_model(tmp_path, expected):
    """Loaded here, used there: nothing that is left unread belongs to this thread's stream."""
    folder = write_plain(tmp_path, layout="hf", change=per_expert)
    models = [load_model(folder), load_model(folder, lazy=True)]
    here = logits(models[0])  # its rope tables now exist, made by this thread
    found = []
    thread = threading.Thread(target=lambda: found.extend(logits(model) for model in models))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(here, expected)
    np.testing.assert_array_equal(found[0], expected)
    assert np.abs(found[1] - expected).max() < 1e-4


def test_softcap_is_float32():
    model = load_model.__globals__["Model"](ModelConfig.from_dict(config()), mx.bfloat16)
    raw = mx.array([[-90.0, 0.3, 29.0, 31.25]], mx.bfloat16)
    capped = model.softcap(raw)
    assert capped.dtype == mx.float32
    plain = np.array(raw.astype(mx.float32), np.float64)
    np.testing.assert_allclose(np.array(capped), 30 * np.tanh(plain / 30), rtol=1e-6)


def test_the_real_shapes_load_lazily_in_little_memory(tmp_path):
    """Sparse files with the real names and shapes: 4-bit, 8-bit, bf16 and Hugging Face layout."""
    script = f"import sys; sys.path.insert(0, {str(ORACLES)!r}); import sparse_checkpoint as s; "
    done = subprocess.run(
        [sys.executable, "-c", script + f"s.load_all({str(tmp_path)!r})"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tensors"] == {"4bit": 1647, "8bit": 1647, "bf16": 1047, "hf": 1047}
    assert report["peak_bytes"] < 1 << 30
