"""The denoising loop and the block loop on a scripted network."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mlx_dgemma.decoding.blocks import Request, generate_blocks
from mlx_dgemma.decoding.canvas import CanvasRequest, Opening, Pins, Start
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.decoding.draws import SeededDraws
from mlx_dgemma.decoding.events import Commit, Draft, Finish
from mlx_dgemma.decoding.settings import DecodingSettings
from mlx_dgemma.errors import InputError, NumericsError

from .driving import drive
from .scripted import STOP, VOCAB, ScriptedCache, ScriptedModel, certain, undecided


def request(prompt=(2, 3), **changes) -> Request:
    settings = DecodingSettings(**changes.pop("settings", {}))
    return Request(
        prompt=prompt,
        settings=settings,
        draws=SeededDraws(changes.pop("seed", 5)),
        seed=5,
        stop_ids=frozenset({STOP}),
        **changes,
    )


def run(model: ScriptedModel, **changes):
    cache = ScriptedCache()
    events = list(generate_blocks(model, cache, request(**changes)))
    commits = [event for event in events if isinstance(event, Commit)]
    assert isinstance(events[-1], Finish)
    return commits, events[-1], cache


def blocks_of(*blocks):
    """A network sure of one block after another, the last repeated."""
    return lambda block, step, canvas: certain(*blocks[min(block, len(blocks) - 1)])


def test_blocks_are_committed_and_prefilled_until_a_stop_id():
    commits, finish, cache = run(ScriptedModel(blocks_of((4, 5, 6, 7), (8, 9, STOP, 4))))
    assert [commit.ids for commit in commits] == [(4, 5, 6, 7), (8, 9)]
    assert finish.reason == "stop"
    assert cache.ids == [2, 3, 4, 5, 6, 7]  # the last block is read by nobody
    assert finish.steps_per_block == (2, 2)  # one step and the confirming one
    assert finish.converged == (True, True)
    assert finish.generated_tokens == 6
    assert finish.tokens_per_forward == 6 / 4
    assert finish.prompt_tokens == 2


def test_a_reply_is_cut_at_max_tokens_on_a_whole_canvas():
    model = ScriptedModel(blocks_of((4, 5, 6, 7)))
    commits, finish, cache = run(model, settings={"max_tokens": 6})
    assert [commit.ids for commit in commits] == [(4, 5, 6, 7), (4, 5)]
    assert finish.reason == "length"
    assert cache.ids == [2, 3, 4, 5, 6, 7]  # nobody will read the last block
    assert {canvas.shape for canvas in model.canvases} == {(1, 4)}


def test_a_stop_id_right_behind_max_tokens_still_ends_the_reply():
    _, finish, _ = run(ScriptedModel(blocks_of((4, 5, STOP, 7))), settings={"max_tokens": 2})
    assert finish.reason == "stop"


def test_a_stop_id_beyond_the_cut_did_not_end_the_reply():
    commits, finish, _ = run(ScriptedModel(blocks_of((4, 5, 6, STOP))), settings={"max_tokens": 2})
    assert (commits[0].ids, finish.reason) == ((4, 5), "length")


def test_the_last_canvas_must_fit_the_context():
    commits, finish, _ = run(ScriptedModel(blocks_of((4, 5, 6, 7)), limit=2 + 4 + 4 + 3))
    assert len(commits) == 2
    assert finish.reason == "length"


@pytest.mark.parametrize(("prompt", "limit", "words"), [((), 50, "empty"), ((2,) * 9, 12, "9 tok")])
def test_prompts_that_cannot_be_answered(prompt, limit, words):
    with pytest.raises(InputError, match=words):
        run(ScriptedModel(blocks_of((4, 5, 6, 7)), limit=limit), prompt=prompt)


def test_a_conversation_that_fills_the_context_can_be_begun_again():
    model = ScriptedModel(blocks_of((4, 5, 6, 7)), limit=20)
    asked = generate_blocks(model, ScriptedCache(offset=15), request(prompt=(2, 3, 4)))
    with pytest.raises(InputError, match=r"but only 1 fit .* or begin a new conversation"):
        next(asked)


def test_a_canvas_too_long_for_the_context_is_what_to_shorten():
    model = ScriptedModel(blocks_of((4, 5, 6, 7)), limit=20)
    with pytest.raises(InputError, match=r"canvas_length=18 .* room for 17; use at most that"):
        run(model, prompt=(2, 3, 4), settings={"canvas_length": 18})


def test_an_unsure_network_uses_every_step():
    model = ScriptedModel(lambda block, step, canvas: undecided(4))
    commits, finish, _ = run(model, settings={"max_denoising_steps": 5, "max_tokens": 4})
    assert finish.steps_per_block == (5,)
    assert finish.converged == (False,)
    assert commits[0].ids == (0, 0, 0, 0)  # ties: the lowest id


def test_unconverged_blocks_can_be_refused_or_warned_about():
    model = ScriptedModel(lambda block, step, canvas: undecided(4))
    short = {"max_denoising_steps": 2, "max_tokens": 4}
    commits, finish, _ = run(model, settings={**short, "on_unconverged": "refuse"})
    assert (commits, finish.reason) == ([], "unconverged")
    with pytest.warns(UserWarning, match="without converging"):
        run(model, settings={**short, "on_unconverged": "warn"})


def test_the_last_draft_is_committed_not_the_canvas():
    """The draft changes until step 3; what the canvas then holds is still noise."""
    targets = [(4, 5, 6, 7), (4, 5, 6, 8), (9, 9, 9, STOP), (9, 9, 9, STOP)]
    model = ScriptedModel(lambda block, step, canvas: certain(*targets[step - 1]))
    commits, finish, _ = run(model)
    assert commits[0].ids == (9, 9, 9)
    assert finish.steps_per_block == (4,)
    assert commits[0].settled == (3, 3, 3)


def test_self_conditioning_follows_the_tempered_prediction():
    model = ScriptedModel(blocks_of((4, 5, STOP, 7)))
    run(model)
    assert model.signals[0] is None  # nothing to go by on a first step
    assert model.signals[1][0].argmax(axis=-1).tolist() == [4, 5, STOP, 7]


def test_drafts_show_every_step():
    model = ScriptedModel(blocks_of((4, 5, STOP, 7)))
    events = list(generate_blocks(model, ScriptedCache(), request(drafts=True)))
    drafts = [event for event in events if isinstance(event, Draft)]
    assert [(draft.block, draft.step) for draft in drafts] == [(0, 1), (0, 2)]
    assert drafts[0].ids.tolist() == [4, 5, STOP, 7]
    assert drafts[0].accepted.all()
    assert drafts[0].entropy.shape == (4,)


def test_cancelling_ends_between_two_steps():
    cancel = threading.Event()
    model = ScriptedModel(lambda block, step, canvas: cancel.set() or undecided(4))
    commits, finish, _ = run(model, cancel=cancel)
    assert (commits, finish.reason, model.step) == ([], "cancelled", 1)


def test_the_caller_can_end_a_reply_after_a_commit():
    stream = generate_blocks(ScriptedModel(blocks_of((4, 5, 6, 7))), ScriptedCache(), request())
    assert isinstance(next(stream), Commit)
    finish = stream.send(True)
    assert isinstance(finish, Finish)
    assert (finish.reason, finish.blocks) == ("stop", 1)


@pytest.mark.parametrize(
    ("guard", "expected", "forwards"),
    [("allow", (), 2), ("reroll", (4,), 6), ("suppress", (STOP + 1, 5, 6, 7), 2)],
)
def test_an_empty_first_draft_is_guarded(guard, expected, forwards):
    """Whole canvases answer with nothing; one of length 1 says 4, and 4 again in block 1."""

    def script(block, step, canvas):
        if block > 0:
            return certain(*[STOP] * len(canvas))
        if len(canvas) == 1:
            return certain(4)
        logits = certain(STOP, 5, 6, 7)[: len(canvas)]
        logits[0, STOP + 1] = 0.0  # a distant second to the stop id
        return logits

    model = ScriptedModel(script)
    stream = generate_blocks(model, ScriptedCache(), request(settings={"empty_reply": guard}))
    assert next(stream).ids == expected
    assert model.step == forwards


def test_non_finite_logits_are_named_at_the_first_step():
    def script(block, step, canvas):
        logits = undecided(4)
        logits[1, 3] = np.nan if step == 2 else 0.0
        return logits

    with pytest.raises(NumericsError, match="block 0, denoising step 2"):
        run(ScriptedModel(script))


def test_rows_of_a_batch_draw_what_they_draw_alone():
    def denoise(*seeds):
        """The steps and results of a row per seed, which begins with that id."""
        rows = [
            CanvasRequest(SeededDraws(seed), Pins.from_template([seed, None, None, None]))
            for seed in seeds
        ]
        model = ScriptedModel(lambda block, step, canvas: undecided(4))
        settings = DecodingSettings(max_denoising_steps=4)
        return drive(denoise_block(model, ScriptedCache(), settings, rows))

    alone = [denoise(seed)[0] for seed in (3, 4)]
    together, results = denoise(3, 4)
    for row, steps in enumerate(alone):
        for one, both in zip(steps, together, strict=True):
            assert np.array_equal(one.canvas[0], both.canvas[row])
            assert np.array_equal(one.sample[0], both.sample[row])
    assert [result.steps for result in results] == [4, 4]


def test_a_finished_row_is_no_longer_computed():
    def script(block, step, canvas):
        return certain(4, 5, 6, 7) if canvas[0] == 3 else undecided(4)

    rows = [
        CanvasRequest(SeededDraws(1), Pins.from_template([0, None, None, None])),
        CanvasRequest(SeededDraws(2), Pins.from_template([3, None, None, None])),
    ]
    model = ScriptedModel(script)
    settings = DecodingSettings(max_denoising_steps=5)
    steps, results = drive(denoise_block(model, ScriptedCache(), settings, rows))
    assert [len(canvas) for canvas in model.canvases] == [2, 2, 1, 1, 1]
    assert [step.rows for step in steps] == [(0, 1), (0, 1), (0,), (0,), (0,)]
    assert [(result.steps, result.converged) for result in results] == [(5, False), (2, True)]
    assert results[1].ids.tolist() == [3, 5, 6, 7]


def test_a_pinned_position_conditions_as_certain():
    model = ScriptedModel(lambda block, step, canvas: undecided(4))
    rows = [CanvasRequest(SeededDraws(1), Pins.from_template([None, 9, None, None]))]
    drive(denoise_block(model, ScriptedCache(), DecodingSettings(max_denoising_steps=2), rows))
    assert model.signals[1][0, 1].tolist() == np.eye(VOCAB)[9].tolist()
    assert np.allclose(model.signals[1][0, 0], 1 / VOCAB)


def test_strength_zero_keeps_a_draft_without_a_step():
    model = ScriptedModel(lambda block, step, canvas: undecided(4))
    start = Start(np.array([4, 5, 6, 7], dtype=np.int32), 0.0)
    rows = [CanvasRequest(SeededDraws(1), None, start)]
    steps, results = drive(denoise_block(model, ScriptedCache(), DecodingSettings(), rows))
    assert (steps, model.canvases) == ([], [])
    assert results[0].ids.tolist() == [4, 5, 6, 7]
    assert results[0].steps == 0


def test_logprobs_are_those_of_the_untempered_logits():
    logits = np.zeros((4, VOCAB), dtype=np.float32)
    logits[:, 6] = 2.0
    model = ScriptedModel(lambda block, step, canvas: logits)
    commits, _, _ = run(model, alternatives=2, settings={"max_denoising_steps": 3, "max_tokens": 4})
    capped = 30 * np.tanh(logits[0] / 30)
    expected = capped[6] - np.log(np.exp(capped).sum())
    assert commits[0].logprobs == pytest.approx([expected] * 4, abs=1e-6)
    for (first, second), own in zip(commits[0].alternatives, commits[0].logprobs, strict=True):
        assert first == (6, own)
        assert second[0] != 6
        assert second[1] == pytest.approx(-np.log(np.exp(capped).sum()), abs=1e-6)


@pytest.mark.parametrize("canvas_length", [2, 3, 4, 8])
def test_an_opening_is_pinned_across_canvases(canvas_length):
    """Three ids pinned, one of two after them, then what the network wants: a stop id."""
    model = ScriptedModel(
        lambda block, step, canvas: certain(*[STOP] * canvas_length), canvas_length=canvas_length
    )
    commits, finish, _ = run(model, opening=Opening((4, 5, 6), (7, 8)))
    ids = [token for commit in commits for token in commit.ids]
    assert ids[:3] == [4, 5, 6]
    assert ids[3] in (7, 8)
    assert (len(ids), finish.reason) == (4, "stop")
