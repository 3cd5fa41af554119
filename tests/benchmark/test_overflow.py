"""The audit of magnitudes sees what passes float16's range, and puts everything back."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parents[2]
for folder in (ROOT / "studies", ROOT / "tests" / "oracles"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from overflow import LIMIT, watched  # noqa: E402
from plain_checkpoint import write_plain  # noqa: E402

from mlx_dgemma.checkpoint.weights import load_model  # noqa: E402
from mlx_dgemma.model import attention  # noqa: E402


def test_a_residual_beyond_the_limit_is_seen(tmp_path: Path) -> None:
    def enlarge(tensors: dict) -> None:
        for name in tensors:
            if name.endswith(".post_feedforward_layernorm.weight"):
                tensors[name] = tensors[name] * 1e5

    model = load_model(write_plain(tmp_path / "checkpoint", change=enlarge), lazy=True)
    real = attention.attend
    with watched(model) as audit:
        cache = model.make_cache()
        model.prefill(np.arange(20)[None], cache)
        model.denoise(mx.zeros((1, 12), mx.int32), cache)
    audit.evaluate()
    largest = {kind: float(value.item()) for kind, value in audit.largest.items()}
    assert largest["residual"] > LIMIT
    assert largest["layers.self_attn.q_proj input"] < 100  # a norm stands before it
    assert {"layers.experts.down_proj input", "attention scores"} < set(largest)
    assert attention.attend is real
