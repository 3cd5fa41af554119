"""The memory table of docs/fine-tuning.md is what the plan computes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_dgemma.benchmark.synthetic import published_config
from mlx_dgemma.model import Model
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.training.tuning import Tuning, attach, trained
from studies.training_plans import parameters, plan, table

PAGE = (Path(__file__).parents[2] / "docs/fine-tuning.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_plan_computes() -> None:
    assert table() in PAGE
    assert f"{plan(16, 512, 4)}" in PAGE.replace("\n", " ")


def test_the_plan_counts_the_parameters_that_are_trained() -> None:
    # Without the tower; nothing is computed, so no weight takes memory.
    config = ModelConfig.from_dict({**published_config(), "vision_config": None})
    model = Model(config, mx.bfloat16)
    attach(model, Tuning(rank=8))
    assert sum(tensor.size for tensor in trained(model).values()) == parameters(8)
