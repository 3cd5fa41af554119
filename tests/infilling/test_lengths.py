"""How a hole finds its length: what is looked at, what is tried, and what pads leave behind."""

import numpy as np
import pytest

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.decoding.block_result import BlockResult
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.infilling import infill, windows
from mlx_dgemma.infilling.lengths import (
    LENGTHS,
    SPARE,
    equal_lengths,
    following,
    mean_logprob,
    roomy,
    spread,
    without_pads,
)
from mlx_dgemma.infilling.template import Slot, Template
from mlx_dgemma.infilling.windows import Filler
from mlx_dgemma.model.scores import Scores

QUICK = {"seed": 1, "max_denoising_steps": 2}


@pytest.fixture(scope="module")
def demo():
    return load(CHECKPOINT)


def test_a_wide_range_is_tried_at_some_lengths():
    assert spread(2, 4) == [2, 3, 4]
    wide = spread(2, 100)
    assert (wide[0], wide[-1]) == (2, 100)
    assert set(wide[1:-1]) <= set(LENGTHS)


@pytest.mark.parametrize("low", [1, 3])
@pytest.mark.parametrize("high", [3, 4, 9, 40])
def test_roomy_holes_cover_every_length_with_little_to_spare(low, high):
    widths = roomy(list(range(low, high + 1)))
    for length in range(low, high + 1):
        assert any(length <= width <= length + SPARE for width in widths)
    assert widths[-1] == high


def test_canvases_of_one_length_share_a_batch():
    assert list(equal_lengths([5, 7, 5, 5, 7], most=2)) == [[0, 2], [3], [1, 4]]


def test_what_follows_a_hole_is_what_counts():
    template = Template((4, None, 5, None, 6), (Slot(1, 2), Slot(3, 4)), filler=9)
    assert following(template, 0, 7).tolist() == [False, False, True, False, True, False, False]
    assert following(template, 1, 7).tolist() == [False] * 4 + [True, False, False]
    last = Template((4, 5, None), (Slot(2, 3),))
    assert following(last, 0, 3).tolist() == [True, True, False]


def result_of(ids):
    count = len(ids)
    return BlockResult(
        ids=np.array(ids, dtype=np.int32),
        entropy=np.arange(count, dtype=np.float32),
        settled=np.arange(count, dtype=np.int32),
        scores=Scores(
            -np.arange(count, dtype=np.float32),
            np.zeros((count, 0), np.int32),
            np.zeros((count, 0), np.float32),
        ),
        steps=3,
        converged=True,
    )


def test_pads_leave_the_holes_and_what_follows_moves_up():
    pad, filler = 0, 1
    ids = [7, 20, pad, 8, pad, 21, pad, 9]
    template = Template(
        (7, None, None, 8, None, None, None, 9), (Slot(1, 3), Slot(4, 7)), filler=filler
    )
    compact, result = without_pads(template, result_of([*ids, filler]), pad)
    assert compact.ids == (7, None, 8, None, 9)
    assert compact.slots == (Slot(1, 2), Slot(3, 4))
    assert result.ids.tolist() == [7, 20, 8, 21, 9, filler, filler, filler, filler]
    assert result.scores.logprobs[:5].tolist() == [0, -1, -3, -5, -7]
    cut = Template(template.ids, template.slots)
    assert without_pads(cut, result_of(ids), pad)[1].ids.tolist() == [7, 20, 8, 21, 9]


def test_mean_logprob_is_that_of_the_obvious_path(demo):
    import mlx.core as mx

    model, tokenizer = demo
    cache = model.make_cache()
    model.prefill(mx.array([tokenizer.encode("Fill in the blanks.")]), cache)
    generator = np.random.default_rng(0)
    shape = (2, model.config.canvas_length)
    canvases, expected = generator.integers(0, model.config.text.vocab_size, (2, *shape))
    counted = generator.random(shape) < 0.5
    ours = mean_logprob(model, cache, canvases, expected, counted)
    logits = np.array(model.denoise(mx.array(canvases), cache), dtype=np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, expected[..., None], axis=-1)[..., 0]
    assert ours == pytest.approx(
        [row[mask].mean() for row, mask in zip(chosen, counted, strict=True)], abs=1e-4
    )


def test_a_canvas_of_holes_alone_says_nothing_of_their_lengths(demo):
    model, _ = demo
    cache = model.make_cache()
    canvas, none = np.zeros(8, dtype=np.int32), np.zeros(8, dtype=bool)
    assert mean_logprob(model, cache, [canvas], [canvas], [none]) == [0.0]


@pytest.mark.parametrize("finalists", [1, 4])
def test_few_of_many_lengths_are_filled(demo, monkeypatch, finalists):
    """A look at each, two steps for the finalists, another look at those where they are several."""
    monkeypatch.setattr(windows, "FINALISTS", finalists)
    filled = []
    denoise = Filler._denoise

    def counting(self, cache, window, rows, **options):
        filled.extend(rows)
        return denoise(self, cache, window, rows, **options)

    monkeypatch.setattr(Filler, "_denoise", counting)
    result = infill(*demo, "the old.<hole:1-9>. sings.", **QUICK)
    assert len(filled) == finalists
    assert result.forwards == 9 + 2 * finalists + (finalists if finalists > 1 else 0)
    assert result.unseen == 0


def test_a_length_that_pushes_text_off_the_canvas_is_not_tried(demo):
    model, tokenizer = demo
    text = "the old cat sings in the garden and the dog sings in the house. "
    room = model.config.canvas_length - len(tokenizer.encode(text)) - 2
    assert 0 < room < 20
    result = infill(model, tokenizer, f"{text}<hole:1-20> end", **QUICK)
    assert result.unseen == 0


@pytest.mark.parametrize("text", ["the old <hole> sings.", "<hole> and <hole:1-4>.", "a <hole:2>"])
def test_holes_ended_with_pads_keep_the_text_around_them(demo, text):
    from mlx_dgemma.prompt.holes import Hole, parse_holes

    model, tokenizer = demo
    result = infill(model, tokenizer, text, lengths="pad", **QUICK)
    rest, end = "", 0
    for filling in result.fillings:
        rest += result.text[end : filling.span[0]] + "\0"
        end = filling.span[1]
    rest += result.text[end:]
    parts = ["\0" if isinstance(part, Hole) else part for part in parse_holes(text)]
    assert rest == "".join(parts)
    assert "<pad>" not in result.text
    assert len(result.tokens) == sum(filling.length for filling in result.fillings)
