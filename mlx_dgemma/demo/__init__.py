"""The bundled demo: a complete DiffusionGemma in miniature and the tasks it was trained on."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
