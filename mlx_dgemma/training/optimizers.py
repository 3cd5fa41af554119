"""Optimizers and learning-rate schedules by name, as mlx-lm's configuration names them."""

from __future__ import annotations

from typing import Any

import mlx.optimizers as optim

from mlx_dgemma.errors import InputError

OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
# Google's settings for this model.
DEFAULTS: dict[str, dict[str, Any]] = {"adamw": {"betas": [0.95, 0.99], "weight_decay": 1e-4}}


def make_optimizer(
    name: str, learning_rate: float, iters: int, options: dict[str, Any], schedule: Any
) -> optim.Optimizer:
    """schedule: mlx-lm's `lr_schedule` ({name, arguments, warmup}); None is a cosine from
    `learning_rate` to a tenth of it over `iters` steps.

    Raises InputError for an unknown name or unusable options.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"--optimizer {name} is not one of {', '.join(OPTIMIZERS)}.")
    try:
        if schedule is None:
            rate: Any = optim.cosine_decay(learning_rate, iters, learning_rate / 10)
        else:
            from mlx_lm.tuner.utils import build_schedule

            rate = build_schedule(schedule)
        given = {**DEFAULTS.get(name, {}), **options}
        chosen: optim.Optimizer = OPTIMIZERS[name](learning_rate=rate, **given)
        return chosen
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"These optimizer or schedule settings do not fit: {error}.") from error
