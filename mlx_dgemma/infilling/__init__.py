"""Filling holes and editing spans: what a canvas can do and a left-to-right model cannot."""

from mlx_dgemma.infilling.fill import edit, infill, infill_turns, refine, regenerate
from mlx_dgemma.infilling.filled import Filling, Infill, TokenInfo, uncertain_spans

__all__ = [
    "Filling",
    "Infill",
    "TokenInfo",
    "edit",
    "infill",
    "infill_turns",
    "refine",
    "regenerate",
    "uncertain_spans",
]
