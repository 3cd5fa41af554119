"""config.json: the real one, both dialects, and one sentence for everything unsupported."""

import contextlib
import copy
import json

import pytest
from configs import REAL, config, needs_real
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.errors import CheckpointError, ModelNotFoundError
from mlx_dgemma.model.config import FULL, SLIDING, ModelConfig
from mlx_dgemma.model.generation_config import GenerationConfig


def saved(**layers):
    """The same in the dialect that transformers saves."""
    values = config()
    text = values["text_config"]
    per_layer = {"2": {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": 1}}
    del text["num_global_key_value_heads"]
    text["per_layer_config"] = per_layer | layers
    return values


@needs_real
def test_the_real_config():
    real = ModelConfig.from_folder(REAL)
    text = real.text
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (30, 2816, 262_144)
    assert [i for i in range(30) if not text.is_sliding(i)] == [5, 11, 17, 23, 29]
    assert (text.head_dim_of(0), text.kv_heads_of(0), text.window_of(0)) == (256, 8, 1024)
    assert (text.head_dim_of(5), text.kv_heads_of(5), text.window_of(5)) == (512, 2, None)
    assert (real.canvas_length, text.max_position_embeddings) == (256, 262_144)
    assert real.stop_ids == {1, 106, 50}
    assert real.vision is not None
    assert (real.vision.num_hidden_layers, real.vision.pooling_kernel_size) == (27, 3)
    assert real.generation == GenerationConfig(eos_token_id=(1, 106, 50))


@pytest.mark.parametrize("key", ["2", "02", "002"])
def test_both_dialects_are_one_config(key):
    values = saved()
    layers = values["text_config"]["per_layer_config"]
    layers[key] = layers.pop("2")
    assert ModelConfig.from_dict(values).text == ModelConfig.from_dict(config()).text


def test_vision_rope_names_are_one():
    vision = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    parsed = [
        ModelConfig.from_dict(
            config() | {"vision_config": vision | {"rope_parameters": {"rope_type": name}}}
        ).vision
        for name in ("default", "axial")
    ]
    assert parsed[0] == parsed[1] is not None


def test_layer_types_default_to_five_sliding_one_full():
    values = config(num_hidden_layers=8)
    del values["text_config"]["layer_types"]
    kinds = ModelConfig.from_dict(values).text.layer_types
    assert kinds == (SLIDING,) * 5 + (FULL, SLIDING, FULL)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model_type", "gemma3", "not a DiffusionGemma"),
        ("model_type", None, "not a DiffusionGemma"),
        ("tie_word_embeddings", False, "is not supported"),
        ("text_config.tie_word_embeddings", False, "is not supported"),
        ("text_config.use_bidirectional_attention", "all", "is not supported"),
        ("text_config.attention_bias", True, "is not supported"),
        ("text_config.hidden_activation", "silu", "is not supported"),
        (f"text_config.rope_parameters.{FULL}.factor", 8.0, "is not supported"),
        (f"text_config.rope_parameters.{SLIDING}.rope_type", "yarn", "is not supported"),
        ("text_config.hidden_size", None, "is missing"),
        ("text_config.hidden_size", "48", "must be an integer"),
        ("text_config.hidden_size", True, "must be an integer"),
        ("text_config.rms_norm_eps", -1.0, "must be a number"),
        ("text_config.final_logit_softcapping", 0, "must be greater than 0"),
        ("text_config.top_k_experts", 9, "exceeds"),
        ("text_config.num_key_value_heads", 3, "must divide"),
        ("text_config.num_global_key_value_heads", 3, "must divide"),
        ("text_config.head_dim", 15, "must be even"),
        ("text_config.layer_types", [SLIDING, FULL], "3 entries"),
        ("text_config.layer_types", [FULL, FULL, SLIDING], "must end with"),
        ("text_config.layer_types", [SLIDING, "linear", FULL], "must be a list of"),
        ("text_config", [], "must be a JSON object"),
        ("canvas_length", 0, "at least 1"),
        ("dtype", "int8", "is not supported"),
        ("quantization", {"bits": 4}, "is missing"),
        ("quantization", {"bits": 4, "group_size": 64, "mode": "q4_k"}, "is not supported"),
        ("quantization", {"quant_method": "gptq", "bits": 4}, "convert the checkpoint"),
        ("generation_config", {"t_min": 0.9}, "exceeds t_max"),
        ("generation_config", {"eos_token_id": "</s>"}, "token id"),
        ("generation_config", {"sampler_config": {"_cls_name": "Other"}}, "is not supported"),
    ],
)
def test_one_sentence_names_file_key_and_value(path, value, named):
    values = copy.deepcopy(config())
    *parents, key = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[key] = value
    with pytest.raises(CheckpointError) as raised:
        ModelConfig.from_dict(values, source="somewhere/config.json")
    message = str(raised.value)
    assert "config.json" in message
    assert named in message
    assert message.endswith(".")
    assert "\n" not in message
    if path not in ("text_config", "quantization", "generation_config"):
        assert key in message


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from(["", "vision", "²", "affine"]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["0", "2", "²", "bits"]), st.integers(-1, 64), max_size=2),
)


@settings(max_examples=300)
@given(value=JSON, dialect=st.sampled_from([config, saved]), data=st.data())
def test_any_value_anywhere_parses_or_is_refused(value, dialect, data):
    """Never another exception: users see one sentence."""
    values = dialect() | {"quantization": {"bits": 4, "group_size": 32, "a.b": {"bits": 8}}}
    values |= {"generation_config": {"sampler_config": {"entropy_bound": 0.1}}}
    section = values
    while True:
        key = data.draw(st.sampled_from([*section, "quantization_config", "per_layer_config"]))
        if not isinstance(section.get(key), dict) or data.draw(st.booleans()):
            break
        section = section[key]
    section[key] = value
    parsed = None
    with contextlib.suppress(CheckpointError):
        parsed = ModelConfig.from_dict(values)
    assert parsed is None or parsed.text.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"0": {"head_dim": 8}}, "differs from the other sliding layers"),
        ({"7": {"head_dim": 8}}, "names no layer"),
        ({"x": {"head_dim": 8}}, "names no layer"),
    ],
)
def test_per_layer_config_that_cannot_be_served(layers, named):
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_dict(saved(**layers))


def test_contradicting_dialects():
    values = saved()
    values["text_config"]["global_head_dim"] = 64
    with pytest.raises(CheckpointError, match="contradicts per_layer_config, which says 32"):
        ModelConfig.from_dict(values)


def test_stop_ids_prefer_the_most_specific_file():
    nested = config() | {"generation_config": {"eos_token_id": [1, 7, 9]}}
    assert ModelConfig.from_dict(config()).stop_ids == {1, 7}
    assert ModelConfig.from_dict(nested).stop_ids == {1, 7, 9}
    own = {"eos_token_id": 3, "t_max": None}
    assert ModelConfig.from_dict(nested, generation=own).stop_ids == {3}
    without = config()
    del without["eos_token_id"]
    assert ModelConfig.from_dict(without).stop_ids == frozenset()  # never text_config's


def test_generation_defaults_survive_nulls():
    nulls = {"t_max": None, "entropy_bound": None, "sampler_config": None}
    assert ModelConfig.from_dict(config(), generation=nulls).generation == GenerationConfig(
        eos_token_id=(1, 7)
    )


def test_folders_that_are_no_checkpoints(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no folder"):
        ModelConfig.from_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert ModelConfig.from_folder(tmp_path).stop_ids == {1, 2}
