"""How tests run a block and listen to it."""

from __future__ import annotations

import numpy as np


def drive(steps):
    """(every step, the results) of a `denoise_block`."""
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as done:
            return seen, done.value


class Spy:
    """The model, with an ear at the decoder pass; `signals` is what each step was given."""

    def __init__(self, model):
        self._model = model
        self.signals = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def hidden(self, canvas, cache, soft_embeddings=None, **options):
        self.signals.append(None if soft_embeddings is None else np.array(soft_embeddings))
        return self._model.hidden(canvas, cache, soft_embeddings, **options)
