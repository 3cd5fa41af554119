"""A whole run from its settings: data read, model loaded and tuned, memory checked, training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.hub import resolve_model
from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.checkpoint.sizes import stored_bytes
from mlx_dgemma.checkpoint.weights import EXPAND_BYTES, cast, expand
from mlx_dgemma.decoding.events import Finish
from mlx_dgemma.distributed.starting import world
from mlx_dgemma.errors import InputError
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.training.batches import Batch, Batches, Noise
from mlx_dgemma.training.data import Example, load_split, response_text
from mlx_dgemma.training.loop import STATE, Plan, Trainer
from mlx_dgemma.training.plan import TrainingPlan, check_training, plan_training
from mlx_dgemma.training.rounds import Judge, Rounds, begun
from mlx_dgemma.training.run_events import Evaluated, Event, Report
from mlx_dgemma.training.save_folder import held, make_folder
from mlx_dgemma.training.settings import Settings
from mlx_dgemma.training.tuning import (
    EXPERTS,
    SELF_CONDITIONING,
    Tuning,
    attach,
    load_trained,
    read_tuning,
    trained,
    write_config,
)


class Prepared:
    """A run that fits and can begin. events: what has happened so far."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        tokenizer: Tokenizer,
        splits: Mapping[str, list[Example]],
        plan: TrainingPlan,
    ) -> None:
        self.settings = settings
        self.model, self.tokenizer = model, tokenizer
        self.plan = plan
        self.events: list[Event] = []
        self.splits = splits
        self._world = world()
        self._tested: Evaluated | None = None
        self._check_batches()

    @property
    def leads(self) -> bool:
        """Whether this is the one of several machines that writes and speaks."""
        return not self._world.rank()

    @property
    def summary(self) -> str:
        """What is trained, and what that needs."""
        count = sum(tensor.size for tensor in trained(self.model).values())
        lines = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items() if rows)
        return (
            f"{self.settings.fine_tune_type}: {count / 1e6:.3g} million parameters; {lines}; "
            f"needs {self.plan}"
        )

    def train(
        self,
        show: Callable[[Event], None],
        *,
        cancelled: Callable[[], bool],
        judge: Judge | None = None,
    ) -> bool:
        """Trains; False when cancelled before the last step.

        judge: for few steps, whether the model's own answer to a prompt may be learned from.
        ResourceError where another run writes to the folder.
        """
        with held(Path(self.settings.adapter_path)) if self.leads else nullcontext():
            return self._train(show, cancelled, judge)

    def _train(
        self, show: Callable[[Event], None], cancelled: Callable[[], bool], judge: Judge | None
    ) -> bool:
        settings = self.settings
        folder = Path(settings.adapter_path)
        started = os.path.exists(folder / STATE) or (settings.few_steps and begun(folder))
        if settings.resume and not started:
            raise InputError(f"{folder} holds no save to go on from: leave out --resume.")

        def handle(event: Event) -> None:
            self.events.append(event)
            if self.leads:
                show(event)

        rounds = None
        if settings.few_steps:
            rounds = Rounds(self.model, self.tokenizer, settings, keep=self.leads, judge=judge)

        def rows(split: str, number: int) -> Sequence[Example] | None:
            """What is learned: the data's examples, or the model's own answers to its prompts."""
            prompts = self.splits[split]
            if rounds is None or not prompts:
                return prompts
            return rounds.answers(split, prompts, number, handle, cancelled=cancelled)

        valid = rows("valid", 0)
        if valid is None:
            return False
        trainer = self._make_trainer(self._fixed(valid, settings.val_batches) or None)
        if settings.resume:
            trainer.resume()
        for number in range(settings.round_of(trainer.step), settings.round_of(settings.iters) + 1):
            learned = rows("train", number)
            if learned is None:
                return False
            if len(learned) < settings.batch_size:
                raise InputError(
                    f"The model ended {len(learned)} of its answers to {len(self.splits['train'])} "
                    f"prompts, and a batch is {settings.batch_size}: add prompts, ask for more "
                    "--answers-per-prompt, or lower --batch-size."
                )
            until = settings.first_step(number + 1)
            batches = self._batches(learned, settings.batch_size)
            trainer.run(batches, handle, until=until, cancelled=cancelled)
            if trainer.step < until:
                return False
        return True

    def _write_config(self) -> None:
        settings = self.settings
        write_config(
            Path(settings.adapter_path), settings.tuning, alone=True,
            model=settings.model or "demo", objective=settings.objective,
            **({"entropy_bound": settings.entropy_bound} if settings.few_steps else {}),
        )  # fmt: skip

    def test_line(self) -> str:
        """The loss of test.jsonl, in a sentence."""
        rows = self.splits["test"]
        if not rows:
            raise InputError(f"{self.settings.data} has no test.jsonl.")
        batches = self._fixed(rows, self.settings.test_batches)
        tester = self._make_trainer(batches)
        if not self.settings.train:
            load_trained(self.model, Path(self.settings.adapter_path) / "adapters.safetensors")
        self._tested = found = tester.evaluate()
        facts = "".join(f", {name} {value:.2f}" for name, value in found.facts.items())
        return f"Test loss {found.loss:.3f} (canvas {found.canvas_loss:.3f}){facts}."

    def record(self) -> dict[str, Any]:
        """Settings and figures, ready for JSON."""
        by_kind: dict[str, list[dict[str, Any]]] = {"reports": [], "evaluations": []}
        for event in self.events:
            if isinstance(event, Report):
                by_kind["reports"].append(asdict(event))
            elif isinstance(event, Evaluated):
                by_kind["evaluations"].append(asdict(event))
        return {
            "settings": asdict(self.settings),
            "planned_bytes": asdict(self.plan),
            "machine": machine().record(),
            **by_kind,
            "test": None if self._tested is None else asdict(self._tested),
        }

    def _make_trainer(self, valid: list[Batch] | None) -> Trainer:
        settings = self.settings
        return Trainer(
            self.model,
            replace(settings.loss, temperature=self.model.config.generation.t_max),
            settings.make_optimizer(),
            valid,
            Plan(
                settings.iters,
                settings.grad_accumulation_steps,
                report=settings.steps_per_report,
                evaluate=settings.steps_per_eval,
                save=settings.save_every,
                seed=settings.seed,
            ),
            folder=Path(settings.adapter_path) if settings.train else None,
            configure=self._write_config,
            identity=settings.identity,
            judge=self._judge if settings.val_replies else None,
            checkpoint=settings.grad_checkpoint,
        )

    def _check_batches(self) -> None:
        """Raises InputError where there is no batch in the training data."""
        settings = self.settings
        if settings.train:
            times = settings.answers_per_prompt if settings.few_steps else 1
            self._batches([*self.splits["train"]] * times, settings.batch_size)

    def _batches(self, rows: Sequence[Example], size: int) -> Batches:
        config = self.model.config
        return Batches(
            rows,
            size,
            Noise(config.canvas_length, config.text.vocab_size),
            self.settings.seed,
            mask_prompt=self.settings.mask_prompt,
            context_only=not self.settings.loss.encoder_weight,
            rank=self._world.rank(),
            size=self._world.size(),
        )

    def _fixed(self, rows: Sequence[Example], most: int) -> list[Batch]:
        if not rows:
            return []
        size = min(self.settings.batch_size, len(rows) // self._world.size() * self._world.size())
        batches = self._batches(rows, max(size, 1))
        count = len(batches) if most == -1 else min(most, len(batches))
        return [batches.fixed(index) for index in range(count)]

    def _judge(self, model: Model) -> dict[str, Any]:
        """Replies to validation prompts: the share that is the expected text, and their steps."""
        from mlx_dgemma.generate import stream_generate

        rows = (self.splits["valid"] or self.splits["test"])[: self.settings.val_replies]
        right, steps = 0, []
        for number, example in enumerate(rows):
            if example.images:
                continue
            text = ""
            for event in stream_generate(
                model, self.tokenizer, example.prompt, seed=number, max_tokens=len(example.response)
            ):
                text += event.text
                if isinstance(event, Finish):
                    steps.append(sum(event.steps_per_block) / max(event.blocks, 1))
            right += text.strip() == response_text(example, self.tokenizer).strip()
        if not steps:
            return {}
        return {"replies_equal": right / len(steps), "steps_per_block": sum(steps) / len(steps)}


def prepare(settings: Settings, *, progress: bool = False) -> Prepared:
    """Reads the data, plans the memory, loads the model and makes it trainable.

    Raises InputError for data or settings that cannot be used, ResourceError where training does
    not fit this machine, and what loading raises.
    """
    settings.make_optimizer()
    folder = resolve_model(settings.model, revision=settings.revision, progress=progress)
    mx.random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    model, tokenizer = load(folder, lazy=True, dtype=settings.dtype)
    splits = {
        name: load_split(
            settings.data,
            name,
            model,
            tokenizer,
            settings.max_seq_length,
            prompts=settings.few_steps,
        )
        if wanted
        else []
        for name, wanted in (
            ("train", settings.train),
            ("valid", settings.train),
            ("test", settings.test),
        )
    }
    if settings.train and not splits["train"]:
        raise InputError(f"{settings.data} has no train.jsonl.")
    if settings.test and not splits["test"]:
        raise InputError(f"{settings.data} has no test.jsonl.")
    if settings.train:
        make_folder(Path(settings.adapter_path))
    elif not os.path.exists(Path(settings.adapter_path) / "adapters.safetensors"):
        raise InputError(f"{settings.adapter_path} holds no adapters.safetensors to test.")
    if not settings.train:
        settings = _as_trained(settings)
    settle_for_training(model)
    attach(model, settings.tuning)
    if settings.resume_adapter_file is not None:
        load_trained(model, Path(settings.resume_adapter_file))
    longest = max(example.length for rows in splits.values() for example in rows)
    if settings.few_steps:
        longest += model.config.canvas_length
    plan = plan_training(
        model.config,
        weights=stored_bytes(folder),
        trained=sum(tensor.size for tensor in trained(model).values()),
        batch_size=settings.batch_size // world().size() or 1,
        seq_length=longest,
        checkpoint=settings.grad_checkpoint,
        itemsize=model.residual_dtype.size,
        encoder_loss=bool(settings.loss.encoder_weight),
        layers=_lowest(settings.tuning),
        experts=EXPERTS in settings.tuning.keys,
        whole=settings.tuning.kind == "full",
    )
    check_training(plan, machine())
    return Prepared(settings, model, tokenizer, splits, plan)


def _as_trained(settings: Settings) -> Settings:
    """The settings with what an adapter folder says of itself."""
    found = read_tuning(Path(settings.adapter_path))
    return replace(
        settings,
        fine_tune_type=found.kind,
        num_layers=found.num_layers,
        rank=found.rank,
        scale=found.scale,
        dropout=found.dropout,
        keys=found.keys,
    )


def settle_for_training(model: Model) -> None:
    """Without a GPU a small model computes in dense float32, as inference does."""
    if mx.default_device() == mx.Device(mx.cpu) and model.dtype == mx.float32:
        dense = 4 * sum(np.prod(shape) for shape in _shapes(model))
        if dense <= EXPAND_BYTES:
            expand(model)
            cast(model, model)


def _lowest(tuning: Tuning) -> int:
    """How many layers gradients go back through, from the last one; -1 is all."""
    outside = any(key in SELF_CONDITIONING for key in tuning.keys)
    return -1 if outside and tuning.kind != "full" else tuning.num_layers


def _shapes(model: Model) -> list[tuple[int, ...]]:
    from mlx_dgemma.model.parameters import matrices

    return list(matrices(model.config).values())
