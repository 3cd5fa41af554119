"""Languages that a reply must belong to: patterns, choices, JSON schemas, tool calls."""

from mlx_dgemma.constraints.constraint import Constraint, Language
from mlx_dgemma.constraints.tool_calls import ToolCalls
from mlx_dgemma.errors import LanguageError

__all__ = ["Constraint", "Language", "LanguageError", "ToolCalls"]
