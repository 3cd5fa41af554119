"""Decisions: the model answers a form with one decoder pass instead of writing a reply."""

from mlx_dgemma.decisions.answers import Answer, ChoiceAnswer, NoulAnswer, ScoreAnswer
from mlx_dgemma.decisions.label_passes import Decision, decide
from mlx_dgemma.decisions.questions import Choice, Noul, Question, QuestionError, Score

__all__ = [
    "Answer",
    "Choice",
    "ChoiceAnswer",
    "Decision",
    "Noul",
    "NoulAnswer",
    "Question",
    "QuestionError",
    "Score",
    "ScoreAnswer",
    "decide",
]
