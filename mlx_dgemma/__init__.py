"""Run DiffusionGemma on a Mac."""

from mlx_dgemma._version import __version__

__all__ = ["__version__"]
