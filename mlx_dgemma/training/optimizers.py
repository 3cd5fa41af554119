"""Optimizers and learning-rate schedules by name, as mlx-lm's configuration names them, and their
step."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_unflatten

from mlx_dgemma.errors import InputError
from mlx_dgemma.model.names import named_tensors

OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")
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
        chosen = _made(name, learning_rate, iters, options, schedule)
        # What does not fit may show in a step alone.
        tried = _made(name, learning_rate, iters, options, schedule)
        mx.eval(tried.apply_gradients({"tried": mx.ones((2, 2))}, {"tried": mx.ones((2, 2))}))
        return chosen
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"The settings of the optimizer {name} or of its schedule do not fit: "
            f"{str(error).rstrip('.')}."
        ) from error


def _made(
    name: str, learning_rate: float, iters: int, options: dict[str, Any], schedule: Any
) -> optim.Optimizer:
    if schedule is None:
        rate: Any = optim.cosine_decay(learning_rate, iters, learning_rate / 10)
    elif schedule.get("name") not in SCHEDULES:
        raise ValueError(f"name {schedule.get('name')!r} is not one of {', '.join(SCHEDULES)}")
    else:
        from mlx_lm.tuner.utils import build_schedule

        rate = build_schedule(schedule)
    given = {**DEFAULTS.get(name, {}), **options}
    chosen: optim.Optimizer = OPTIMIZERS[name](learning_rate=rate, **given)
    return chosen


JOINED = 1 << 20  # numbers that a tensor may have to be joined with others
_BY_NUMBER = (optim.Adam, optim.SGD)  # each number's step depends on its own gradient alone


class Update:
    """An optimizer's step on a module. Small tensors take it as one vector for each dtype, which
    saves tens of operations on every one of them; for optimizers to which that is the same.

    clip: largest norm of all gradients together. scale: what they are multiplied with before.
    """

    def __init__(
        self, module: nn.Module, optimizer: optim.Optimizer, clip: float, scale: float = 1.0
    ) -> None:
        self._module, self._optimizer = module, optimizer
        self._clip, self._scale = clip, scale

    def __call__(self, gradients: Any) -> None:
        """Replaces the module's parameters and the optimizer's state by what they will be."""
        slopes = self._join(gradients)
        squares = [mx.square(g.astype(mx.float32)).sum() for g in named_tensors(slopes).values()]
        norm = mx.sqrt(mx.stack(squares).sum()) * self._scale
        factor = self._scale * mx.minimum(self._clip / (norm + 1e-6), 1.0)
        scaled = tree_map(lambda g: g * factor.astype(g.dtype), slopes)
        parameters = self._module.trainable_parameters()
        found = self._optimizer.apply_gradients(scaled, self._join(parameters))
        self._module.update(self._part(found, parameters))

    def restore(self, state: dict[str, mx.array]) -> None:
        """Goes on from the optimizer's state, by its names. KeyError where it is another one's."""
        optimizer = self._optimizer
        optimizer.init(self._join(self._module.trainable_parameters()))
        if set(named_tensors(optimizer.state)) != set(state):
            raise KeyError("the optimizer's state")
        optimizer.state = tree_unflatten(list(state.items()))

    def _join(self, tensors: Any) -> dict[str, Any]:
        """The tensors by name, and vectors of the small ones by their dtype."""
        vectors: dict[str, list[mx.array]] = {}
        apart = {}
        for name, tensor in named_tensors(tensors).items():
            if self._small(tensor):
                vectors.setdefault(_dtype(tensor), []).append(tensor.reshape(-1))
            else:
                apart[name.replace(".", "/")] = tensor
        return {"apart": apart} | {
            name: mx.concatenate(parts) if len(parts) > 1 else parts[0]
            for name, parts in vectors.items()
        }

    def _part(self, found: dict[str, Any], like: Any) -> Any:
        """What was joined, by the names and in the shapes of the tensors `like`."""
        places: dict[str, int] = {}
        parted = []
        for name, tensor in named_tensors(like).items():
            if self._small(tensor):
                dtype = _dtype(tensor)
                begin = places.get(dtype, 0)
                end = places[dtype] = begin + tensor.size
                parted.append((name, found[dtype][begin:end].reshape(tensor.shape)))
            else:
                parted.append((name, found["apart"][name.replace(".", "/")]))
        return tree_unflatten(parted)

    def _small(self, tensor: mx.array) -> bool:
        return isinstance(self._optimizer, _BY_NUMBER) and tensor.size <= JOINED


def _dtype(tensor: mx.array) -> str:
    return str(tensor.dtype).rpartition(".")[2]
