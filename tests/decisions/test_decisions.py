"""Decisions on the demo model: what an answer is made of, and what it must not depend on."""

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_dgemma import Choice, Noul, PromptCache, Runtime, Score, decide, load
from mlx_dgemma.decisions import ChoiceAnswer, NoulAnswer, QuestionError, ScoreAnswer, label_passes
from mlx_dgemma.decisions.answers import choice_confidence, make_answer, score_confidence
from mlx_dgemma.decisions.forms import GROUP, groups, make_forms
from mlx_dgemma.decisions.label_passes import decide_turns
from mlx_dgemma.decoding.draws import Place, SeededDraws
from mlx_dgemma.errors import CancelledError, InputError
from mlx_dgemma.generate import encode_prompt

STATE = "I was charged twice for order 4471. Please give me my money back."
ASKED = {
    "money": Noul("Does the writer want money back?"),
    "team": Choice("Who helps?", (("Billing", "invoices"), ("Technical", None), ("Sales", None))),
    "anger": Score("How angry is the writer?", ("calm", "annoyed", "furious")),
}


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def answers(demo):
    return decide(*demo, STATE, ASKED).answers


def test_the_same_question_gets_the_same_answer(demo, answers):
    assert decide(*demo, STATE, ASKED).answers == answers


def test_names_company_and_order_of_questions_change_nothing(demo, answers):
    alone = {name: decide(*demo, STATE, {"q": question}) for name, question in ASKED.items()}
    assert {name: found.answers["q"] for name, found in alone.items()} == answers
    extra = Noul("Is this a poem?")
    reversed_names = {f"other {name}": ASKED[name] for name in reversed(ASKED)}
    found = decide(*demo, STATE, {"new": extra, **reversed_names}).answers
    assert {name: found[f"other {name}"] for name in ASKED} == answers


def test_answers_are_distributions_and_what_follows_from_them(answers):
    noul, choice, score = answers.values()
    assert isinstance(noul, NoulAnswer)
    assert 0 <= noul.p <= 1
    assert isinstance(choice, ChoiceAnswer)
    assert list(choice.probabilities) == ["Billing", "Technical", "Sales"]
    assert sum(choice.probabilities.values()) == pytest.approx(1)
    assert choice.probabilities[choice.choice] == max(choice.probabilities.values())
    assert isinstance(score, ScoreAnswer)
    assert score.score == pytest.approx(score.probabilities[1] + 2 * score.probabilities[2])
    assert sum(score.probabilities) == pytest.approx(1)


def test_one_read_is_the_softmax_of_the_labels_logits_at_the_slot(demo):
    """The obvious path: the whole prompt read at once, the contract's logits of whole canvases."""
    model, tokenizer = demo
    question = ASKED["team"]
    form = make_forms(tokenizer, question, 1)[0]
    prompt = encode_prompt(tokenizer, f"{STATE}\n\n{form.text}")
    cache = model.make_cache()
    reader = label_passes._Reader(model, tokenizer, STATE, {})
    reader.read_state()
    shared = reader._prefix.ids
    assert prompt[: len(shared)] == shared
    model.prefill(np.array(shared)[None], cache)
    model.prefill(np.array(prompt[len(shared) :])[None], cache)
    canvas, slot = reader._canvas()
    keys = np.array([0, *prompt], dtype=np.int64)
    digest = label_passes.hashlib.sha256(keys.tobytes()).digest()
    noise = SeededDraws(int.from_bytes(digest[:7], "little")).canvas(
        Place(0, 0, 0), label_passes.NOISES, model.config.text.vocab_size
    )
    rows = np.tile(canvas, (label_passes.NOISES, 1))
    rows[:, slot] = np.array(noise)
    logits = np.array(model.denoise(mx.array(rows), cache))[:, slot][:, list(form.labels)]
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    found = reader._read_form(form, 1)[: label_passes.NOISES]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_order_of_the_options_is_read_so_rotating_them_changes_nothing(demo):
    """With as many orders as options, each option stands once in every place."""
    options = ASKED["team"].options
    turned = replace(ASKED["team"], options=options[1:] + options[:1])
    first = decide(*demo, STATE, {"q": ASKED["team"]}, orders=3).answers["q"]
    second = decide(*demo, STATE, {"q": turned}, orders=3).answers["q"]
    for name, p in first.probabilities.items():
        assert second.probabilities[name] == pytest.approx(p, abs=1e-5)


