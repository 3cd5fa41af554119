"""Plans against the real 4-bit repository, and what rules and widths do to them."""

import json

import pytest
from real_shapes import published_config, write_sparse

from mlx_dgemma.convert.plan import grouped, make_plan, published_dialect
from mlx_dgemma.convert.recipes import (
    MIXES,
    RECIPES,
    Precision,
    Recipe,
    custom,
    fit,
    mix,
    parse_precision,
    parse_rule,
    read_rules,
    recipe_named,
)
from mlx_dgemma.convert.source import dense_shapes, open_source
from mlx_dgemma.errors import InputError
from mlx_dgemma.model.config import ModelConfig

REAL_4BIT_BYTES = 16_542_844_632


def plan_of(raw, recipe, dtype="bfloat16", **kwargs):
    dense = {key: value for key, value in raw.items() if not key.startswith("quantization")}
    config = ModelConfig.from_dict(dense)
    return make_plan(config, raw, dense_shapes(config), recipe, dtype=dtype, **kwargs)


def test_the_4bit_recipe_is_the_published_repository(assets):
    raw = json.loads((assets / "config.json").read_text())
    index = json.loads((assets / "model.safetensors.index.json").read_text())
    plan = plan_of(raw, RECIPES["4bit"])
    assert plan.index["metadata"]["total_size"] == index["metadata"]["total_size"]
    assert plan.index["weight_map"] == index["weight_map"]
    assert list(plan.index["weight_map"]) == list(index["weight_map"])
    assert plan.config == raw
    assert list(plan.config["quantization"]) == list(raw["quantization"])
    assert plan.alternatives == ()


def test_a_sparse_copy_of_the_original_gives_the_published_size(tmp_path):
    shards = write_sparse(tmp_path, published_config())
    assert sum(shard.data_bytes for shard in shards) == 51_647_562_456
    with open_source(tmp_path) as source:
        plan = make_plan(
            source.config,
            source.raw_config,
            dense_shapes(source.config),
            RECIPES["4bit"],
            dtype="bfloat16",
        )
        assert plan.total_size == REAL_4BIT_BYTES
        assert plan.parameters == 25_823_781_228
        assert sum(tensor.nbytes for tensor in source.tensors.values()) == 51_647_562_456


@pytest.mark.parametrize(
    ("recipe", "gigabytes"),
    [
        ("4bit", 16.54),
        ("8bit", 27.97),
        ("bf16", 51.65),
        ("mxfp4", 15.83),
        ("nvfp4", 16.54),
        ("mxfp8", 27.26),
        ("quality", 17.26),
        ("small", 9.64),
    ],
)
def test_sizes_of_the_real_model(recipe, gigabytes):
    plan = plan_of(published_config(), RECIPES[recipe])
    assert plan.total_size / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_every_recipe_leaves_the_vision_tower_alone(config):
    for name in [*RECIPES, *MIXES]:
        plan = plan_of(config, recipe_named(name))
        towers = [step for step in plan.steps if "vision_tower" in step.name]
        assert towers
        assert all(step.precision is None for step in towers), name


def test_quality_spends_on_what_every_token_uses():
    plan = plan_of(published_config(), RECIPES["quality"])
    for step in plan.steps:
        if ".experts." in step.name:
            assert step.precision == Precision(4)
        elif step.precision is not None:
            assert step.precision.bits == 8, step.name


@pytest.mark.parametrize("name", list(MIXES))
def test_mixes_decide_as_mlx_vlm_does(name):
    """mlx-vlm's own predicate on a stand-in with this model's module paths."""
    from types import SimpleNamespace

    from mlx_vlm.convert import mixed_quant_predicate_builder

    raw = published_config()
    plan = plan_of(raw, mix(name))
    steps = {step.name.removesuffix(".weight"): step for step in plan.steps}

    class Layers:
        layers = range(30)

        def named_modules(self):
            # The first name decides where the builder looks for the layer's number.
            return [("model.decoder.layers.0.mlp.down_proj", None)]

    predicate = mixed_quant_predicate_builder(name, Layers())
    for path, step in steps.items():
        if step.precision is None and "vision" not in path:
            continue
        module = SimpleNamespace(weight=SimpleNamespace(shape=(1, 64)), to_quantized=True)
        expected = predicate(path, module)
        if expected is False:
            assert step.precision is None, path
        else:
            assert step.precision == Precision(expected["bits"], expected["group_size"]), path


def test_widths_that_a_group_does_not_divide_get_an_alternative():
    assert fit(Precision(4, 128), 2816) == (Precision(4, 128), None)
    taken, why = fit(Precision(4, 128), 2112)
    assert taken == Precision(4, 64)
    assert "2112" in why
    assert "128" in why
    assert fit(Precision(4, 32, "mxfp4"), 48)[0] is None
    assert fit(Precision(8), 96)[0] == Precision(8, 32)


