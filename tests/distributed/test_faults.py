"""Whatever happens to one of the processes, all end within seconds, with one sentence of rank 0."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import mlx.core as mx
import pytest

from mlx_dgemma.checkpoint import serving
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.distributed import team
from mlx_dgemma.distributed.channel import Channel, LostError
from tests.distributed import working
from tests.distributed.processes import finish, said, start

PROGRAM = [sys.executable, working.__file__]
LIMIT = 15.0


def until_ready(process: subprocess.Popen[str], lines: int = 1) -> None:
    assert process.stdout is not None
    for _ in range(lines + 1):  # "joined", and then these
        line = process.stdout.readline()
        assert line, process.communicate()


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What they said; AssertionError where one is still there after `LIMIT`."""
    started = time.monotonic()
    found = finish(processes, timeout=60)
    took = time.monotonic() - started
    assert took < LIMIT, f"it took {took:.1f} s"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["idle", "prefill", "denoising"])
def test_a_killed_rank_ends_all(phase, tmp_path):
    processes = start([*PROGRAM, phase], 2, tmp_path)
    until_ready(processes[0], 1 if phase == "idle" else 4)
    processes[1].kill()
    (_, errors), *_ = ended(processes)
    sentences = said(errors)
    assert len(sentences) == 1, errors
    assert sentences[0].startswith("error: Rank 1 (")
    assert "ended" in sentences[0]
    assert processes[0].returncode == 2


@pytest.mark.slow
def test_rank_0_takes_the_others_with_it(tmp_path):
    processes = start([*PROGRAM, "denoising"], 2, tmp_path)
    until_ready(processes[0], 3)
    processes[0].kill()
    _, (_, errors) = ended(processes)
    assert said(errors) == []


@pytest.mark.slow
def test_a_stopped_rank_counts_as_lost(tmp_path):
    processes = start([*PROGRAM, "denoising"], 2, tmp_path)
    until_ready(processes[0], 3)
    processes[1].send_signal(signal.SIGSTOP)
    (_, errors), _ = ended(processes)
    sentences = said(errors)
    assert len(sentences) == 1, errors
    assert "Rank 1 (" in sentences[0]
    assert "does not answer" in sentences[0]
    assert processes[1].returncode == -signal.SIGKILL


DIFFERENT = {
    "version": "runs mlx_dgemma 0.0.1 with MLX",
    "memory": "needs",
    "trouble": "The memory ran out",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DIFFERENT)
def test_a_rank_that_differs_is_named(what, tmp_path):
    processes = start(PROGRAM, 2, tmp_path, arguments=[["denoising"], ["denoising", what]])
    (_, errors), (_, silent) = ended(processes)
    sentences = said(errors)
    assert len(sentences) == 1, errors
    assert sentences[0].startswith("error: Rank 1 (")
    assert DIFFERENT[what] in sentences[0]
    assert said(silent) == []
    assert processes[0].returncode == 2


@pytest.mark.slow
def test_another_checkpoint_is_noticed(tmp_path):
    """One number of one tensor is enough where it is looked at."""
    for rank in (0, 1):
        shutil.copytree(CHECKPOINT, tmp_path / str(rank) / "model")
    path = tmp_path / "1" / "model" / "model.safetensors"
    tensors, header = mx.load(str(path), return_metadata=True)
    name = "model.decoder.layers.3.self_attn.q_proj.weight"
    tensors[name] = tensors[name] * 1.5
    mx.save_safetensors(str(path), tensors, header)
    folders = [tmp_path / str(rank) for rank in (0, 1)]
    processes = start([*PROGRAM, "idle", "checkpoint"], 2, tmp_path, folders=folders)
    (_, errors), _ = ended(processes)
    assert len(said(errors)) == 1, errors
    assert "has another checkpoint" in errors


SEVERAL = """
import mlx_dgemma
group = mlx_dgemma.connect()
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.checkpoint.loading import load_network as load

model, _ = load(group=group)
for adapter in ("other", "missing"):
    try:
        load(adapter_path=f"/proc/self/cwd/{adapter}")
    except DGemmaError as error:
        print(error)
model.prefill([2, 5, 6], model.make_cache())
print("it goes on")
"""


@pytest.mark.slow
def test_an_adapter_that_a_rank_has_otherwise_or_lacks_is_refused(tmp_path):
    """And the model that was loaded before goes on."""
    for rank, names in enumerate((("other", "missing"), ("other",))):
        for name in names:
            folder = tmp_path / str(rank) / name
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
            tensors = {
                f"base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_{side}.weight": (
                    mx.full(shape, rank)
                )
                for side, shape in (("A", (1, 128)), ("B", (128, 1)))
            }
            mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    folders = [tmp_path / str(rank) for rank in (0, 1)]
    processes = start([sys.executable, "-c", SEVERAL], 2, tmp_path, folders=folders)
    (out, errors), silent = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    other, missing, last = out.splitlines()
    assert other.startswith("Rank 1 (")
    assert other.endswith("has another adapter under this name than rank 0: copy rank 0's.")
    assert missing.startswith("Rank 1 (")
    assert "adapter_config.json" in missing
    assert last == "it goes on"
    assert silent == ("", "")


@pytest.mark.slow
def test_random_kills(tmp_path):
    """The study `studies/kills.py` does the same two hundred times."""
    from studies.kills import kill_once

    generator = random.Random(int(os.environ.get("KILLS_SEED", "16")))
    for _ in range(2):
        outcome = kill_once(generator, tmp_path)
        assert outcome.problem is None, outcome


def test_silence_and_nonsense_end_a_connection():
    one, other = socket.socketpair(socket.AF_UNIX)
    with pytest.raises(LostError, match="no answer"):
        _channel(one).receive(0.05)
    other.sendall(b"\xff" * 12)
    with pytest.raises(LostError, match="none"):
        _channel(one).receive(1.0)
    other.close()
    with pytest.raises(LostError):
        _channel(one).receive(1.0)


def test_a_last_word_waits_for_nobody():
    one, _other = socket.socketpair(socket.AF_UNIX)
    channel = _channel(one)
    started = time.monotonic()
    channel.last_word("end", why="x" * (4 << 20))  # more than the socket holds
    channel.last_word("end")  # while another thread would still be sending
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("error", "waits"), [("[ring] connection to a peer was lost", True), ("no memory", False)]
)
def test_a_rank_leaves_it_to_rank_0_who_is_missing(error, waits, monkeypatch):
    """What a neighbour finds first is the loss of another, not its own fault."""
    left = threading.Event()
    monkeypatch.setattr(team.time, "sleep", lambda seconds: seconds == team.SILENCE and left.set())
    follower = team.Follower.__new__(team.Follower)
    said = []

    def fail(self, why):
        said.append((why, left.is_set()))
        raise SystemExit(2)

    def work(_):
        raise RuntimeError(error)

    monkeypatch.setattr(team.Follower, "fail", fail)
    monkeypatch.setattr(serving, "_serve", work)
    with pytest.raises(SystemExit):
        serving.serve(follower)
    assert said == [(error, waits)]


def _channel(opened) -> Channel:
    found = Channel.__new__(Channel)
    found._socket, found.heard, found._sending = opened, 0.0, threading.Lock()
    return found
