"""Which positions a step computes: the rule by itself, and the decoder pass over some of them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import infill, load, replay, stream_generate
from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.constraints import Constraint
from mlx_dgemma.decoding import active_positions
from mlx_dgemma.decoding.active_positions import ActivePositions, Marks, sizes
from mlx_dgemma.decoding.canvas import CanvasRequest, Pins, Start
from mlx_dgemma.decoding.canvas_state import CanvasState
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.events import Commit, Finish
from mlx_dgemma.decoding.settings import PRESETS, DecodingSettings
from mlx_dgemma.demo.tasks import held_out
from mlx_dgemma.generate import encode_prompt
from mlx_dgemma.model.canvas_subset import CanvasKeys, Held, Subset

from .driving import drive

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from configs import config
from plain_checkpoint import write_plain

LENGTH = 32
TURBO = DecodingSettings(**PRESETS["turbo"])


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def context(demo):
    model, tokenizer = demo
    cache = model.make_cache()
    model.prefill(encode_prompt(tokenizer, "Write a sentence about the fox."), cache)
    return cache


@pytest.fixture(scope="module")
def networks(demo, tmp_path_factory):
    """By dtype: the demo, and in 16 bits a random network of quantized experts, which MLX's CPU
    backend multiplies in them."""
    narrow = config(hidden_size=64, intermediate_size=64, moe_intermediate_size=64, head_dim=32)
    packed = {"quantization": {"group_size": 32, "bits": 8, "mode": "affine"}}
    folder = write_plain(tmp_path_factory.mktemp("packed") / "checkpoint", {**narrow, **packed})
    half = {name: load_model(folder, dtype=getattr(mx, name)) for name in ("float16", "bfloat16")}
    return {"float32": demo[0], **half}


# The rule


def marks(length=LENGTH, **given):
    """Marks of one canvas on which all is accepted and unchanged, but for what is given."""
    found = {"accepted": True, "unchanged": True, "ends": False}
    arrays = {name: np.full((1, length), value) for name, value in found.items()}
    for name, positions in given.items():
        arrays[name][0, positions] = not found[name]
    return Marks(**arrays)


def after(steps, *, rest=True, pinned=(), entropies=None):
    """The state after steps that computed what was chosen before them."""
    known = np.zeros((1, LENGTH), dtype=bool)
    known[0, list(pinned)] = True
    state = ActivePositions.initial(known, rest=rest, whole=False)
    for number, step in enumerate(steps):
        entropy = np.zeros((1, LENGTH), dtype=np.float32)
        if entropies:
            for position, value in entropies[number].items():
                entropy[0, position] = value
        state.after(step, entropy, state.chosen())
    return state


def chosen(state):
    return np.flatnonzero(state.chosen()[0]).tolist()


def test_the_sizes_of_the_published_canvas_are_few():
    assert sizes(256) == [32, 64, 96, 128, 192, 256]
    assert sizes(32) == [4, 8, 12, 16, 24, 32]
    assert sizes(1) == [1]


def test_a_position_rests_once_it_was_accepted_twice_and_nothing_moved():
    noise = [3, 4, 20]
    assert chosen(after([])) == list(range(LENGTH))
    assert chosen(after([marks(accepted=noise)])) == list(range(LENGTH))
    state = after([marks(accepted=noise)] * 2)
    assert sorted(np.flatnonzero(~state.steady[0])) == noise
    assert set(noise) < set(chosen(state))
    assert len(chosen(state)) == 4


def test_a_position_whose_canvas_or_draft_moves_does_not_rest():
    state = after([marks(), marks(unchanged=[9])])
    assert not state.steady[0, 9]


@pytest.mark.parametrize("what", ["accepted", "unchanged", "entropy"])
def test_what_unsettles_a_position_wakes_its_neighbours(what):
    last = marks() if what == "entropy" else marks(**{what: [10]})
    # Position 10 is kept from resting, so that it is computed when it changes.
    steps = [marks(), marks(unchanged=[10]), marks(unchanged=[10]), last]
    state = after(steps, entropies=[{}, {}, {}, {10: 0.2 if what == "entropy" else 0.0}])
    assert np.flatnonzero(~state.steady[0]).tolist() == [8, 9, 10, 11, 12]
    quiet = after([*steps[:3], marks()])
    assert not (~quiet.steady[0]).any()


def test_noise_wakes_nothing():
    """Positions that were not accepted change in every step; that is no news for the others."""
    state = after([marks(accepted=[10], unchanged=[10])] * 4)
    assert np.flatnonzero(~state.steady[0]).tolist() == [10]


def test_room_goes_to_what_rested_longest():
    state = after([marks(accepted=[5])] * 2)
    computed = set()
    for _ in range(12):
        computed |= set(chosen(state))
        state.after(marks(accepted=[5]), np.zeros((1, LENGTH), np.float32), state.chosen())
    assert len(chosen(state)) == 4
    assert computed == set(range(LENGTH))  # three of 31 others a step


def test_a_resting_position_that_is_not_accepted_is_computed_again():
    state = after([marks(), marks(), marks()])
    resting = next(at for at in range(LENGTH) if at not in chosen(state))
    state.after(marks(accepted=[resting]), np.zeros((1, LENGTH), np.float32), state.chosen())
    assert resting in chosen(state)


@pytest.mark.parametrize("rest", [False, True])
def test_what_follows_a_settled_stop_id_is_left_out_until_it_moves(rest):
    noise = list(range(20, LENGTH))
    first = marks(accepted=[3, *noise], ends=[12])
    state = after([first], rest=rest)
    assert not state.tail.any()
    state = after([first, first], rest=rest)
    assert np.flatnonzero(state.tail[0]).tolist() == list(range(13, LENGTH))
    assert chosen(state) == list(range(16)) if not rest else [0, 1, 2, 3]
    state.after(
        marks(accepted=[3, 12, *noise], ends=[12]),
        np.zeros((1, LENGTH), np.float32),
        state.chosen(),
    )
    assert not state.tail.any()


def test_known_positions_rest_only_where_nothing_near_them_moves():
    state = after([marks(accepted=[10])] * 3, pinned=[0, 1, 8, 9, 11, 12, 13])
    resting = ~state.chosen()[0]
    assert not resting[[8, 9, 10, 11, 12]].any()
    assert state._resting()[0, [0, 1, 13]].all()


def test_a_check_that_agrees_ends_the_block_and_one_that_does_not_leaves_it_to_the_reference():
    yes, no, nothing = np.array([True]), np.array([False]), np.zeros((1, LENGTH), np.float32)
    for agrees in (True, False):
        state = after([marks(accepted=[3])] * 2)
        some = state.chosen()
        assert not some.all()
        assert state.hold_back(yes, yes, some, lambda line: False).tolist() == [False]
        assert state.hold_back(yes, yes, some, lambda line: True).tolist() == [True]
        state.after(marks(), nothing, some)
        assert state.chosen().all()  # the check
        held = state.hold_back(yes, yes if agrees else no, state.chosen(), lambda line: True)
        assert held.tolist() == [not agrees]
        state.after(marks(), nothing, state.chosen())
        assert state.fallen.tolist() == [not agrees]
        assert state.chosen().all() == (not agrees)


def test_what_was_computed_whole_needs_no_check():
    state = after([])
    everything = state.chosen()
    yes = np.array([True])
    assert not state.hold_back(yes, yes, everything, lambda line: True).any()


# The decoder pass


@pytest.mark.parametrize(
    ("dtype", "batch", "kv_bits"),
    [
        ("float32", 1, None),
        ("float32", 3, 8),
        ("float16", 1, None),
        ("bfloat16", 2, 8),
    ],
)
def test_a_pass_over_some_positions_is_the_pass_over_all_there(networks, dtype, kv_bits, batch):
    """The others' keys and values are those that this very pass would compute."""
    model = networks[dtype]
    cache = model.make_cache(kv_bits)
    model.prefill(np.arange(10, 50), cache)
    rng = np.random.default_rng(0)
    vocabulary = model.config.text.vocab_size
    canvases = mx.array(rng.integers(0, vocabulary, (3, LENGTH)).astype(np.int32))
    signal = mx.array(rng.normal(size=(3, LENGTH, model.config.text.hidden_size)))
    signal = signal.astype(model.dtype)
    some = rng.random((3, LENGTH)) < [[0.1], [0.5], [0.9]]
    some[:, 7] = True
    tolerance = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}[dtype]
    part, subset = canvases[:batch], Subset.of(some[:batch])
    assert subset is not None
    keys = CanvasKeys()
    whole = model.hidden(part, cache, signal[:batch], held=Held(keys, None))
    assert mx.array_equal(whole, model.hidden(part, cache, signal[:batch]))
    rows = model.hidden(part, cache, signal[:batch], held=Held(keys, subset))
    assert rows.shape == (batch, some[:batch].sum(axis=1).max(), whole.shape[-1])
    found = np.array(subset.lay_over(mx.zeros_like(whole), rows).astype(mx.float32))
    wide = np.array(whole.astype(mx.float32))
    # the mean: a random router is close to ties, and one other expert moves a whole position
    assert np.abs(found - wide)[some[:batch]].mean() < tolerance * np.abs(wide).mean()
    assert not found[~some[:batch]].any()