def test_alternatives_are_reported_by_module():
    plan = plan_of(published_config(), custom(4, 128, "affine"))
    assert any(
        line.startswith("model.decoder.layers.0.experts.down_proj: 704")
        for line in plan.alternatives
    )
    notes = grouped(plan.alternatives)
    assert len(notes) < 10 < len(plan.alternatives)
    assert any("layers.N.experts.down_proj" in note and "(30 times)" in note for note in notes)
    block = plan.config["quantization"]
    assert block["group_size"] == 128
    assert block["model.decoder.layers.0.experts.down_proj"] == {"group_size": 64, "bits": 4}


def test_an_override_says_its_mode_unless_it_is_affine():
    plan = plan_of(published_config(), RECIPES["mxfp4"])
    block = plan.config["quantization"]
    assert (block["mode"], block["group_size"], block["bits"]) == ("mxfp4", 32, 4)
    assert block["model.decoder.embed_tokens"] == {"group_size": 64, "bits": 8}
    mixed = RECIPES["4bit"].with_rules([parse_rule("*.experts.*=mxfp4")])
    block = plan_of(published_config(), mixed).config["quantization"]
    assert block["model.decoder.layers.3.experts.down_proj"]["mode"] == "mxfp4"


def test_rules_overrule_the_recipe_and_the_last_match_decides(config):
    recipe = RECIPES["4bit"].with_rules(
        [parse_rule("*.self_attn.*=6/32"), parse_rule("*.0.self_attn.q_proj=16")]
    )
    steps = {step.name: step.precision for step in plan_of(config, recipe).steps}
    assert steps["model.decoder.layers.1.self_attn.q_proj.weight"] == Precision(6, 32)
    assert steps["model.decoder.layers.0.self_attn.q_proj.weight"] is None
    assert steps["model.decoder.layers.0.mlp.up_proj.weight"] == Precision(8)


def test_a_rule_that_matches_nothing_is_an_error(config):
    with pytest.raises(InputError, match=r"lm_head.*matches no module"):
        plan_of(config, RECIPES["4bit"].with_rules([parse_rule("lm_head*=8")]))


def test_rules_from_files(tmp_path):
    lines = tmp_path / "rules.txt"
    lines.write_text("# attention\n*.self_attn.* = 6/32\n\n*router* = 16\n")
    as_json = tmp_path / "rules.json"
    as_json.write_text('{"*.self_attn.*": "6/32", "*router*": 16}')
    assert read_rules(lines) == read_rules(as_json)
    assert read_rules(lines)[1].precision is None
    as_json.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_rules(as_json)
    with pytest.raises(InputError, match="Cannot read the rules file"):
        read_rules(tmp_path / "absent")


@pytest.mark.parametrize("text", ["7", "4/48", "fp4", "", "mxfp4/16"])
def test_precisions_that_do_not_exist(text):
    with pytest.raises(InputError):
        parse_precision(text)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=r"no recipe 'tiny'.*4bit.*small"):
        recipe_named("tiny")
    with pytest.raises(InputError, match=r"no mix 'mixed_5_6'.*mixed_4_6"):
        mix("mixed_5_6")


def test_custom_changes_the_default_and_keeps_the_table():
    recipe = custom(6, 32, "affine")
    assert recipe.wanted("model.decoder.layers.0.experts.down_proj", 30) == Precision(6, 32)
    assert recipe.wanted("model.decoder.layers.0.router.proj", 30) == Precision(8)
    assert custom(None, None, "affine") is RECIPES["4bit"]
    assert custom(None, None, "nvfp4").default == Precision(4, 16, "nvfp4")
    with pytest.raises(InputError, match="mxfp4 has no 8-bit"):
        custom(8, None, "mxfp4")


def test_bits_per_weight():
    assert Precision(4).bits_per_weight == 4.5
    assert Precision(4, 32, "mxfp4").bits_per_weight == 4.25
    assert Precision(4, 16, "nvfp4").bits_per_weight == 4.5


def test_the_saved_dialect_becomes_the_published_one():
    raw = published_config()
    saved = json.loads(json.dumps(raw))
    text = saved["text_config"]
    del text["global_head_dim"], text["num_global_key_value_heads"]
    text["per_layer_config"] = {
        f"{i:02d}": {"head_dim": 512, "num_key_value_heads": 2} for i in range(5, 30, 6)
    }
    saved["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 100.0}
    target = published_dialect(saved, ModelConfig.from_dict(saved))
    assert ModelConfig.from_dict(target) == ModelConfig.from_dict(raw)
    assert "per_layer_config" not in target["text_config"]
    assert target["vision_config"]["rope_parameters"]["rope_type"] == "default"
    assert saved["text_config"]["per_layer_config"]  # the source's config is left alone


def test_a_recipe_can_be_made_in_python(config):
    recipe = Recipe(
        "mine",
        "experts alone",
        Precision(3),
        (parse_rule("model.*=16"), parse_rule("*.experts.*=3")),
    )
    plan = plan_of(config, recipe)
    assert {s.name.split(".")[4] for s in plan.steps if s.precision} == {"experts"}
