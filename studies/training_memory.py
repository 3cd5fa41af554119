"""Peak memory of a training step on the published widths, beside what the plan says.

    python studies/training_memory.py [--prompt 256] [--canvas 256] [--experts 16] ...

Two layers of the published widths, one sliding and one full, with weights that are all zero, in
float32 on MLX's CPU backend. Activations do not depend on the number of experts, nor on the
vocabulary beyond the head's own part.
"""

from __future__ import annotations

import argparse
import gc

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_dgemma.benchmark.synthetic import published_config, with_layers
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.training.batches import Batches, Noise
from mlx_dgemma.training.data import Example
from mlx_dgemma.training.forward import Passes
from mlx_dgemma.training.loss import Objective, value_and_gradient
from mlx_dgemma.training.plan import TrainingPlan, plan_training
from mlx_dgemma.training.tuning import Tuning, attach, trained

WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "global_head_dim",
)  # fmt: skip


def measured(
    *,
    layers: int = 2,
    prompt: int = 256,
    canvas: int = 256,
    batch_size: int = 1,
    experts: int = 16,
    vocabulary: int = 262_144,
    checkpoint: bool = False,
    encoder_weight: float = 1.0,
    certainty_weight: float = 0.0,
    divide: int = 1,
    tuning: Tuning | None = None,
) -> tuple[int, TrainingPlan]:
    """Peak bytes of a step, and the plan. divide: widths, for a quick look."""
    gc.collect()
    before = mx.get_active_memory()  # what else this process holds
    raw = with_layers(published_config(), layers)
    raw |= {"vision_config": None, "canvas_length": canvas, "dtype": "float32"}
    raw["text_config"] |= {"num_experts": experts, "vocab_size": vocabulary, "dtype": "float32"}
    for name in WIDTHS:
        raw["text_config"][name] //= divide
    raw["image_token_id"] = vocabulary - 1
    config = ModelConfig.from_dict(raw)
    model = Model(config, mx.float32)
    mx.eval(model.parameters())
    weights = sum(tensor.nbytes for _, tensor in tree_flatten(model.parameters()))
    attach(model, tuning or Tuning())
    rng = np.random.default_rng(0)
    examples = [
        Example(*(rng.integers(3, vocabulary - 2, n).astype(np.int32) for n in (prompt, canvas)))
    ] * batch_size
    batches = Batches(
        examples, batch_size, Noise(canvas, vocabulary), 0, context_only=not encoder_weight
    )
    passes, objective = (
        Passes(model, checkpoint=checkpoint),
        Objective(encoder_weight, certainty_weight=certainty_weight),
    )
    optimizer = optim.AdamW(1e-4)

    of = value_and_gradient(passes, objective)

    def step(number: int) -> None:
        batch = batches.at(number)
        batch.conditioned[:] = True
        batch.sure[:] = bool(certainty_weight)
        (total, _), found = of(batch)
        optimizer.update(model, found)
        mx.eval(model.trainable_parameters(), optimizer.state, total)

    mx.clear_cache()
    mx.reset_peak_memory()
    step(0)
    plan = plan_training(
        config,
        weights=weights,
        trained=sum(tensor.size for tensor in trained(model).values()),
        batch_size=batch_size,
        seq_length=prompt + canvas,
        checkpoint=checkpoint,
        itemsize=4,
        encoder_loss=bool(encoder_weight),
    )
    return mx.get_peak_memory() - before, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 2), ("prompt", 256), ("canvas", 256), ("batch-size", 1), ("experts", 16),
        ("vocabulary", 262_144), ("divide", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    for checkpoint in (False, True):
        for weight in (1.0, 0.0):
            found, plan = measured(**given, checkpoint=checkpoint, encoder_weight=weight)
            rest = (found - plan.weights) / (plan.peak - plan.weights)
            print(
                f"checkpoint {checkpoint!s:<6} encoder loss {weight!s:<4} "
                f"measured {found / 1e9:.3f} GB, {found / plan.peak:.3f} of the plan; "
                f"without weights {rest:.3f}: {plan}"
            )


if __name__ == "__main__":
    main()