@pytest.mark.parametrize("orders", range(1, GROUP + 1))
def test_no_order_of_the_options_is_read_twice(demo, orders):
    for count in (2, 3, 7, GROUP):
        question = Choice("Which?", tuple((f"option {i}", None) for i in range(count)))
        found = {form.answers for form in make_forms(demo[1], question, orders)}
        assert len(found) == min(orders, count)


def test_labels_are_single_tokens_of_their_own(demo):
    _, tokenizer = demo
    many = Choice("Which?", tuple((f"option {i}", None) for i in range(GROUP)))
    for question in (*ASKED.values(), many):
        for form in make_forms(tokenizer, question, 2):
            assert len(set(form.labels)) == len(form.labels) == len(form.answers)
            assert sorted(form.answers) == list(range(len(form.answers)))


@pytest.mark.parametrize("count", [2, 20, 21, 26, 64, 255])
def test_up_to_255_options_are_asked_in_groups(demo, count):
    parts = groups(count)
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) <= GROUP
    if count in (21, 255):
        options = tuple((f"queue {i}", None) for i in range(count))
        decision = decide(*demo, "x", {"q": Choice("Which?", options)}, orders=1)
        assert decision.forwards <= len(parts) + label_passes.MOST_READS  # a group is read once
        found = decision.answers["q"]
        assert len(found.probabilities) == count
        assert sum(found.probabilities.values()) == pytest.approx(1)
        assert found.probabilities[found.choice] == max(found.probabilities.values())


def test_confidence_as_defined():
    assert choice_confidence(np.full(4, 0.25)) == pytest.approx(0)
    assert choice_confidence(np.array([0.0, 1.0])) == pytest.approx(1)
    assert choice_confidence(np.array([0.7, 0.2, 0.1])) == pytest.approx(0.55)
    assert score_confidence(np.array([0.0, 1.0, 0.0])) == pytest.approx(1)
    # mode 0, mean distance .5 + .2 * 2 = .9 over a uniform spread of 2/3
    assert score_confidence(np.array([0.5, 0.3, 0.2])) == pytest.approx(0, abs=1e-9)
    assert score_confidence(np.array([0.8, 0.2, 0.0])) == pytest.approx(1 - 0.2 / (2 / 3))


def test_a_spread_of_reads_is_reported():
    reads = np.array([[0.9, 0.1], [0.7, 0.3]])
    answer = make_answer(Noul("x?"), reads)
    assert answer == NoulAnswer(pytest.approx(0.8), pytest.approx(0.1))


def test_a_state_is_read_once_and_kept_by_a_prompt_cache(demo, answers):
    cache = PromptCache(demo[0])
    first = decide(*demo, STATE, ASKED, cache=cache)
    again = decide(*demo, STATE, ASKED, cache=cache)
    assert first.answers == again.answers == answers
    assert first.cached_tokens == 0
    assert again.cached_tokens > 20
    assert decide(*demo, "Other.", ASKED, cache=cache).answers != answers


def test_states_of_every_json_type(demo):
    for state in ({"a": [1, None, "ü"]}, ["one", 2], "", "ends in newline\n"):
        found = decide(*demo, state, {"q": Noul("Is it short?")}).answers["q"]
        assert 0 <= found.p <= 1


def test_an_image_is_part_of_the_state(demo):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    asked = {"q": Noul("Is it red?")}
    part = [{"type": "image", "image": red}, {"type": "text", "text": "A picture."}]
    first = decide(*demo, part, asked).answers
    assert decide(*demo, "A picture.", asked, images=[red]).answers == first
    assert decide(*demo, "A picture.", asked, images=[blue]).answers != first


def test_a_runtime_decides_on_its_thread(demo, answers):
    with Runtime() as runtime:
        assert runtime.decide(STATE, ASKED).answers == answers
        with pytest.raises(QuestionError):
            runtime.decide(STATE, {})
        assert runtime.decide(STATE, {"m": ASKED["money"]}).answers["m"] == answers["money"]


