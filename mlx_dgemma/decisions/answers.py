"""Answers: probabilities with what is derived from them, in the form of `POST /v1/systemone`.

Confidence is defined there: for a choice of n options (max p - 1/n) / (1 - 1/n); for a score
1 - sum p_i |i - mode| / (mean of |i - (n-1)/2|), at least 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_dgemma.decisions.questions import Choice, Noul, Question, Score


@dataclass(frozen=True)
class NoulAnswer:
    """p: probability of yes. stderr: standard error of p over the reads."""

    p: float
    stderr: float

    def to_json(self) -> dict[str, Any]:
        return {"type": "noul", "noul": self.p, "x_stderr": self.stderr}


@dataclass(frozen=True)
class ChoiceAnswer:
    """choice: the most probable option, the first of equal ones. probabilities: by option.
    stderr: the largest standard error of any of them over the reads."""

    choice: str
    probabilities: dict[str, float]
    confidence: float
    stderr: float

    def to_json(self) -> dict[str, Any]:
        return {
            "type": "choice",
            "choice": self.choice,
            "probabilities": self.probabilities,
            "confidence": self.confidence,
            "x_stderr": self.stderr,
        }


@dataclass(frozen=True)
class ScoreAnswer:
    """score: the mean level, sum of i * p_i. levels: their descriptions. probabilities: of each.
    stderr: standard error of the score over the reads."""

    score: float
    levels: tuple[str, ...]
    probabilities: tuple[float, ...]
    confidence: float
    stderr: float

    def to_json(self) -> dict[str, Any]:
        return {
            "type": "score",
            "score": self.score,
            "legend": {str(index): level for index, level in enumerate(self.levels)},
            "probabilities": {str(index): p for index, p in enumerate(self.probabilities)},
            "confidence": self.confidence,
            "x_stderr": self.stderr,
        }


Answer = NoulAnswer | ChoiceAnswer | ScoreAnswer


def make_answer(question: Question, reads: np.ndarray) -> Answer:
    """The answer that reads [r, n] give: each row one distribution over the question's answers,
    in the question's own order (yes before no)."""
    mean = reads.mean(axis=0)
    mean = mean / mean.sum()
    if isinstance(question, Noul):
        return NoulAnswer(float(mean[0]), _stderr(reads[:, 0]))
    if isinstance(question, Choice):
        names = [name for name, _ in question.options]
        return ChoiceAnswer(
            choice=names[int(np.argmax(mean))],
            probabilities={name: float(p) for name, p in zip(names, mean, strict=True)},
            confidence=choice_confidence(mean),
            stderr=max(_stderr(column) for column in reads.T),
        )
    assert isinstance(question, Score)
    places = np.arange(len(mean))
    return ScoreAnswer(
        score=float(mean @ places),
        levels=question.levels,
        probabilities=tuple(map(float, mean)),
        confidence=score_confidence(mean),
        stderr=_stderr(reads @ places),
    )


def choice_confidence(probabilities: np.ndarray) -> float:
    """0 for a uniform distribution [n], 1 for certainty."""
    count = len(probabilities)
    return float(np.clip((probabilities.max() - 1 / count) / (1 - 1 / count), 0, 1))


def score_confidence(probabilities: np.ndarray) -> float:
    """1 minus the mean distance from the most probable level, over that of a uniform
    distribution from the middle of the scale; 0 to 1. probabilities: float [levels]."""
    count = len(probabilities)
    places = np.arange(count)
    distance = probabilities @ np.abs(places - probabilities.argmax())
    return float(max(0.0, 1 - distance / np.abs(places - (count - 1) / 2).mean()))


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
