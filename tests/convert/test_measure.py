"""The figures of a recipe: a streamed network is the network, and precision shows in them."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.measure import BY_SIZE, compare, measure, neighbours
from mlx_dgemma.convert.plan import make_plan
from mlx_dgemma.convert.recipes import RECIPES, custom
from mlx_dgemma.convert.source import dense_shapes, open_source
from mlx_dgemma.convert.streamed import Streamed
from mlx_dgemma.convert.trajectories import record

PROMPTS = [[3, 4, 5, 6, 7], [11, 12, 13]]


@pytest.fixture(scope="module")
def states(checkpoint):
    return record(checkpoint, PROMPTS, seed=0, kept=3)


def test_states_come_from_a_real_trajectory(states, checkpoint):
    first = [state for state in states if state.signal is None]
    assert {state.context for state in states} == {tuple(prompt) for prompt in PROMPTS}
    assert len(first) == 2
    assert all(math.isclose(state.temperature, 0.8) for state in first)
    assert all(state.canvas.shape == (8,) for state in states)


@pytest.mark.parametrize("recipe", ["bf16", "4bit"])
def test_layer_by_layer_is_the_network(recipe, states, checkpoint, tmp_path):
    """Against the obvious path of a converted model, for every state."""
    convert(checkpoint, tmp_path / "out", recipe=recipe, dtype="float32")
    model = load_model(tmp_path / "out", dtype=mx.float32)
    with open_source(checkpoint) as source:
        shapes = dense_shapes(source.config)
        plan = make_plan(source.config, source.raw_config, shapes, RECIPES[recipe], dtype="float32")
        streamed = Streamed(source.config, source.tensors, plan, "float32")
        hidden = streamed.hidden(states, lambda: None)
        for state, found in zip(states, hidden, strict=True):
            cache = model.make_cache()
            model.prefill(state.context, cache)
            signal = None if state.signal is None else mx.array(state.signal[None])
            raw = model.raw_logits(model.hidden(mx.array(state.canvas[None]), cache, signal))
            expected, ours = np.array(model.softcap(raw))[0], np.array(streamed.logits(found))
            assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_kl_against_numpy(states, checkpoint):
    with open_source(checkpoint) as source:
        shapes = dense_shapes(source.config)
        plan = make_plan(source.config, source.raw_config, shapes, RECIPES["4bit"], dtype="float32")
        both = []
        for chosen in (None, plan):
            streamed = Streamed(source.config, source.tensors, chosen, "float32")
            both.append((streamed, streamed.hidden(states, lambda: None)))
        figures = compare(plan, states, both[0], both[1])
        expected = []
        for number, state in enumerate(states):
            p, q = (
                np.array(streamed.logits(hidden[number]), dtype=np.float64) / state.temperature
                for streamed, hidden in both
            )
            log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
            expected.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    assert figures.kl_mean == pytest.approx(np.concatenate(expected).mean(), rel=1e-3)
    assert figures.kl_p99 == pytest.approx(np.quantile(np.concatenate(expected), 0.99), rel=1e-3)


def test_fewer_bits_diverge_more(checkpoint):
    recipes = [RECIPES["bf16"], RECIPES["8bit"], RECIPES["4bit"], RECIPES["small"]]
    found = measure(checkpoint, recipes, prompts=PROMPTS)
    divergences = [row.kl_mean for row in found.rows]
    assert divergences[0] == pytest.approx(0.0, abs=1e-7)
    assert divergences == sorted(divergences)
    assert not found.demo
    table = found.table()
    assert all(f"| {recipe.name} |" in table for recipe in recipes)
    assert "hf" in table


def test_neighbours_are_the_next_sizes():
    assert [recipe.name for recipe in neighbours(RECIPES["4bit"])] == ["mxfp4", "4bit", "quality"]
    assert [recipe.name for recipe in neighbours(RECIPES["small"])] == ["small", "mxfp4"]
    mine = custom(6, None, "affine")
    assert mine in neighbours(mine)
    assert set(BY_SIZE) <= set(RECIPES)


def test_the_demo_generates(tmp_path):
    """One prompt through the bundled demo: figures, a label, and nothing left behind."""
    from mlx_dgemma.checkpoint.hub import demo_path

    prompt = [{"role": "user", "content": "Reverse: abcdef"}]
    found = measure(
        demo_path(), [RECIPES["8bit"]], prompts=[prompt], scratch=tmp_path, convert=convert
    )
    assert found.demo
    assert "bundled demo" in found.table()
    row = found.rows[0]
    assert row.steps_per_block >= 1
    assert row.accuracy is None
    assert math.isfinite(row.kl_mean)
    assert list(tmp_path.iterdir()) == []


def test_figures_go_into_the_card_and_its_digest(checkpoint, tmp_path, monkeypatch):
    from mlx_dgemma.convert import measure as room
    from mlx_dgemma.convert.verify import verify

    row = room.Figures("4bit", 1, 4.5, 1e-4, 1e-3, 0.999)
    found = room.Measurement("hf", False, 10, 2, 0, (row,))
    monkeypatch.setattr(room, "measure", lambda *_, **__: found)
    report = convert(checkpoint, tmp_path / "out", quantize=True, measure=True)
    assert report.measured["rows"][0]["kl_mean"] == 1e-4
    assert "| 4bit | 4.50 | 1.00e-04 |" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", forward=False).ok
