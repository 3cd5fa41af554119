"""Kernels are chosen once for all ranks, by rank 0, among those that every rank can use."""

from __future__ import annotations

import json
import sys

import pytest

from mlx_dgemma.errors import InputError
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.kernels.table import operations
from tests.distributed.processes import finish, start

PROGRAM = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_dgemma import load
from mlx_dgemma.checkpoint import agreement
from mlx_dgemma.kernels import dispatch
from mlx_dgemma.model.following import Following

rank, folder = mx.distributed.init().rank(), Path(sys.argv[1])
# Times that differ between machines: the ranks disagree about two kinds, and rank 1 lacks one.
found = [
    {"router 256": True, "moe 256": False, "combine 256": True, "accept 256": True},
    {"router 256": True, "moe 256": True, "combine 256": False},
][rank]
agreement.dispatch.choices = lambda shapes: found
agreement.chip = lambda: f"chip {rank}"
settled, decode = [], Following._decode

def watched(self, **fields):
    settled.append([dispatch._settled, self._team.unequal])
    (folder / "1.json").write_text(json.dumps(settled[0]))
    decode(self, **fields)

Following._decode = watched
model, tokenizer = load(group=mx.distributed.init())
from mlx_dgemma import generate
text = generate(model, tokenizer, "Count from 3 to 9.", seed=1)
(folder / "0.json").write_text(json.dumps([dispatch._settled, model.team.unequal]))
print(text)
"""


@pytest.mark.slow
def test_ranks_that_disagree_run_the_same_kernels(tmp_path):
    """And ranks on different chips route by rank 0's scores; the reply is the one it was."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (out, errors), silent = finish(
        start([sys.executable, str(program), str(tmp_path)], 2, tmp_path)
    )
    assert out == "3 4 5 6 7 8 9\n", errors
    assert silent == ("", "")
    expected = {"router 256": True, "moe 256": False, "combine 256": False, "accept 256": False}
    for rank in (0, 1):
        chosen, unequal = json.loads((tmp_path / f"{rank}.json").read_text())
        assert chosen == expected
        assert unequal is True


def test_what_is_settled_is_what_runs(monkeypatch):
    """Whatever this machine would choose by itself; unknown kinds take the twin."""
    accept = operations()["accept"]
    monkeypatch.setattr(dispatch, "available", lambda: True)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "force")
    dispatch.settle({"accept 256": False})
    try:
        assert not dispatch.use(accept, "float32", 256)
        assert not dispatch.use(accept, "float32", 2048)
        dispatch.settle({"accept 256": True})
        assert dispatch.use(accept, "float32", 200)
        assert not dispatch.use(accept, "float32", 2048)
    finally:
        dispatch.settle(None)
    assert dispatch.use(accept, "float32", 256)
    monkeypatch.setenv("MLX_DGEMMA_KERNELS", "sometimes")
    with pytest.raises(InputError):
        dispatch.use(accept, "float32", 128)