def test_positions_left_out_are_seen_as_they_were_last_computed(demo, context):
    model, _ = demo
    rng = np.random.default_rng(1)
    first, second = (
        mx.array(rng.integers(0, model.config.text.vocab_size, (1, LENGTH)).astype(np.int32))
        for _ in range(2)
    )
    keys, some = CanvasKeys(), np.zeros((1, LENGTH), dtype=bool)
    some[0, :8] = True
    model.hidden(first, context, held=Held(keys, None))
    old = [np.array(pair[0]) for pair in keys.layers]
    mixed = mx.concatenate([second[:, :8], first[:, 8:]], axis=1)
    rows = model.hidden(second, context, held=Held(keys, Subset.of(some)))
    again = model.hidden(mixed, context)
    assert np.abs(np.array(rows[0]) - np.array(again[0, :8])).max() > 1e-3  # others did not follow
    for before, (now, _) in zip(old, keys.layers, strict=True):
        assert (np.array(now)[:, 8:] == before[:, 8:]).all()
        assert not (np.array(now)[:, :8] == before[:, :8]).all()


# Blocks


def everything_active(monkeypatch):
    """Nothing rests and nothing is tail, as if every position were needed."""
    monkeypatch.setattr(
        ActivePositions, "chosen", lambda self: np.ones(self.pinned.shape, dtype=bool)
    )
    monkeypatch.setattr(
        ActivePositions, "tail", property(lambda self: np.zeros(self.pinned.shape, dtype=bool))
    )