def test_cancelling_ends_while_the_state_is_read(demo):
    """A long one took its time after its client had left; the cache holds nothing of it."""

    class Left(threading.Event):
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 1

    cache = PromptCache(demo[0])
    with pytest.raises(CancelledError):
        decide(*demo, "The cat sleeps.", {"a": Noul("Is it?")}, cache=cache, cancel=Left())
    fresh = decide(*demo, "The cat sleeps.", {"a": Noul("Is it?")})
    again = decide(*demo, "The cat sleeps.", {"a": Noul("Is it?")}, cache=cache)
    assert (again.answers, again.cached_tokens) == (fresh.answers, 0)


def test_cancelling_ends_between_forms(demo):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        decide(*demo, STATE, ASKED, cancel=cancel)


@pytest.mark.parametrize(
    ("questions", "location"),
    [
        ({}, ("questions",)),
        ([], ("questions",)),
        ({"q": {"instructions": "?"}}, ("questions", "q", "type")),
        ({"q": {"type": "boolean"}}, ("questions", "q", "type")),
        ({"q": {"type": ["noul"]}}, ("questions", "q", "type")),
        ({"q": {"type": "noul"}}, ("questions", "q")),
        ({"q": {"type": "noul", "criteria": {"maybe": "x"}}}, ("questions", "q", "criteria")),
        ({"q": {"type": "choice", "criteria": {}}}, ("questions", "q", "criteria")),
        ({"q": {"type": "choice", "criteria": ["a", "a"]}}, ("questions", "q", "criteria")),
        ({"q": {"type": "choice", "criteria": [1, 2]}}, ("questions", "q", "criteria")),
        ({"q": {"type": "score", "criteria": {"0": "x"}}}, ("questions", "q", "criteria")),
        ({"q": {"type": "score", "criteria": ["a", None]}}, ("questions", "q", "criteria", 1)),
        ({"q": {"type": "score", "criteria": ["x"] * 11}}, ("questions", "q", "criteria")),
        ({"": {"type": "noul", "instructions": "?"}}, ("questions", "")),
        ({"q": Noul(5)}, ("questions", "q")),
        ({"q": Noul("?", true=["x"])}, ("questions", "q")),
        ({"q": Choice("?", ("ab", "cd"))}, ("questions", "q", "criteria")),
        ({"q": Choice("?", (("a", None), ("a", "x")))}, ("questions", "q", "criteria")),
        ({"q": Choice("?", (("a", 1), ("b", 2)))}, ("questions", "q", "criteria")),
        ({"q": Choice("?", {"a": None, "b": None})}, ("questions", "q", "criteria")),
        ({"q": Score("?", "abc")}, ("questions", "q", "criteria")),
        ({"q": Score("?", (1, 2))}, ("questions", "q", "criteria")),
        ({"q": Score("?", None)}, ("questions", "q", "criteria")),
    ],
)
def test_a_faulty_question_is_named(demo, questions, location):
    with pytest.raises(QuestionError) as caught:
        decide(*demo, "x", questions)
    assert caught.value.location == location
    assert str(caught.value).endswith(".")


def test_impossible_options_are_refused(demo):
    with pytest.raises(InputError, match="orders=0 is not possible"):
        decide(*demo, "x", ASKED, orders=0)
    with pytest.raises(InputError, match="seed="):
        decide(*demo, "x", ASKED, seed=-1)
    with pytest.raises(InputError, match="shorten the state"):
        decide(*demo, "a " * 300_000, ASKED)
    with pytest.raises(InputError, match="A question has more text"):
        decide(*demo, "x", {"q": Noul("a " * 300_000)})
    with pytest.raises(InputError, match="Unknown option 'order'; the options are: access, "):
        decide(*demo, "x", ASKED, order=1)
    with pytest.raises(InputError, match="cancel is a threading"):
        decide(*demo, "x", ASKED, cancel=1)
    with pytest.raises(InputError, match="images is a list"):
        decide(*demo, "x", ASKED, images=1)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deep"):
        decide(*demo, deep, ASKED)


def test_others_take_turns_between_the_forms_of_one_question(demo):
    options = tuple((f"queue {i}", None) for i in range(21))
    *turns, decision = decide_turns(*demo, "x", {"q": Choice("Which?", options)}, orders=2)
    assert len(turns) == 2 * 3  # two orders of two groups, and of their winners
    assert turns == sorted(set(turns))
    assert decision.forwards == turns[-1]
