"""The loop against the obvious path: full logits of `model.denoise`, the rules in NumPy."""

from __future__ import annotations

import json
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.decoding.canvas import CanvasRequest, Pins
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.decoding.trace import Trace
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import encode_prompt, stream_generate
from mlx_dgemma.replaying import replay

from .driving import Spy, drive

PROMPT = "Count from 3 to 9."


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def context(demo):
    model, tokenizer = demo
    cache = model.make_cache()
    model.prefill(mx.array(encode_prompt(tokenizer, PROMPT))[None], cache)
    return cache


def obvious(model, cache, settings, canvas, conditioning, place):
    """(logits, draft, entropy) of one step, with nothing fused or sliced."""
    total = settings.max_denoising_steps
    now = settings.t_min + (settings.t_max - settings.t_min) * (total + 1 - place.step) / total
    logits = model.denoise(canvas, cache, conditioning) / now
    tempered = np.array(logits[0], dtype=np.float64)
    shifted = tempered - tempered.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logits, tempered.argmax(-1), -(np.exp(log_p) * log_p).sum(-1)


def accepted_by(entropy, bound):
    order = np.argsort(entropy, kind="stable")
    ascending = entropy[order]
    accepted = np.zeros(entropy.shape, dtype=bool)
    accepted[order] = np.cumsum(ascending, dtype=np.float32) - ascending <= np.float32(bound)
    return accepted


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_step_agrees_with_the_obvious_path(demo, context, seed):
    model, _ = demo
    settings = DecodingSettings(temp=0.0, max_denoising_steps=12)
    draws = SeededDraws(seed)
    length, vocabulary = model.config.canvas_length, model.config.text.vocab_size
    expected = draws.canvas(Place(0, 0, 0), length, vocabulary)
    conditioning = None
    for step in denoise_block(model, context, settings, [CanvasRequest(SeededDraws(seed))]):
        assert np.array_equal(step.canvas[0], expected)
        conditioning, draft, entropy = obvious(
            model, context, settings, step.canvas, conditioning, step.places[0]
        )
        assert np.array_equal(step.draft[0], draft)
        assert np.abs(np.array(step.entropy[0]) - entropy).max() < 1e-3
        accepted = accepted_by(np.array(step.entropy[0]), settings.entropy_bound)
        assert np.array_equal(step.accepted[0], accepted)
        fresh = draws.renoise(step.places[0], length, vocabulary)
        expected = np.where(accepted, draft, fresh)  # at temp 0 the sample is the argmax


def test_rows_of_a_batch_give_what_they_give_alone(demo, context):
    model, _ = demo
    settings = DecodingSettings(max_denoising_steps=6)
    rows = [CanvasRequest(SeededDraws(seed)) for seed in (3, 4, 5)]
    _, together = drive(denoise_block(model, context, settings, rows))
    for row, both in zip(rows, together, strict=True):
        _, (alone,) = drive(denoise_block(model, context, settings, [row]))
        assert np.array_equal(alone.ids, both.ids)
        assert alone.steps == both.steps
        assert np.abs(alone.entropy - both.entropy).max() < 1e-3


@pytest.mark.parametrize("sampler", ["entropy-bound", "confidence-threshold"])
@pytest.mark.parametrize("seed", range(4))
def test_pinned_ids_never_change(demo, context, sampler, seed):
    model, _ = demo
    rng = np.random.default_rng(seed)
    length, vocabulary = model.config.canvas_length, model.config.text.vocab_size
    pins = Pins(rng.integers(0, vocabulary, length).astype(np.int32), rng.random(length) < 0.5)
    settings = DecodingSettings(max_denoising_steps=5, sampler=sampler)
    request = CanvasRequest(SeededDraws(seed), pins)
    steps, (result,) = drive(denoise_block(model, context, settings, [request]))
    for step in steps:
        for ids in (step.canvas[0], step.draft[0], step.sample[0]):
            assert np.array_equal(np.array(ids)[pins.mask], pins.ids[pins.mask])
    assert np.array_equal(result.ids[pins.mask], pins.ids[pins.mask])


OPEN = "List 4 animals in alphabetical order, starting with cat."


def ids_of(model, tokenizer, prompt=PROMPT, **options):
    options = {"max_tokens": 40, "max_denoising_steps": 6, **options}
    events = list(stream_generate(model, tokenizer, prompt, **options))
    ids = [token for event in events if isinstance(event, Commit) for token in event.ids]
    return ids, events[-1]


def test_a_seed_repeats_itself_and_is_reported(demo):
    first, finish = ids_of(*demo, OPEN, seed=None)
    again, _ = ids_of(*demo, OPEN, seed=finish.seed)
    assert isinstance(finish, Finish)
    assert first == again


def test_other_seeds_give_other_answers_to_an_open_question(demo):
    answers = {tuple(ids_of(*demo, OPEN, seed=seed)[0]) for seed in (1, 2, 3)}
    assert len(answers) > 1