# Canvases of every kind: free, pinned, of a given draft, with a position of few ids.
ROWS = [
    CanvasRequest(SeededDraws(1)),
    CanvasRequest(
        SeededDraws(2), Pins.from_template([7 if at % 3 else None for at in range(LENGTH)])
    ),
    CanvasRequest(SeededDraws(3), None, Start(np.arange(20, 20 + LENGTH, dtype=np.int32), 0.5)),
    CanvasRequest(SeededDraws(4), allowed={0: np.array([5, 9], np.int32)}),
]


@pytest.mark.parametrize(
    ("dtype", "conditioning", "sampler"),
    [
        ("float32", "dense", "entropy-bound"),
        ("float32", "sparse", "entropy-bound"),
        ("float32", "sparse", "confidence-threshold"),
        ("bfloat16", "dense", "entropy-bound"),
    ],
)
def test_with_every_position_active_it_is_the_reference(
    monkeypatch, networks, dtype, conditioning, sampler
):
    model = networks[dtype]
    cache = model.make_cache()
    model.prefill(np.arange(10, 50), cache)
    settings = DecodingSettings(max_denoising_steps=4, conditioning=conditioning, sampler=sampler)
    rows = ROWS if dtype == "float32" else ROWS[:1]
    run = {"length": LENGTH, "alternatives": 0}
    expected = drive(denoise_block(model, cache, settings, rows, **run))[1]
    everything_active(monkeypatch)
    active = replace(settings, positions="active", check_share=1.0)
    found = drive(denoise_block(model, cache, active, rows, stop_ids=[1, 9, 16], **run))[1]
    for one, other in zip(found, expected, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert (one.steps, one.converged, one.computed) == (
            other.steps,
            other.converged,
            other.computed,
        )
        np.testing.assert_array_equal(one.entropy, other.entropy)
        np.testing.assert_array_equal(one.scores.logprobs, other.scores.logprobs)


@pytest.mark.parametrize("preset", ["balanced", "turbo"])
def test_rows_of_a_batch_are_active_each_for_itself(demo, context, preset):
    """Each computes in a batch what it computes alone, and they compute different positions."""
    model, tokenizer = demo
    settings = DecodingSettings(**PRESETS[preset], max_denoising_steps=16)
    requests = [request for request in ROWS if request.start is None]
    run = {"stop_ids": tokenizer.stop_ids, "alternatives": 0}
    steps, together = drive(denoise_block(model, context, settings, requests, **run))
    assert any(len({tuple(line) for line in step.computed.tolist()}) > 1 for step in steps)
    for row, (request, both) in enumerate(zip(requests, together, strict=True)):
        own, (alone,) = drive(denoise_block(model, context, settings, [request], **run))
        assert alone.ids.tolist() == both.ids.tolist()
        assert (alone.steps, alone.computed) == (both.steps, both.computed)
        assert np.abs(alone.entropy - both.entropy).max() < 2e-3
        assert np.abs(alone.scores.logprobs - both.scores.logprobs).max() < 2e-3
        of_batch = [step.computed[step.rows.index(row)] for step in steps if row in step.rows]
        assert all((a.computed[0] == b).all() for a, b in zip(own, of_batch, strict=True))
        assert sum(alone.computed) < alone.steps * LENGTH or preset == "balanced"


def test_a_row_that_joins_later_is_active_as_alone(demo, context):
    from mlx_dgemma.decoding.block_result import finished
    from mlx_dgemma.decoding.denoise import advance, step

    model, tokenizer = demo
    settings = replace(TURBO, max_denoising_steps=20, stability_threshold=99, commit="confirmed")
    requests = [CanvasRequest(SeededDraws(seed)) for seed in (1, 2)]
    run = {"stop_ids": tokenizer.stop_ids}
    alone = [
        drive(denoise_block(model, context, settings, [request], block=block, **run))[1][0]
        for block, request in enumerate(requests)
    ]

    def fresh(row):
        return CanvasState.initial(
            [requests[row]],
            Place(row, 0, 0),
            LENGTH,
            model.config.text.vocab_size,
            20,
            first_row=row,
            positions="active",
        )

    state, results = fresh(0), {}
    for turn in range(30):
        if turn == 4:
            state.join(fresh(1))
        outcome = step(model, context, settings, state, (), tokenizer.stop_ids)
        numbers = outcome.report.read()
        ended = state.last
        results |= finished(state, ended, ended, outcome.seen, outcome.settled, alternatives=None)
        advance(model, state, outcome, numbers)
        state.keep(~ended)
        if not state.rows:
            break
    for row, expected in enumerate(alone):
        assert results[row].ids.tolist() == expected.ids.tolist()
        assert results[row].computed == expected.computed
        assert sum(expected.computed) < 20 * LENGTH


def events_of(demo, prompt, **options):
    events = list(stream_generate(*demo, prompt, **options))
    ids = [token for event in events if isinstance(event, Commit) for token in event.ids]
    assert isinstance(events[-1], Finish)
    return ids, events[-1]


@pytest.mark.parametrize("preset", ["reference", "balanced", "turbo"])
def test_a_preset_repeats_itself_and_replays(demo, preset, tmp_path):
    path = tmp_path / "trace.json"
    ask = {"preset": preset, "max_tokens": 60, "check_share": 0.5}
    prompt = "List 4 animals in alphabetical order, starting with cat."
    for seed in (3, 4):
        ids, finish = events_of(demo, prompt, seed=seed, trace=path, **ask)
        assert events_of(demo, prompt, seed=seed, **ask)[0] == ids
        again = replay(*demo, path)
        assert list(again.ids) == ids
        assert again.divergence is None
        assert (sum(finish.computed) < sum(finish.steps_per_block) * LENGTH) == (
            preset != "reference"
        )
        if preset == "turbo":
            text = path.read_text().replace('"computed":[0,', '"computed":[', 1)
            path.write_text(text)
            assert replay(*demo, path).divergence is not None  # other positions are another run


def test_a_replay_that_ends_before_its_record_is_not_the_same(demo, tmp_path):
    path, prompt = tmp_path / "trace.json", "Write a sentence about the fox."
    ids, finish = events_of(demo, prompt, preset="turbo", seed=3, check_share=1, trace=path)
    assert finish.computed[-1] == LENGTH  # the pass that checked
    path.write_text(path.read_text().replace('"check_share":1', '"check_share":0'))
    again = replay(*demo, path)
    assert list(again.ids) == ids
    assert again.divergence == (0, 0, finish.steps_per_block[0])


@pytest.mark.parametrize("preset", ["balanced", "turbo"])
def test_an_answer_of_several_blocks_and_a_constraint(demo, preset):
    blocks = []
    for seed, example in enumerate(held_out("repeat", 2, seed=1)):
        events = list(stream_generate(*demo, example.messages, preset=preset, seed=seed))
        assert example.verify("".join(event.text for event in events))
        blocks.append(events[-1].blocks)
    assert max(blocks) > 1
    said = Constraint.regex("(cat|dog) [a-z]+ (house|tree)")
    options = {"preset": preset, "seed": 1, "constraint": said}
    ids, finish = events_of(demo, "Write a sentence about the fox.", **options)
    assert re.fullmatch("(cat|dog) [a-z]+ (house|tree)", demo[1].decode(ids))
    assert finish.reason == "stop"


@pytest.mark.parametrize("preset", ["balanced", "turbo"])
def test_a_picture_is_answered_with_fewer_positions(demo, preset):
    computed = {}
    for name in ("reference", preset):
        right, computed[name] = 0, 0
        for seed, example in enumerate(held_out("picture", 3, seed=1)):
            asked = {"images": [example.picture.draw()], "preset": name, "seed": seed}
            events = list(stream_generate(*demo, example.messages, **asked))
            right += example.verify("".join(event.text for event in events))
            computed[name] += sum(events[-1].computed)
        assert right == 3
    assert computed[preset] < computed["reference"]


def test_texts_with_holes_are_filled_with_fewer_positions(demo):
    text = "the small cat <hole:2> the dog in the garden."
    computed, whole = [], []
    chosen = ActivePositions.chosen

    def watched(self):
        some = chosen(self)
        computed.append(int(some.sum()))
        whole.append(some.size)
        return some

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivePositions, "chosen", watched)
        result = infill(*demo, text, seed=1, preset="turbo")
    assert result.text.startswith("the small cat ")
    assert result.text.endswith(" the dog in the garden.")
    assert sum(computed) < sum(whole)


