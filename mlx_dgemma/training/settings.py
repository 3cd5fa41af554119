"""The settings of a fine-tuning run, in mlx-lm's names."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from mlx.optimizers import Optimizer

from mlx_dgemma.errors import InputError
from mlx_dgemma.training.loss import Objective
from mlx_dgemma.training.optimizers import OPTIMIZERS, make_optimizer
from mlx_dgemma.training.tuning import GROUPS, Kind, Tuning
from mlx_dgemma.untrusted_json import shown

ObjectiveName = Literal["diffusion", "few-steps"]
_LARGEST = 2**53  # that counts and seeds may be
_MOST_ANSWERS = 1000  # to one prompt


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
    objective: ObjectiveName = "diffusion"
    encoder_weight: float | None = None
    entropy_bound: float = 3.0
    certainty_weight: float = 1.0
    answers_per_prompt: int = 1
    rounds: int = 3
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
        for name in (
            "batch_size", "iters", "grad_accumulation_steps", "max_seq_length",
            "steps_per_report", "steps_per_eval", "save_every", "answers_per_prompt", "rounds",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is not possible: use 1 or more.")
        if not 0 <= self.seed <= _LARGEST:
            raise InputError(f"seed {self.seed} is not possible: use 0 to 2^53.")
        if self.val_batches < -1 or self.val_replies < 0:
            raise InputError("val_batches begins at -1, which is all, and val_replies at 0.")
        if self.test_batches < 1 and self.test_batches != -1:
            raise InputError(f"test_batches {self.test_batches} is not possible: -1 is all.")
        for name in ("learning_rate", "encoder_weight", "certainty_weight", "entropy_bound"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise InputError(f"{name} {getattr(self, name)} is not possible: use 0 or more.")
        if self.few_steps and self.rounds > self.iters:
            raise InputError(f"{self.rounds} rounds need as many iters, and they are {self.iters}.")
        if self.answers_per_prompt > _MOST_ANSWERS:
            raise InputError(f"answers_per_prompt ends at {_MOST_ANSWERS:,}.")
        for group in self.trainable:
            if group not in GROUPS:
                raise InputError(f"trainable {group!r} is not one of {', '.join(GROUPS)}.")
        if not self.data:
            raise InputError("--data is missing: name a folder with train.jsonl.")
        if not (self.train or self.test):
            raise InputError("Say what to do: --train, --test, or both.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
        """From a configuration file's values, which `given` ones overrule. mlx-lm's
        `lora_parameters` are spread out, and of its `optimizer_config` the chosen optimizer's are
        taken; names that we have no use for are refused, unless they ask for nothing."""
        values = dict(config)
        deltas = values.pop("lora_parameters", None) or {}
        if not isinstance(deltas, Mapping):
            raise InputError("The setting lora_parameters must hold names and values.")
        values |= deltas
        types_of = typing.get_type_hints(cls)
        unknown = [name for name, value in values.items() if name not in types_of and value]
        if unknown:
            raise InputError(f"The configuration's {unknown[0]!r} is no setting of this command.")
        checked: dict[str, Any] = {}
        for name, value in {**values, **given}.items():
            if name not in types_of:
                continue
            if isinstance(value, list):
                value = tuple(value)
            if not _fits(value, types_of[name]):
                raise InputError(f"The setting {name} cannot be {shown(value)}.")
            checked[name] = float(value) if types_of[name] is float else value
        found = cls(**checked)
        options = found.optimizer_config
        if any(name in OPTIMIZERS for name in options):
            options = options.get(found.optimizer) or {}
            if not isinstance(options, Mapping):
                raise InputError(f"The setting optimizer_config cannot be {shown(options)}.")
        return replace(found, optimizer_config=dict(options))

    @property
    def tuning(self) -> Tuning:
        named = self.keys or tuple(key for group in self.trainable for key in GROUPS[group])
        return Tuning(
            self.fine_tune_type,
            self.num_layers, self.rank, self.scale, self.dropout, named,
        )  # fmt: skip

    def make_optimizer(self) -> Optimizer:
        """InputError where its settings do not fit."""
        return make_optimizer(
            self.optimizer, self.learning_rate, self.iters, self.optimizer_config, self.lr_schedule
        )

    @property
    def few_steps(self) -> bool:
        """Whether the model learns to arrive at its own answers in fewer steps."""
        return self.objective == "few-steps"

    @property
    def loss(self) -> Objective:
        """The objective; by default few steps leave out the encoder's loss."""
        weight = self.encoder_weight
        if weight is None:
            weight = 0.0 if self.few_steps else 1.0
        certainty = self.certainty_weight if self.few_steps else 0.0
        return Objective(weight, self.detach_context, certainty)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with: all that decides its steps."""
        free = {
            "train", "test", "resume", "adapter_path", "steps_per_report", "steps_per_eval",
            "save_every", "val_batches", "test_batches", "val_replies", "grad_checkpoint",
        }  # fmt: skip
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}

    def first_step(self, number: int) -> int:
        """The training step before which round `number` is answered; the last step after all."""
        return self.iters * number // (self.rounds if self.few_steps else 1)

    def round_of(self, step: int) -> int:
        """The round that a step, counted from 0, belongs to."""
        rounds = self.rounds if self.few_steps else 1
        return sum(step >= self.first_step(number) for number in range(1, rounds))


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return any(_is(value, option) for option in options)


def _is(value: Any, kind: Any) -> bool:
    plain = typing.get_origin(kind) or kind
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
            return False
        return plain is float or (plain is int and isinstance(value, int))
    if plain is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    return plain is not int and isinstance(value, plain)
