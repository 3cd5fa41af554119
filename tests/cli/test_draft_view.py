"""A draft on the screen: three states told apart, in colour and without."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from mlx_dgemma.cli.draft_view import ACCEPTED, NOISY, SHADE, Pieces, bars, paint, printable
from tests.cli.fakes import STOP, WORDS, decode, draft, settled


def styles(text: object) -> dict[str, str]:
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}  # type: ignore[attr-defined]


def test_each_state_has_its_own_style_and_noise_its_own_shape() -> None:
    shown = paint(draft([1, 2, 3], [True, False, False], [0.0, 0.5, 4.0]), Pieces(decode), {STOP})
    assert shown.plain == "The fox ░░░░░"
    assert styles(shown) == {"The": ACCEPTED, " fox": NOISY, " ░░░░░": SHADE}


def test_without_colour_the_states_still_differ() -> None:
    console = Console(force_terminal=True, no_color=True, color_system="standard")
    with console.capture() as captured:
        console.print(paint(draft([1, 2], [True, False], [0.0, 0.5]), Pieces(decode), {STOP}))
    assert captured.get() == "\x1b[1mThe\x1b[0m\x1b[2;3m fox\x1b[0m\n"


def test_the_draft_ends_at_its_first_stop_id() -> None:
    assert paint(settled([1, 2, STOP, 3]), Pieces(decode), {STOP}).plain == "The fox"
    assert paint(settled([STOP, 1]), Pieces(decode), {STOP}).plain == ""


def test_shades_keep_line_breaks_out() -> None:
    shown = paint(draft([1, 8, 2], [False] * 3, [5.0] * 3), Pieces(decode), {STOP})
    assert shown.plain == "░░░  ░░░"


def test_control_tokens_and_escape_codes_never_reach_the_screen() -> None:
    pieces = Pieces(decode, control_ids={STOP})
    assert pieces(STOP) == ""
    assert pieces(WORDS.index(" \x1b[31m")) == " [31m"
    assert printable("a\x1b]0;title\x07b\r\u202e\n\tc") == "a]0;titleb\n\tc"


def test_half_a_character_is_a_dot() -> None:
    assert Pieces(lambda ids: "\ufffd")(1) == "·"


@pytest.mark.parametrize(("width", "cells"), [(80, 8), (8, 8), (3, 3), (1, 1)])
def test_bars_fit_the_width(width: int, cells: int) -> None:
    shown = bars(draft([1] * 8, [False] * 8, [1.0] * 8), width)
    assert len(shown.plain) == cells


def test_bars_rise_as_entropy_falls_and_are_full_only_when_accepted() -> None:
    entropy = [10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 0.0]
    shown = bars(draft([1] * 7, [False] * 7, entropy), 80).plain
    assert list(shown) == sorted(shown)
    assert shown[0] == "▁"
    assert "█" not in shown
    assert bars(settled([1] * 4), 80).plain == "████"


def test_a_group_is_full_only_when_all_of_it_is() -> None:
    half = bars(draft([1] * 4, [True, True, True, False], [0.0, 0.0, 0.0, 9.0]), 2).plain
    assert half[0] == "█"
    assert half[1] != "█"


def test_entropies_that_are_not_numbers_draw_as_noise() -> None:
    shown = bars(draft([1, 1], [False, False], [np.nan, np.inf]), 80)
    assert shown.plain == "▁▁"
