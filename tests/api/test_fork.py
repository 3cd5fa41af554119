"""A process that was forked after MLX computed: one sentence, where MLX would wait for ever."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
import mlx_dgemma
loaded = mlx_dgemma.load()
mlx_dgemma.generate(*loaded, "Hi", max_tokens=4, max_denoising_steps=1)
child = os.fork()
if child == 0:
    try:
        mlx_dgemma.generate(*loaded, "Hi", max_tokens=4, max_denoising_steps=1)
    except mlx_dgemma.DGemmaError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(4)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
def test_a_forked_process_says_so() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 3, ended.stderr
    assert "forked" in ended.stdout
    assert ended.stdout.strip().endswith(".")
