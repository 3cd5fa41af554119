"""The training loop: steps, reports, evaluation, and saves that a killed process goes on from.

Step n draws everything from (seed, n), so a run that was ended and resumed gives the adapter of
one that was not. A save replaces one file that holds weights, optimizer state and step together.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from mlx_dgemma.distributed.starting import world
from mlx_dgemma.errors import CheckpointError, NumericsError
from mlx_dgemma.kernels.gradients import gradients
from mlx_dgemma.model import Model
from mlx_dgemma.model.names import named_tensors
from mlx_dgemma.training.batches import Batches
from mlx_dgemma.training.forward import Passes
from mlx_dgemma.training.loss import Objective, value_and_gradient
from mlx_dgemma.training.optimizers import Update
from mlx_dgemma.training.run_events import Evaluated, Event, Report, Saved
from mlx_dgemma.training.tensor_files import write_tensors
from mlx_dgemma.training.tuning import WEIGHTS, trained

STATE = "training_state.safetensors"


@dataclass(frozen=True)
class Plan:
    """iters: optimizer steps. accumulate: batches a step. clip: largest norm of a gradient.
    report, evaluate, save: every so many steps. seed: of batches, noise and dropout."""

    iters: int
    accumulate: int = 1
    clip: float = 1.0
    report: int = 10
    evaluate: int = 200
    save: int = 100
    seed: int = 0


class Trainer:
    """Trains what `attach` made trainable of a model.

    folder: where adapters.safetensors and the state are saved; None saves nothing. configure:
    called before the first adapter is saved, to write what describes it. identity: settings that a
    state to resume must have been made with. judge: called with the model at
    every evaluation; its result is in `Evaluated.facts`. checkpoint: see `Passes`.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        optimizer: optim.Optimizer,
        valid: Sequence[Any] | None,
        plan: Plan,
        *,
        folder: Path | None,
        configure: Callable[[], None] | None = None,
        identity: dict[str, Any],
        judge: Callable[[Model], dict[str, Any]] | None = None,
        checkpoint: bool = False,
    ) -> None:
        self.model = model
        self._passes = Passes(model, checkpoint=checkpoint)
        self._objective = objective
        self._optimizer = optimizer
        self._world = world()
        # A machine's part of the loss is its part of the sum; MLX averages them.
        self._apply = Update(model, optimizer, plan.clip, self._world.size() / plan.accumulate)
        self._valid = valid
        self._plan = plan
        self._folder = folder
        self._configure = configure
        self._identity = json.dumps(identity, sort_keys=True)
        self._judge = judge
        self.step = self._saved = 0

    def run(
        self,
        train: Batches,
        handle: Callable[[Event], None],
        *,
        until: int,
        cancelled: Callable[[], bool],
    ) -> None:
        """Trains to step `until`; hands out what happens. Ends early when `cancelled`, between two
        steps. Saves at its end.

        Raises NumericsError at a loss that is no number; the last save stays as it is.
        """
        plan = self._plan
        step = value_and_gradient(self._passes, self._objective)
        self.model.train()
        since: list[list[float]] = []
        tokens, started = 0, time.perf_counter()
        while self.step < until:
            if cancelled():
                break
            mx.random.seed(plan.seed * 1_000_003 + self.step)
            total, parts = None, []
            for turn in range(plan.accumulate):
                batch = train.at(self.step * plan.accumulate + turn)
                (loss, shares), found = step(batch)
                total = found if total is None else tree_map(mx.add, total, found)
                mx.eval(total, loss, shares)
                parts.append(_numbers(loss, shares))
                tokens += int(batch.lengths.sum())
            since.append(self._means(parts))
            if not math.isfinite(since[-1][0]):
                raise NumericsError(self._not_finite(f"The loss of step {self.step + 1} is"))
            self._update(total)
            self.step += 1
            if self.step % plan.report == 0 or self.step == plan.iters:
                handle(self._report(since, tokens, time.perf_counter() - started))
                since, tokens, started = [], 0, time.perf_counter()
            if self._valid is not None and (
                self.step % plan.evaluate == 0 or self.step == plan.iters
            ):
                handle(self.evaluate())
                started = time.perf_counter()
            if self.step % plan.save == 0 and self.step < until:
                self._save(handle)
        self.model.eval()
        self._save(handle)

    def evaluate(self) -> Evaluated:
        """The loss on the validation batches, whose noise is always the same. NumericsError where
        it is no number."""
        assert self._valid is not None
        started = time.perf_counter()
        self.model.eval()
        losses = []
        for batch in self._valid:
            loss, parts = self._loss(batch)
            losses.append(_numbers(loss, parts))
        facts = self._judge(self.model) if self._judge is not None else {}
        self.model.train()
        whole, canvas, encoder = self._means(losses)
        if not math.isfinite(whole):
            raise NumericsError(self._not_finite(f"The loss of step {self.step} on other data is"))
        return Evaluated(self.step, whole, canvas, encoder, time.perf_counter() - started, facts)

    def resume(self) -> bool:
        """Goes on from the folder's state; False when there is none.

        Raises CheckpointError for a state of other settings, or a damaged one.
        """
        if self._folder is None or not os.path.exists(path := self._folder / STATE):
            return False
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            tensors, header = loaded
            step = int(header["step"])
            found = header["identity"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: delete it to begin again.") from error
        if found != self._identity:
            differing = _differing(json.loads(found), json.loads(self._identity))
            raise CheckpointError(
                f"{path} was made with another {differing}: use the same, or a new --adapter-path."
            )
        weights = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
        state = {k[2:]: v for k, v in tensors.items() if k.startswith("o.")}
        self.model.load_weights(list(weights.items()), strict=False)
        try:
            self._apply.restore(state)
        except KeyError as error:
            raise CheckpointError(
                f"{path} is damaged, or another version's: delete it to begin again, or go on from "
                "the adapter beside it with --resume-adapter-file."
            ) from error
        self.step = self._saved = step
        return True

    def _loss(self, batch: Any) -> tuple[mx.array, mx.array]:
        with gradients():
            return self._objective(self._passes, batch)

    def _update(self, gradients: Any) -> None:
        self._apply(average_gradients(gradients, self._world))
        mx.eval(self.model.trainable_parameters(), self._optimizer.state)

    def _means(self, rows: list[list[float]]) -> list[float]:
        means = mx.array(rows).mean(axis=0)
        if self._world.size() > 1:
            means = mx.distributed.all_sum(means, stream=mx.cpu)
        found: list[float] = means.tolist()  # type: ignore[assignment]
        return found

    def _report(self, rows: list[list[float]], tokens: int, seconds: float) -> Report:
        loss, canvas, encoder = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return Report(
            self.step,
            loss,
            canvas,
            encoder,
            float(self._optimizer.learning_rate.item()),
            len(rows) / seconds,
            tokens * self._world.size() / seconds,
            mx.get_peak_memory(),
        )

    def _not_finite(self, what: str) -> str:
        saved = self._saved
        kept = f"the adapter of step {saved} is kept" if saved else "nothing was saved yet"
        return f"{what} not a number; {kept}. Lower --learning-rate or the scale."

    def _save(self, handle: Callable[[Event], None]) -> None:
        if self._folder is None or self._world.rank():
            return
        weights = trained(self.model)
        if not mx.stack([mx.isfinite(tensor).all() for tensor in weights.values()]).all():
            raise NumericsError(self._not_finite(f"What step {self.step} made of a weight is"))
        state = named_tensors(self._optimizer.state)
        both = {f"w.{k}": v for k, v in weights.items()} | {f"o.{k}": v for k, v in state.items()}
        header = {"step": str(self.step), "identity": self._identity}
        write_tensors(self._folder / STATE, both, header)
        if self._configure is not None:
            self._configure()
            self._configure = None
        path = self._folder / WEIGHTS
        write_tensors(path, weights, {"format": "mlx", "step": str(self.step)})
        self._saved = self.step
        handle(Saved(self.step, path))


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return ", ".join(key.replace("_", "-") for key in keys)


def _numbers(loss: mx.array, parts: mx.array) -> list[float]:
    found: list[float] = mx.concatenate([loss[None], parts]).tolist()  # type: ignore[assignment]
    return found
