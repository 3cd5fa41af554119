"""Truth tables: temperature, acceptance, renoising, stopping, cutting, settings, draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.decoding.canvas import CanvasRequest, Pins, Start
from mlx_dgemma.decoding.draws import Place, Purpose, SeededDraws, check_seed
from mlx_dgemma.decoding.sampler import (
    ConfidenceThresholdSampler,
    EntropyBoundSampler,
    StepInput,
    make_sampler,
)
from mlx_dgemma.decoding.settings import PRESETS, DecodingSettings
from mlx_dgemma.decoding.stopping import StableAndConfident, cut_at_stop, stop_rules
from mlx_dgemma.decoding.temperature import temperature
from mlx_dgemma.errors import InputError

TRACES = Path(__file__).parents[2].parent / "shared/assets/traces/real_traces.json"
SAMPLE, FRESH, DRAFT, CANVAS = 7, 9, 5, 3
MIDDLE = np.array([False])  # not the schedule's last step


def step(
    entropy: list[float],
    *,
    previous: list[int] | None = None,
    pinned: list[bool] | None = None,
    probability: list[float] | None = None,
    revealed: mx.array | None = None,
) -> StepInput:
    length = len(entropy)

    def full(value: int) -> mx.array:
        return mx.full((1, length), value, dtype=mx.int32)

    return StepInput(
        canvas=full(CANVAS),
        entropy=mx.array([entropy], dtype=mx.float32),
        draft=full(DRAFT),
        sample=full(SAMPLE),
        sample_probability=mx.array([probability or [0.0] * length]),
        fresh=full(FRESH),
        previous_draft=None if previous is None else mx.array([previous], dtype=mx.int32),
        outside=None if pinned is None else mx.array([pinned]),
        revealed=mx.zeros((1, length), dtype=mx.bool_) if revealed is None else revealed,
    )


def bounded(bound: float) -> EntropyBoundSampler:
    return EntropyBoundSampler(DecodingSettings(entropy_bound=bound))


@pytest.mark.parametrize(
    ("count_down", "steps", "expected"),
    [(48, 48, 0.8), (24, 48, 0.6), (1, 48, 0.4 + 0.4 / 48), (1, 1, 0.8), (4, 8, 0.6)],
)
def test_temperature_falls_from_t_max_towards_t_min(count_down, steps, expected):
    assert temperature(count_down, steps, 0.4, 0.8) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("entropy", "bound", "accepted"),
    [
        ([0.5, 0.2, 0.3], 0.0, [False, True, False]),  # the lowest is always kept
        ([0.5, 0.2, 0.3], 0.2, [False, True, True]),  # what lies below the third sums to 0.5
        ([0.5, 0.2, 0.3], 0.49, [False, True, True]),
        ([0.5, 0.2, 0.3], 0.51, [True, True, True]),
        ([0.2, 0.2, 0.2], 0.1, [True, False, False]),  # ties: the lowest index
        ([0.0, 0.0, 9.0], 0.0, [True, True, True]),  # nothing below the last one
        ([9.0, 0.0, 0.0], 0.0, [True, True, True]),
        ([0.0, 0.1, 9.0], 0.0, [True, True, False]),
        ([0.25, 0.25, 0.5], 0.25, [True, True, False]),  # exactly the bound is within it
        ([0.25, 0.25, 0.5], 0.5, [True, True, True]),
    ],
)
def test_accept_while_the_joint_entropy_is_within_the_bound(entropy, bound, accepted):
    decision = bounded(bound).decide(step(entropy), last=MIDDLE)
    assert decision.accepted.tolist() == [accepted]
    assert decision.canvas.tolist() == [[SAMPLE if kept else FRESH for kept in accepted]]


def test_acceptance_is_decided_anew_every_step():
    sampler = bounded(0.0)
    assert sampler.decide(step([0.1, 0.2]), last=MIDDLE).accepted.tolist() == [[True, False]]
    assert sampler.decide(step([0.2, 0.1]), last=MIDDLE).accepted.tolist() == [[False, True]]


def test_pinned_positions_take_no_part_in_anything():
    decision = bounded(0.0).decide(
        step([0.0, 0.4, 0.2], previous=[0, DRAFT, DRAFT], pinned=[True, False, False]), last=MIDDLE
    )
    assert decision.canvas.tolist() == [[CANVAS, FRESH, SAMPLE]]
    assert decision.accepted.tolist() == [[False, False, True]]
    repeated, mean, finite = decision.status[0].tolist()
    assert (repeated, finite) == (1.0, 1.0)
    assert mean == pytest.approx(0.3)


def test_status_reports_repetition_mean_and_finiteness():
    assert bounded(0.1).decide(step([0.1, 0.3]), last=MIDDLE).status[0, 0].item() == 0
    same = bounded(0.1).decide(step([0.1, 0.3], previous=[DRAFT, DRAFT]), last=MIDDLE)
    other = bounded(0.1).decide(step([0.1, 0.3], previous=[DRAFT, 0]), last=MIDDLE)
    assert [same.status[0, 0].item(), other.status[0, 0].item()] == [1, 0]
    assert same.status[0, 1].item() == pytest.approx(0.2)
    broken = bounded(0.1).decide(step([0.1, float("nan")]), last=MIDDLE)
    assert broken.status[0, 2].item() == 0


def test_confidence_threshold_reveals_for_good():
    sampler = make_sampler(DecodingSettings(sampler="confidence-threshold"))
    assert isinstance(sampler, ConfidenceThresholdSampler)
    first = sampler.decide(step([1, 1, 1], probability=[0.95, 0.2, 0.9]), last=MIDDLE)
    assert first.accepted.tolist() == [[True, False, True]]
    assert first.canvas.tolist() == [[SAMPLE, FRESH, SAMPLE]]
    second = sampler.decide(
        step([1, 1, 1], probability=[0.0, 0.1, 0.0], revealed=first.revealed), last=MIDDLE
    )
    # None is sure enough, so the best hidden one is forced; revealed ones keep their token.
    assert second.accepted.tolist() == [[False, True, False]]
    assert second.canvas.tolist() == [[CANVAS, SAMPLE, CANVAS]]
    assert second.complete.tolist() == [True]


def test_confidence_threshold_reveals_everything_at_the_last_step():
    sampler = ConfidenceThresholdSampler(DecodingSettings(sampler="confidence-threshold"))
    decision = sampler.decide(step([1, 1], probability=[0.1, 0.2]), last=np.array([True]))
    assert decision.accepted.tolist() == [[True, True]]
    assert decision.complete.tolist() == [False]  # the first is shown without being sure


def stops(stop: StableAndConfident, repeated: list[bool], mean: float) -> list[bool]:
    """Of one row, whether each step stops it, given which drafts repeat the one before."""
    repeats, answers = np.zeros(1, dtype=np.int64), []
    for same in repeated:
        repeats = stop.count(repeats, np.array([same]))
        answers.append(bool(stop(repeats, np.array([mean], dtype=np.float32))[0]))
    return answers


@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
def test_stability_needs_one_more_equal_draft_than_its_threshold(threshold):
    # The first draft has nothing to repeat; from then on every draft repeats.
    answers = stops(StableAndConfident(threshold, 0.005), [False, *[True] * 4], 0.001)
    assert answers.index(True) == threshold


def test_a_changed_draft_starts_the_count_again():
    repeated = [False, True, False, True, True]
    assert stops(StableAndConfident(2, 0.005), repeated, 0.0) == [False] * 4 + [True]


def test_confidence_is_strict():
    stop = StableAndConfident(0, 0.005)
    mean = np.array([0.005, np.nextafter(np.float32(0.005), 0), 0.1], dtype=np.float32)
    assert stop(np.zeros(3, dtype=np.int64), mean).tolist() == [False, True, False]


def test_rows_are_counted_apart():
    stop = StableAndConfident(1, 0.005)
    calm = np.zeros(3, dtype=np.float32)
    once = stop.count(np.zeros(3, dtype=np.int64), np.array([False, False, True]))
    assert stop(once, calm).tolist() == [False, False, True]
    twice = stop.count(once, np.array([True, False, False]))
    assert stop(twice, calm).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([4, 5, 6], ([4, 5, 6], None)),
        ([4, 1, 6], ([4], 1)),
        ([1, 1, 6], ([], 1)),
        ([4, 5, 2], ([4, 5], 2)),
        ([4, 2, 1], ([4], 2)),
    ],
)
def test_the_first_stop_id_anywhere_cuts(ids, expected):
    assert cut_at_stop(np.array(ids), frozenset({1, 2})) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("temp", -0.1),
        ("temp", float("inf")),
        ("max_denoising_steps", 0),
        ("entropy_bound", -1.0),
        ("t_min", 0.0),
        ("t_min", 0.9),
        ("reveal_threshold", 0.0),
        ("stability_threshold", -1),
        ("confidence_threshold", -0.1),
        ("canvas_length", 0),
        ("sampler", "ddim"),
        ("on_unconverged", "ignore"),
        ("empty_reply", "retry"),
        ("conditioning", "thin"),
    ],
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(InputError, match=name):
        DecodingSettings(**{name: value})


def test_unknown_settings_are_named():
    with pytest.raises(InputError, match="top_k"):
        DecodingSettings.from_defaults(DecodingSettings(), {"top_k": 4})


def test_a_preset_lies_between_the_checkpoint_and_the_caller():
    own = DecodingSettings(entropy_bound=0.2)
    assert DecodingSettings.from_defaults(own, {}) == own
    assert DecodingSettings.from_defaults(own, {"preset": "reference"}) == own
    for name, values in PRESETS.items():
        made = DecodingSettings.from_defaults(own, {"preset": name, "t_max": None})
        assert made == replace(own, **values)
    turbo = DecodingSettings.from_defaults(own, {"preset": "turbo", "positions": "text"})
    assert turbo == replace(own, **{**PRESETS["turbo"], "positions": "text"})


@pytest.mark.parametrize("preset", ["fast", "Turbo", "", 3, ["turbo"], {"turbo": 1}])
def test_a_preset_that_is_none_is_named(preset):
    with pytest.raises(InputError, match="is not known: use reference, balanced, turbo"):
        DecodingSettings.from_defaults(DecodingSettings(), {"preset": preset})


@pytest.mark.parametrize("name", ["check_share", "temp", "max_tokens", "commit_entropy"])
def test_true_is_no_number(name):
    with pytest.raises(InputError, match=f"{name}=True is not possible"):
        DecodingSettings(**{name: True})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["confidence_threshold", "commit_entropy"])
@pytest.mark.parametrize("value", [1e308, float("inf")])
def test_a_threshold_beyond_single_precision_bounds_nothing(name, value):
    settings = DecodingSettings(commit="accepted", **{name: value})
    rules = stop_rules(settings)
    high = np.full(1, 1e30, dtype=np.float32)
    stable = rules[0](np.ones(1, dtype=np.int64), high)
    early = rules[1](np.ones(1, dtype=bool), high, None)
    assert stable[0] == (name == "confidence_threshold")
    assert early[0]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "7", True])
def test_impossible_seeds_are_named(seed):
    with pytest.raises(InputError, match="seed"):
        check_seed(seed)


def test_every_draw_has_its_own_key():
    draws = SeededDraws(3)
    places = [Place(b, a, s) for b in range(3) for a in range(3) for s in range(3)]
    keys = {tuple(draws.key(place, purpose).tolist()) for place in places for purpose in Purpose}
    keys |= {tuple(SeededDraws(4).key(place, Purpose.CANVAS).tolist()) for place in places}
    assert len(keys) == len(places) * (len(Purpose) + 1)


def test_a_seed_alone_decides_the_draws():
    place = Place(0, 0, 1)
    first, second = SeededDraws(11), SeededDraws(11)
    second.canvas(Place(4, 0, 0), 8, 100)  # an earlier draw changes nothing
    assert first.renoise(place, 8, 100).tolist() == second.renoise(place, 8, 100).tolist()
    assert first.sample(place, 8).shape == (8, 2)


def test_noise_is_uniform_over_the_vocabulary():
    ids = np.array(SeededDraws(0).canvas(Place(0, 0, 0), 200_000, 8))
    counts = np.bincount(ids, minlength=8)
    expected = ids.size / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 df, p = 0.001


@pytest.mark.skipif(not TRACES.exists(), reason="the traces of real runs are not in this clone")
def test_mlx_draws_the_canvases_of_the_real_runs():
    for run in json.loads(TRACES.read_text())["initialize_canvas"]:
        mx.random.seed(run["seed"])
        assert mx.random.randint(0, 262144, (1, 64))[0, :4].tolist() == run["first_64"]


def test_pins_lie_on_top_of_noise_and_drafts():
    pins = Pins.from_template([None, 5, None, 6])
    noisy = CanvasRequest(SeededDraws(0), pins).initial(Place(0, 0, 0), 4, 50)
    start = Start(np.array([1, 2, 3, 4], dtype=np.int32), strength=0.0)
    kept = CanvasRequest(SeededDraws(0), pins, start).initial(Place(0, 0, 0), 4, 50)
    assert noisy[mx.array([1, 3])].tolist() == [5, 6]
    assert kept.tolist() == [1, 5, 3, 6]


@pytest.mark.parametrize(("strength", "first"), [(0, 0), (0.01, 1), (0.5, 24), (1, 48)])
def test_strength_enters_the_schedule_part_way(strength, first):
    assert Start(np.zeros(1, np.int32), strength).first_step(48) == first


def test_strength_noises_its_share_of_the_draft():
    start = Start(np.full(20_000, 7, dtype=np.int32), strength=0.3)
    canvas = CanvasRequest(SeededDraws(1), None, start).initial(Place(0, 0, 0), 20_000, 1000)
    assert (np.array(canvas) == 7).mean() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_impossible_strengths_are_named(strength):
    with pytest.raises(InputError, match="strength"):
        Start(np.zeros(1, np.int32), strength)


@pytest.mark.parametrize(
    ("conditioning", "sliced", "bits", "sparse"),
    [
        ("auto", False, 16, True),
        ("auto", False, 32, False),
        ("auto", True, 16, False),
        ("dense", False, 16, False),
        ("sparse", False, 32, True),
        ("sparse", True, 16, False),
    ],
)
def test_the_signal_is_summed_sparsely_only_where_it_may(conditioning, sliced, bits, sparse):
    settings = DecodingSettings(conditioning=conditioning, sliced_head=sliced)
    assert settings.sparse_conditioning(bits) is sparse


@pytest.mark.parametrize("bad", [-1, 50])
def test_known_ids_outside_the_vocabulary_are_refused(bad):
    ids = np.array([3, bad, 4], np.int32)
    pinned = np.array([True, True, False])
    for known in (
        {"pins": Pins(ids, pinned)},
        {"start": Start(ids, 0.5)},
        {"allowed": {1: ids}},
    ):
        with pytest.raises(InputError, match=rf"between 0 and 49, not {bad}"):
            CanvasRequest(SeededDraws(0), **known).initial(Place(0, 0, 0), 3, 50)
    free = CanvasRequest(SeededDraws(0), pins=Pins(ids, ~pinned))  # an id that is not read
    assert free.initial(Place(0, 0, 0), 3, 50).tolist()[2] == 4
