"""Checkpoints from one layout and precision to another."""

from mlx_dgemma.convert.conversion import Report, convert
from mlx_dgemma.convert.recipes import RECIPES, Precision, Recipe, Rule

__all__ = ["RECIPES", "Precision", "Recipe", "Report", "Rule", "convert"]
