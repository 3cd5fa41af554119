"""Whole replies through the default loop come out the same with every operation as its kernel.

One of each task here; `generations.py` does the fifty, and more.
"""

import pytest
from generations import KERNELS, compare, packed_demo, replies
from harness import emulator_only

from mlx_dgemma import load
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.demo.tasks import TASKS
from mlx_dgemma.prompt.tokenizer import load_tokenizer

pytestmark = [emulator_only, pytest.mark.slow]


def check(results):
    """The same ids and logits; two experts that tie to the last digits may be taken either way."""
    told = "\n".join(map(str, results))
    assert all(result.apart is None or result.tie is not None for result in results), told
    assert sum(result.same_ids for result in results) >= len(results) - 1, told
    assert sum(result.compared for result in results) > sum(r.steps for r in results) / 2, told
    assert all(result.logits < 1e-5 and result.entropy < 1e-3 for result in results), told
    ties = [result.tie for result in results if result.tie is not None]
    assert all(tie.gap <= 2 * tie.moved < 2e-5 for tie in ties), told


def test_a_reply_of_each_task():
    model, tokenizer = load()
    results = [compare(model, tokenizer, *each) for each in replies(len(TASKS))]
    check(results)
    assert frozenset().union(*(result.kernels for result in results)) == KERNELS


def test_replies_of_packed_experts(tmp_path):
    model = packed_demo(tmp_path / "4bit")
    tokenizer = load_tokenizer(CHECKPOINT, model.config.stop_ids)
    check([compare(model, tokenizer, *each) for each in replies(2)])
