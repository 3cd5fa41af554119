"""Ids walked in groups and many states at once, against each id walked by itself."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_dgemma import Constraint
from mlx_dgemma.constraints import transitions
from mlx_dgemma.constraints.automaton import Automaton
from mlx_dgemma.constraints.transitions import DEAD, END
from tests.constraints.test_published_tokenizer import SIZE, pytestmark, tokenizer

__all__ = ["pytestmark"]  # where there is no published tokenizer, these are skipped, too

LANGUAGES = {
    "strings of any length": Constraint.json_schema({"type": "array", "items": {"type": "string"}}),
    "strings of a bounded length": Constraint.json_schema({"type": "string", "maxLength": 30}),
    "words": Constraint.regex(r"[A-Z][a-z]+( [a-z]+){1,4}\."),
    "literals": Constraint.choice(["international", "interest", "internet café", "in"]),
}


def by_itself(automaton: Automaton, state: int, id_: int) -> int:
    if automaton.vocabulary.is_stop[id_]:
        return END if automaton.accepting[state] else DEAD
    for symbol in automaton.vocabulary.spelling(id_):
        state = int(automaton.transitions.row(state)[symbol])
    return state


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("room", [None, 20_000])
def test_groups_lead_where_each_of_their_ids_leads(
    name: str, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids come in several lots, so that later ones join groups that are known or split; with room
    for few transitions, what was walked is forgotten in between."""
    if room:
        monkeypatch.setattr(transitions, "_MOST_KEPT", room)
    automaton = LANGUAGES[name].language(tokenizer(), SIZE).automaton
    automaton.transitions._forget()
    rng, states = np.random.default_rng(5), np.array([automaton.start])
    stops = automaton.vocabulary.stop_ids
    met = set()
    for _ in range(5):
        alive = [automaton.alive(state) for state in states.tolist() if state != END]
        ids = np.concatenate([*alive, rng.integers(0, SIZE, 300), stops])
        table = automaton.table(states, ids)
        for at in rng.integers(0, ids.size, 150).tolist():
            for row, state in enumerate(states.tolist()[:12]):
                expected = END if state == END else by_itself(automaton, state, int(ids[at]))
                assert table[row, at] == expected
                met.add(expected)
        reached = np.unique(table).astype(np.int64)
        states = np.unique(np.concatenate([states, reached[reached != DEAD][:20]]))
    assert {DEAD, END} < met