def test_early_commit_saves_the_confirming_step(demo):
    prompt, found = "Count from 3 to 9.", {}
    for commit, gate in (("confirmed", None), ("accepted", 1.0), ("accepted", 0.0)):
        ids, finish = events_of(demo, prompt, seed=5, commit=commit, commit_entropy=gate)
        found[commit, gate] = (ids, finish.steps_per_block)
    ids, steps = found["confirmed", None]
    assert steps == (2,)
    assert found["accepted", 1.0] == (ids, (1,))
    assert found["accepted", 0.0] == (ids, (2,))


def test_a_block_that_takes_long_is_left_to_the_reference(demo, context):
    model, tokenizer = demo
    settings = replace(
        TURBO, max_denoising_steps=12, confidence_threshold=0.0, stability_threshold=99
    )
    steps, (result,) = drive(
        denoise_block(
            model, context, settings, [CanvasRequest(SeededDraws(1))], stop_ids=tokenizer.stop_ids
        )
    )
    assert result.fell_back
    assert not result.converged
    partly = [not step.computed.all() for step in steps]
    assert any(partly[:6])
    assert not any(partly[6:])
    assert result.computed == tuple(int(step.computed.sum()) for step in steps)


def test_a_reply_checked_in_every_block_is_counted(demo, monkeypatch):
    held = []
    hold_back = ActivePositions.hold_back

    def watched(self, *arguments):
        found = hold_back(self, *arguments)
        held.append(bool(found.any()))
        return found

    monkeypatch.setattr(active_positions.ActivePositions, "hold_back", watched)
    prompt = "Write a sentence about the fox."
    _, never = events_of(demo, prompt, seed=2, preset="turbo", check_share=0.0)
    assert not any(held)
    _, always = events_of(demo, prompt, seed=2, preset="turbo", check_share=1.0)
    assert any(held)
    assert always.steps_per_block[0] == never.steps_per_block[0] + 1
