"""A whole run from its settings: data read, model loaded and tuned, memory checked, training."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.hub import resolve_model
from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.checkpoint.sizes import stored_bytes
from mlx_dgemma.checkpoint.weights import EXPAND_BYTES, cast, expand
from mlx_dgemma.decoding.events import Finish
from mlx_dgemma.errors import InputError
from mlx_dgemma.machine.hardware import machine
from mlx_dgemma.model import Model
from mlx_dgemma.prompt import Tokenizer
from mlx_dgemma.training.batches import Batch, Batches, Noise
from mlx_dgemma.training.data import Example, load_split, response_text
from mlx_dgemma.training.loop import Evaluated, Event, Plan, Report, Trainer
from mlx_dgemma.training.loss import Objective
from mlx_dgemma.training.plan import TrainingPlan, check_training, plan_training
from mlx_dgemma.training.schedule import make_optimizer
from mlx_dgemma.training.tuning import (
    GROUPS,
    Kind,
    Tuning,
    attach,
    load_trained,
    read_tuning,
    trained,
    write_config,
)


@dataclass(frozen=True)
class Settings:
    """Names and defaults of mlx_lm.lora where it has them; see `mlx_dgemma.lora --help`."""

    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    train: bool = False
    test: bool = False
    data: str = ""
    adapter_path: str = "adapters"
    resume: bool = False
    resume_adapter_file: str | None = None
    fine_tune_type: Kind = "lora"
    num_layers: int = -1
    rank: int = 8
    scale: float = 4.0
    dropout: float = 0.0
    trainable: tuple[str, ...] = ("attention", "dense")
    keys: tuple[str, ...] | None = None
    batch_size: int = 4
    iters: int = 1000
    learning_rate: float = 1.5e-4
    optimizer: str = "adamw"
    optimizer_config: dict[str, Any] = field(default_factory=dict)
    lr_schedule: dict[str, Any] | None = None
    grad_accumulation_steps: int = 1
    max_seq_length: int = 2048
    mask_prompt: bool = False
    encoder_weight: float = 1.0
    detach_context: bool = False
    grad_checkpoint: bool = False
    seed: int = 0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    val_batches: int = 25
    test_batches: int = 500
    val_replies: int = 8

    def __post_init__(self) -> None:
        for name in ("batch_size", "iters", "grad_accumulation_steps", "max_seq_length",
                     "steps_per_report", "steps_per_eval", "save_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is not possible: use 1 or more.")
        for name in ("learning_rate", "encoder_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} {getattr(self, name)} is not possible: use 0 or more.")
        unknown = set(self.trainable) - set(GROUPS)
        if unknown:
            raise InputError(f"trainable {sorted(unknown)[0]!r} is not one of {', '.join(GROUPS)}.")
        if not self.data:
            raise InputError("--data is missing: name a folder with train.jsonl.")
        if not (self.train or self.test):
            raise InputError("Say what to do: --train, --test, or both.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
        """From a configuration file's values, which `given` ones overrule. mlx-lm's
        `lora_parameters` are spread out; names that it has and we have no use for are refused."""
        values = dict(config)
        values |= values.pop("lora_parameters", None) or {}
        types_of = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(types_of))
        if unknown:
            raise InputError(f"The configuration's {unknown[0]!r} is no setting of this command.")
        checked: dict[str, Any] = {}
        for name, value in {**values, **given}.items():
            if isinstance(value, list):
                value = tuple(value)
            if not _fits(value, types_of[name]):
                raise InputError(f"The setting {name} cannot be {value!r}.")
            checked[name] = float(value) if types_of[name] is float else value
        return cls(**checked)

    @property
    def tuning(self) -> Tuning:
        named = self.keys or tuple(key for group in self.trainable for key in GROUPS[group])
        return Tuning(
            self.fine_tune_type,
            self.num_layers, self.rank, self.scale, self.dropout, named,
        )  # fmt: skip


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return True
    return False


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
        self._splits = splits
        self._world = mx.distributed.init()
        self._trainer = self._make_trainer()

    @property
    def summary(self) -> str:
        """What is trained, and what that needs."""
        count = sum(tensor.size for tensor in trained(self.model).values())
        lines = ", ".join(f"{len(rows)} {name}" for name, rows in self._splits.items() if rows)
        return (
            f"{self.settings.fine_tune_type}: {count / 1e6:.3g} million parameters; {lines}; "
            f"needs {self.plan}"
        )

    def train(self, show: Callable[[Event], None], *, cancelled: Callable[[], bool]) -> bool:
        """Trains; False when cancelled before the last step."""
        settings = self.settings
        folder = Path(settings.adapter_path)
        if settings.resume and not self._trainer.resume():
            raise InputError(f"{folder} holds no save to go on from: leave out --resume.")
        if not self._world.rank():
            write_config(folder, settings.tuning, model=settings.model or "demo")

        def handle(event: Event) -> None:
            self.events.append(event)
            if not self._world.rank():
                show(event)

        self._trainer.run(handle, cancelled=cancelled)
        return self._trainer.step >= settings.iters

    def test_line(self) -> str:
        """The loss of test.jsonl, in a sentence."""
        rows = self._splits["test"]
        if not rows:
            raise InputError(f"{self.settings.data} has no test.jsonl.")
        batches = self._fixed(rows, self.settings.test_batches)
        tester = self._make_trainer(valid=batches)
        if not self.settings.train:
            load_trained(self.model, Path(self.settings.adapter_path) / "adapters.safetensors")
        found = tester.evaluate()
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
        }

    def _make_trainer(self, valid: list[Batch] | None = None) -> Trainer:
        settings = self.settings
        rows = self._splits["train"] or self._splits["test"]
        if valid is None and self._splits["valid"]:
            valid = self._fixed(self._splits["valid"], settings.val_batches)
        folder = Path(settings.adapter_path) if settings.train else None
        size = min(settings.batch_size, len(rows)) if not settings.train else settings.batch_size
        return Trainer(
            self.model,
            Objective(settings.encoder_weight, settings.detach_context),
            make_optimizer(
                settings.optimizer,
                settings.learning_rate,
                settings.iters,
                settings.optimizer_config,
                settings.lr_schedule,
            ),
            self._batches(rows, size),
            valid,
            Plan(
                settings.iters,
                settings.grad_accumulation_steps,
                report=settings.steps_per_report,
                evaluate=settings.steps_per_eval,
                save=settings.save_every,
                seed=settings.seed,
            ),
            folder=folder,
            identity=_identity(settings),
            judge=self._judge if settings.val_replies else None,
            checkpoint=settings.grad_checkpoint,
        )

    def _batches(self, rows: Sequence[Example], size: int) -> Batches:
        config = self.model.config
        return Batches(
            rows,
            size,
            Noise(config.canvas_length, config.text.vocab_size),
            self.settings.seed,
            mask_prompt=self.settings.mask_prompt,
            rank=self._world.rank(),
            size=self._world.size(),
        )

    def _fixed(self, rows: Sequence[Example], most: int) -> list[Batch]:
        size = min(self.settings.batch_size, len(rows) // self._world.size() * self._world.size())
        batches = self._batches(rows, max(size, 1))
        count = len(batches) if most == -1 else min(most, len(batches))
        return [batches.fixed(index) for index in range(count)]

    def _judge(self, model: Model) -> dict[str, Any]:
        """Replies to validation prompts: the share that is the expected text, and their steps."""
        from mlx_dgemma.generate import stream_generate

        rows = (self._splits["valid"] or self._splits["test"])[: self.settings.val_replies]
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
    folder = resolve_model(settings.model, revision=settings.revision, progress=progress)
    mx.random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    model, tokenizer = load(folder, lazy=True, dtype=settings.dtype)
    splits = {
        name: load_split(settings.data, name, model, tokenizer, settings.max_seq_length)
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
        _make_folder(Path(settings.adapter_path))
    elif not (Path(settings.adapter_path) / "adapters.safetensors").exists():
        raise InputError(f"{settings.adapter_path} holds no adapters.safetensors to test.")
    if not settings.train:
        settings = _as_trained(settings)
    _settle(model)
    attach(model, settings.tuning)
    if settings.resume_adapter_file is not None:
        load_trained(model, Path(settings.resume_adapter_file))
    longest = max(example.length for rows in splits.values() for example in rows)
    plan = plan_training(
        model.config,
        weights=stored_bytes(folder),
        trained=sum(tensor.size for tensor in trained(model).values()),
        batch_size=settings.batch_size // mx.distributed.init().size() or 1,
        seq_length=longest,
        checkpoint=settings.grad_checkpoint,
        itemsize=model.residual_dtype.size,
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


def _settle(model: Model) -> None:
    """Without a GPU a small model computes in dense float32, as inference does."""
    if mx.default_device() == mx.Device(mx.cpu) and model.dtype == mx.float32:
        dense = 4 * sum(np.prod(shape) for shape in _shapes(model))
        if dense <= EXPAND_BYTES:
            expand(model)
            cast(model, model)


def _shapes(model: Model) -> list[tuple[int, ...]]:
    from mlx_dgemma.model.parameters import matrices

    return list(matrices(model.config).values())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--adapter-path {folder} cannot be written: {error.strerror}.") from error


def _identity(settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to be gone on with: all that decides its steps."""
    free = {
        "train", "test", "resume", "adapter_path", "steps_per_report", "steps_per_eval",
        "save_every", "val_batches", "test_batches", "val_replies", "grad_checkpoint",
    }  # fmt: skip
    return {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in free}
