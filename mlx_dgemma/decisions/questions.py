"""Questions with a fixed set of answers: yes or no, one of several options, a level on a scale.

The JSON form is the one of `POST /v1/systemone`:

    {"type": "noul",   "instructions": ..., "criteria": {"true": ..., "false": ...}}
    {"type": "choice", "instructions": ..., "criteria": {"option": "description or null", ...}}
    {"type": "score",  "instructions": ..., "criteria": ["lowest level", ..., "highest level"]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dgemma.errors import InputError

MAX_OPTIONS = 255
MAX_LEVELS = 10
MAX_QUESTIONS = 256


class QuestionError(InputError):
    """A question that cannot be asked. location: the keys and indices that lead to the fault."""

    def __init__(self, message: str, location: tuple[str | int, ...]) -> None:
        super().__init__(message)
        self.location = location


@dataclass(frozen=True)
class Noul:
    """A yes-or-no question. true, false: what counts as yes and as no, where that needs saying."""

    instructions: str | None = None
    true: str | None = None
    false: str | None = None


@dataclass(frozen=True)
class Choice:
    """One of 2 to 255 options. options: name -> description or None, in order."""

    instructions: str | None
    options: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Score:
    """A level on a scale of 2 to 10. levels: their descriptions, the lowest first."""

    instructions: str | None
    levels: tuple[str, ...]


Question = Noul | Choice | Score


def read_questions(value: Any) -> dict[str, Question]:
    """Questions by id from their JSON form or from the classes above.

    Raises QuestionError for no questions, more than 256, or one that cannot be asked.
    """
    if not isinstance(value, Mapping):
        raise QuestionError("questions must be an object: id -> question.", ("questions",))
    if not value:
        raise QuestionError("questions is empty: ask at least one.", ("questions",))
    if len(value) > MAX_QUESTIONS:
        raise QuestionError(
            f"questions has {len(value)} entries: ask at most {MAX_QUESTIONS} at once.",
            ("questions",),
        )
    return {name: _read_question(name, question) for name, question in value.items()}


def _read_question(name: Any, value: Any) -> Question:
    if not isinstance(name, str) or not name:
        raise QuestionError("A question id must be a non-empty string.", ("questions", str(name)))
    where: tuple[str | int, ...] = ("questions", name)
    if isinstance(value, Noul | Choice | Score):
        _check(value, where)
        return value
    if not isinstance(value, Mapping):
        raise QuestionError(f"{_path(where)} must be an object with a type.", where)
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise QuestionError(
            f"{_path(where)}.type must be {', '.join(map(repr, _READERS))}.", (*where, "type")
        )
    instructions = as_text(value.get("instructions"))
    question = _READERS[kind](instructions, value.get("criteria"), (*where, "criteria"))
    _check(question, where)
    return question


def _read_noul(instructions: str | None, criteria: Any, where: tuple[str | int, ...]) -> Noul:
    if criteria is None:
        criteria = {}
    if not isinstance(criteria, Mapping) or set(criteria) - {"true", "false"}:
        raise QuestionError(f"{_path(where)} may hold 'true' and 'false' alone.", where)
    return Noul(instructions, as_text(criteria.get("true")), as_text(criteria.get("false")))


def _read_choice(instructions: str | None, criteria: Any, where: tuple[str | int, ...]) -> Choice:
    if isinstance(criteria, Mapping):
        return Choice(instructions, tuple((name, as_text(text)) for name, text in criteria.items()))
    if isinstance(criteria, Sequence) and not isinstance(criteria, str):
        if not all(isinstance(name, str) for name in criteria):
            raise QuestionError(f"{_path(where)}: every option must be a string.", where)
        return Choice(instructions, tuple((name, None) for name in criteria))
    raise QuestionError(
        f"{_path(where)} must be an object, option -> description or null, or a list of options.",
        where,
    )


def _read_score(instructions: str | None, criteria: Any, where: tuple[str | int, ...]) -> Score:
    if not isinstance(criteria, Sequence) or isinstance(criteria, str):
        raise QuestionError(f"{_path(where)} must be a list of levels, the lowest first.", where)
    levels = [as_text(level) for level in criteria]
    for index, level in enumerate(levels):
        if level is None:
            raise QuestionError(f"{_path(where)}[{index}] needs a description.", (*where, index))
    return Score(instructions, tuple(level for level in levels if level is not None))


_Reader = Callable[[str | None, Any, tuple[str | int, ...]], Question]
_READERS: dict[Any, _Reader] = {"noul": _read_noul, "choice": _read_choice, "score": _read_score}


def _check(question: Question, where: tuple[str | int, ...]) -> None:
    _check_text(question.instructions, "instructions", where)
    if isinstance(question, Noul):
        _check_text(question.true, "true", where)
        _check_text(question.false, "false", where)
        if not any((question.instructions, question.true, question.false)):
            raise QuestionError(
                f"{_path(where)} asks nothing: give it instructions or criteria.", where
            )
        return
    here = (*where, "criteria")
    if isinstance(question, Choice):
        _check_count(question.options, MAX_OPTIONS, "options", here)
        _check_options(question.options, here)
        return
    _check_count(question.levels, MAX_LEVELS, "levels", here)
    if not all(isinstance(level, str) and level for level in question.levels):
        raise QuestionError(f"{_path(here)} has a level without a description.", here)


def _check_options(options: Sequence[Any], where: tuple[str | int, ...]) -> None:
    names = set()
    for option in options:
        if not isinstance(option, Sequence) or isinstance(option, str) or len(option) != 2:
            raise QuestionError(
                f"{_path(where)}: every option must be a pair of a name and a description or None.",
                where,
            )
        name, text = option
        if not isinstance(name, str) or not name:
            raise QuestionError(f"{_path(where)} has an option without a name.", where)
        if name in names:
            raise QuestionError(f"{_path(where)} names an option twice.", where)
        names.add(name)
        _check_text(text, name, where)


def _check_count(given: Any, most: int, what: str, where: tuple[str | int, ...]) -> None:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise QuestionError(f"{_path(where)} must be a sequence of {what}.", where)
    if not 2 <= len(given) <= most:
        raise QuestionError(f"{_path(where)} has {len(given)} {what}: give 2 to {most}.", where)


def _check_text(value: Any, name: str, where: tuple[str | int, ...]) -> None:
    if value is not None and not isinstance(value, str):
        raise QuestionError(
            f"{_path(where)}.{name} must be a string or None, not a {type(value).__name__}.", where
        )


def as_text(value: Any) -> str | None:
    """A JSON value as the model reads it: strings as they are, the rest as JSON; None and empty
    strings are nothing. Non-ASCII text stays unescaped: escapes cost accuracy."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise InputError("A JSON value is nested too deep: give it as text.") from None
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{type(value).__name__} values cannot be shown as JSON: {error}."
        ) from error


def _path(where: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in where)
