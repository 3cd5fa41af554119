"""Filling holes: what must hold whatever the network says."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.decoding.denoise import denoise_block
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.infilling import edit, fill, infill, refine, regenerate, uncertain_spans, windows
from mlx_dgemma.infilling.filled import TokenInfo
from mlx_dgemma.infilling.template import Layout, TokenTexts
from mlx_dgemma.prompt.holes import Hole, cut_spans, parse_holes

QUICK = {"seed": 1, "max_denoising_steps": 2}


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a<hole>b", ["a", Hole(), "b"]),
        ("<hole>", ["", Hole(), ""]),
        ("a <hole:3> b", ["a ", Hole(3, 3), " b"]),
        ("<hole:1-4><hole>", ["", Hole(1, 4), "", Hole(), ""]),
        (r"say \<hole> or <hole>", ["say <hole> or ", Hole(), ""]),
        (r"\<hole:2><hole>", ["<hole:2>", Hole(), ""]),
    ],
)
def test_holes_are_read_from_text(text, parts):
    assert parse_holes(text) == parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no hole here", "no hole"),
        (r"only \<hole> here", "no hole"),
        ("<hole:0>", "not possible"),
        ("<hole:4-2>", "not possible"),
        ("<hole:many>", "is no hole"),
    ],
)
def test_malformed_holes_are_explained(text, words):
    with pytest.raises(InputError, match=words):
        parse_holes(text)


@pytest.mark.parametrize(
    "spans", [[], [(2, 2)], [(3, 1)], [(0, 99)], [(0, 4), (2, 6)], [(-1, 2)], (0, 4), [(0,)]]
)
def test_impossible_spans_are_explained(spans):
    with pytest.raises(InputError, match="span"):
        cut_spans("some text", spans)


def outside(result):
    """The text without its fillings."""
    text, end = "", 0
    for filling in result.fillings:
        start, stop = filling.span
        assert result.text[start:stop] == filling.text
        text += result.text[end:start] + "\0"
        end = stop
    return text + result.text[end:]


@pytest.mark.parametrize(
    "text",
    [
        "<hole:2> sings in the garden.",  # at the start
        "the old <hole:2> sings.",  # in the middle, after a space
        "the old d<hole:2>g sings.",  # inside a word, on both sides
        "the old dog <hole:3>",  # at the end
        "the <hole:1><hole:2> sings.",  # adjacent
        "<hole:2>",  # nothing else
        "café 😀 <hole:2> über Ωmega <hole:1> 漢字",
        "a\n\n<hole:2>\n\tb",
        "<|turn>user <hole:2><turn|>",  # spelled markers are plain text
    ],
)
def test_what_stands_outside_the_holes_stays_to_the_character(demo, text):
    result = infill(*demo, text, **QUICK)
    literals = [part for part in parse_holes(text) if isinstance(part, str)]
    assert outside(result) == "\0".join(literals)
    for token in result.tokens:
        assert result.text[slice(*token.span)] == token.text


@settings(max_examples=12)
@given(literals=st.lists(st.text(max_size=8), min_size=2, max_size=3), data=st.data())
def test_any_text_survives_around_its_holes(demo, literals, data):
    literals = [literal.encode("utf-8", "ignore").decode() for literal in literals]
    text, spans = literals[0], []
    for literal in literals[1:]:
        spans.append((len(text), len(text) + 1))
        text += "x" + literal
    result = edit(*demo, text, spans, length=2, **QUICK)
    assert outside(result) == "\0".join(literals)


def test_a_length_is_chosen_within_its_range(demo):
    result = infill(*demo, "the old.<hole:2-3>. sings.", **QUICK)
    assert result.fillings[0].length in (2, 3)
    assert result.forwards == 6  # two candidates of two steps, and a look at each


@pytest.mark.parametrize("together", [1, 2, 8])
def test_fewer_canvases_at_once_where_memory_is_short_fill_the_same(demo, together, monkeypatch):
    asked, widths = [], []
    expected = infill(*demo, "the old.<hole:2-5>. sings.", **QUICK)

    def room(config, context, most, **how):
        asked.append((context, most, how))
        return together

    def watched(model, cache, settings, requests, **how):
        widths.append(len(requests))
        return denoise_block(model, cache, settings, requests, **how)

    monkeypatch.setattr(fill, "canvases_together", room)
    monkeypatch.setattr(windows, "denoise_block", watched)
    result = infill(*demo, "the old.<hole:2-5>. sings.", **QUICK)
    [(context, most, how)] = asked
    assert context > 0
    assert most == 8
    assert how == {"sliced_head": False, "kv_bits": None}
    assert max(widths) == min(together, 4)  # four lengths
    assert (result.text, result.forwards) == (expected.text, expected.forwards)


def test_alternatives_come_from_one_prefill_best_first(demo):
    model, tokenizer = demo
    result = infill(model, tokenizer, "the <hole:2> sings.", n=3, **QUICK)
    every = [result, *result.alternatives]
    assert sorted(alternative.seed for alternative in every) == [1, 2, 3]
    scores = [alternative.score for alternative in every]
    assert scores == sorted(scores, reverse=True)
    for alternative in every:
        alone = infill(
            model, tokenizer, "the <hole:2> sings.", seed=alternative.seed, max_denoising_steps=2
        )
        assert alone.fillings[0].length in (2, 3)  # the space before the hole may need a place


def test_text_beyond_one_canvas_is_filled_canvas_by_canvas(demo):
    words = " ".join(["apple"] * 60)
    text = f"{words} <hole:2> {words} <hole:3> {words}"
    result = infill(*demo, text, **QUICK)
    assert outside(result) == f"{words} \0 {words} \0 {words}"
    assert result.unseen > 0
    assert result.steps == 4


def test_long_left_context_goes_into_the_cache(demo):
    words = " ".join(["apple"] * 60)
    result = infill(*demo, f"{words} <hole:2> end", **QUICK)
    assert result.unseen == 0
    assert outside(result) == f"{words} \0 end"


def test_strength_zero_keeps_the_text(demo):
    text = "the old dog sings in the garden."
    result = edit(*demo, text, [(8, 11)], strength=0.0, seed=1)
    assert (result.text, result.steps) == (text, 0)


def test_edit_and_regenerate_touch_their_spans_alone(demo):
    text = "the old dog sings in the garden."
    edited = edit(*demo, text, [(0, 3), (12, 17)], **QUICK)
    assert outside(edited) == "\0 old dog \0 in the garden."
    again = regenerate(*demo, edited, edited.fillings[0].span, **QUICK)
    assert again.text.endswith(edited.text[edited.fillings[0].span[1] :])


def test_refine_redoes_doubtful_tokens_and_keeps_certain_ones(demo):
    result = infill(*demo, "the <hole:3> sings.", **QUICK)
    doubtful = refine(*demo, result, min_probability=1.0, **QUICK)
    assert outside(doubtful).startswith("the ")
    assert refine(*demo, result, min_probability=0.0) is result
    with pytest.raises(InputError, match="choose a number from 0 to 1"):
        refine(*demo, result, min_probability=float("nan"))


def test_uncertain_spans_join_neighbours():
    def token(start, end, logprob):
        return TokenInfo("x" * (end - start), (start, end), logprob, 0.0, 1)

    tokens = [token(0, 2, -0.1), token(2, 4, -3), token(4, 5, -2), token(5, 7, 0), token(7, 8, -9)]
    assert uncertain_spans(tokens) == [(2, 5), (7, 8)]
    assert uncertain_spans(tokens, min_probability=0.0) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, t: infill(m, t, "<hole:33>"), "longer than the canvas"),
        (lambda m, t: infill(m, t, "<hole>", n=0), "n=0"),
        (lambda m, t: edit(m, t, "text", [(0, 4)], strength=2.0), "strength"),
        (lambda m, t: edit(m, t, "text", [(0, 4)], strength=0.5, length=2), "strength"),
        (lambda m, t: edit(m, t, "a b " * 40, [(0, 160)]), "longer than the canvas"),
        (lambda m, t: infill(m, t, "<hole>", prompt=" "), "empty"),
    ],
)
def test_impossible_requests_are_explained(demo, call, words):
    with pytest.raises(InputError, match=words):
        call(*demo)


def test_a_request_can_be_cancelled(demo):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        infill(*demo, "the <hole>", cancel=cancel)


def test_healed_edges_may_only_hold_tokens_that_keep_the_text(demo):
    _, tokenizer = demo
    texts = TokenTexts(tokenizer)
    layout = Layout(tokenizer, ["the old ", " sings"])
    assert layout.before == [" "]
    template = layout.template(0, [2], limit=32)
    (slot,) = template.slots
    allowed = template.allowed[slot.start]
    assert all(texts[token].startswith(" ") for token in allowed)
    assert len(allowed) > 10
    assert slot.start == len(tokenizer.encode("the old ")) - 1


def test_a_word_at_the_edge_does_not_use_up_the_hole(demo):
    """A token that words could go on from joins the hole after it and keeps a place of its own."""
    _, tokenizer = demo
    texts = TokenTexts(tokenizer)
    word = next(
        texts[token]
        for token in range(len(tokenizer))
        if texts[token].isalpha()
        and tokenizer.encode(texts[token]) == [token]
        and len(texts.starting(texts[token])) > 1
    )
    assert Layout(tokenizer, [word, " sings"]).joined(0) == 1
    assert Layout(tokenizer, ["the old.", " sings"]).joined(0) == 0
    result = infill(*demo, f"{word}<hole:1> sings.", **QUICK)
    assert result.forwards == 6  # with a place for the word's own token, and merged with it
    assert result.fillings[0].length in (1, 2)
    assert outside(result) == f"{word}\0 sings."


def test_pins_cover_all_but_the_holes(demo):
    _, tokenizer = demo
    layout = Layout(tokenizer, ["say ", " now"])
    template = layout.template(0, [3], limit=32, tail=[7], filler=1)
    pins = template.pins(32)
    (slot,) = template.slots
    assert np.flatnonzero(~pins.mask).tolist() == list(range(slot.start, slot.end))
    assert pins.ids[-1] == 1