def test_a_trace_replays_to_the_same_ids(demo, tmp_path):
    path = tmp_path / "trace.json"
    ids, _ = ids_of(*demo, seed=8, trace=path)
    again = replay(*demo, path)
    assert list(again.ids) == ids
    assert again.divergence is None


@pytest.mark.parametrize("end", ["stop string", "cancel", "cancel at once", "refuse"])
def test_a_recording_that_ended_early_replays_up_to_there(demo, tmp_path, end):
    path, cancel, ids = tmp_path / "trace.json", threading.Event(), []
    options = {"seed": 3, "max_tokens": np.int64(60), "max_denoising_steps": 3, "drafts": True}
    if end == "stop string":
        options["stop"] = "11"
    if end == "refuse":
        options |= {"on_unconverged": "refuse", "max_denoising_steps": 1}
    if end == "cancel at once":
        cancel.set()
    for event in stream_generate(
        *demo, "Count from 10 to 99", trace=path, cancel=cancel, canvas_length=16, **options
    ):
        if isinstance(event, Commit):
            ids += event.ids
        elif isinstance(event, Draft) and (end, event.block, event.step) == ("cancel", 1, 2):
            cancel.set()
    again = replay(*demo, path)
    assert list(again.ids) == ids
    assert again.divergence is None
    assert bool(ids) is (end in ("stop string", "cancel"))


def test_a_replay_says_where_it_leaves_the_record(demo, tmp_path):
    path = tmp_path / "trace.json"
    ids_of(*demo, seed=8, trace=path)
    text = path.read_text()
    start = text.index('"step":2,"draft":[') + len('"step":2,"draft":[')
    path.write_text(text[:start] + "1" + text[start:])  # another first id
    assert replay(*demo, path).divergence == (0, 0, 2)


def test_foreign_files_are_no_traces(demo, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text('{"hello": 1}')
    with pytest.raises(InputError, match="not a trace"):
        replay(*demo, path)
    with pytest.raises(InputError, match="Cannot read"):
        replay(*demo, tmp_path / "absent.json")


@pytest.mark.parametrize("purpose", ["canvas", "renoise"])
def test_an_id_outside_the_vocabulary_reaches_no_gather(purpose, demo, tmp_path):
    path = tmp_path / "trace.json"
    ids_of(*demo, seed=8, trace=path)
    record = json.loads(path.read_text())
    place = next(name for name in record["draws"] if name.endswith(purpose))
    vocabulary = demo[0].config.text.vocab_size
    record["draws"][place][0] = vocabulary
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"draws token {vocabulary}, and this model's last is"):
        replay(*demo, path)


@pytest.mark.parametrize(
    "damage",
    [
        {"prompt": None},
        {"prompt": ["a"]},
        {"prompt": [1 << 40]},
        {"settings": [1]},
        {"settings": {"no_such_setting": 1}},
        {"draws": []},
        {"draws": {"0.0.0.canvas": [1e99] * 32}},
        {"draws": {"0.0.0.canvas": None}},
        {"steps": [{}]},
        {"steps": [0]},
        {"committed": 3},
        {"committed": [[-1]]},
        {"draws": {"0.0.0.renoise": [2**40]}},
        {"draws": {"0.0.0.renoise": [-1]}},
        {"draws": {"0.0.0.sample": [[0.5]]}},
        {"draws": {"0.0.0.sample": [[0.5, 1.0]]}},
        {"draws": {"0.0.0.keep": [-0.5]}},
        {"steps": [{"block": 0, "attempt": 0, "step": 0, "draft": [1.5]}]},
        {"versions": {"mlx": 1}},
        {"seed": "1"},
    ],
)
def test_a_damaged_trace_is_named(damage, tmp_path):
    path = tmp_path / "trace.json"
    Trace(1, [2, 3], {}, "digest").save(path)
    assert Trace.load(path).prompt == [2, 3]
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(InputError, match="is damaged"):
        Trace.load(path)


def test_a_sparse_signal_stays_within_its_bound(demo, context):
    """Twice the dropped mass times the largest embedding, whatever the logits are."""
    model, _ = demo
    request = CanvasRequest(SeededDraws(2), Pins.from_template([None] * 31 + [1]))
    signals = {}
    for conditioning in ("dense", "sparse"):
        settings = DecodingSettings(max_denoising_steps=6, conditioning=conditioning, temp=0.0)
        spy = Spy(model)
        drive(denoise_block(spy, context, settings, [request]))
        signals[conditioning] = spy.signals
    table = np.array(model.embedding_rows(mx.arange(model.config.text.vocab_size)))
    bound = 2 * 2**-8 * np.linalg.norm(table, axis=1).max() * model.embed_scale
    first = {name: values[1] for name, values in signals.items()}  # the same canvas before it
    assert np.linalg.norm(first["dense"] - first["sparse"], axis=-1).max() <= bound
