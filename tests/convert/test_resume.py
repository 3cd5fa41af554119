"""A conversion killed at any byte goes on when it is run again, and the result is the same."""

import json
import os
import random
import subprocess
import sys

import pytest

from mlx_dgemma.convert import convert
from mlx_dgemma.convert.shards import ShardWriter, file_digest
from mlx_dgemma.errors import InputError, ResourceError

# A process that imports once and forks a converter for every (target, calls) it reads, before
# MLX has started a thread; a fork costs milliseconds where an import costs seconds. The converter
# is killed from outside at some moment after its calls-th Python call or return. How far it is
# decides, not the clock, so that a fast machine kills as often as a slow one: it waits for its
# death once it is LEEWAY calls further. Answers the calls of a converter that finished, else 0.
ZYGOTE = """
import os, signal, sys
from mlx_dgemma.convert import convert
os.fsync = lambda _: None  # a kill loses nothing that was written; a power cut might
LEEWAY = 3000

def convert_counting(target, calls, report):
    count = 0
    def seen(*_):
        nonlocal count
        count += 1
        if count == calls:
            os.write(report, b"kill me")
        elif count == calls + LEEWAY:
            signal.pause()
    sys.setprofile(seen)
    convert(sys.argv[1], target, quantize=True, shard_bytes=int(sys.argv[2]))
    sys.setprofile(None)
    os.write(report, str(count).encode())

print("ready", flush=True)
for line in sys.stdin:
    target, calls = line.rsplit(" ", 1)
    listen, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        convert_counting(target, int(calls), report)
        os._exit(0)
    os.close(report)
    answer = os.read(listen, 64)
    if answer == b"kill me":
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    assert finished or os.WTERMSIG(status) == signal.SIGKILL
    print(int(answer) if finished else 0, flush=True)
    os.close(listen)
"""
KILL_SHARD_BYTES = 60_000


def digests(folder):
    return {
        path.name: file_digest(path)
        for path in sorted(folder.glob("*.safetensors*"))
        if path.is_file()
    }


def test_killed_at_random_points(checkpoint, tmp_path):
    target, expected = tmp_path / "out", tmp_path / "expected"
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE, str(checkpoint), str(KILL_SHARD_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(folder, calls):
        zygote.stdin.write(f"{folder} {calls}\n")
        zygote.stdin.flush()
        return int(zygote.stdout.readline())

    generator = random.Random(0)
    kills, progress = 0, set()
    try:
        assert zygote.stdout.readline() == "ready\n"
        whole = run(expected, 1 << 60)
        while not target.exists():
            # Longer and longer, so that the end is reached whatever resuming costs.
            kills += run(target, int(generator.uniform(1, whole / 2) * (1 + kills / 20))) == 0
            journal = target.with_name("out.partial") / "conversion.json"
            if journal.exists():
                progress.add(len(json.loads(journal.read_text())["shards"]))
            # The name appears with everything behind it, or not at all.
            assert target.exists() == (target / "README.md").exists()
    finally:
        zygote.stdin.close()
        zygote.wait()
    assert kills >= 4
    assert len(progress) >= 2
    assert digests(target) == digests(expected)
    assert not target.with_name("out.partial").exists()


class Stop(BaseException):
    """Stands for a kill: nothing catches it."""


def interrupted(checkpoint, target, monkeypatch, after, **flags):
    """Run a conversion that dies after `after` appended pieces."""
    append, count = ShardWriter.append, iter(range(10**9))

    def dying(self, name, array):
        if next(count) == after:
            raise Stop
        append(self, name, array)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", dying)
        with pytest.raises(Stop):
            convert(checkpoint, target, **flags)


FLAGS = {"quantize": True, "shard_bytes": 60_000}


def test_finished_shards_are_kept_and_not_redone(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "out"
    interrupted(checkpoint, target, monkeypatch, 150, **FLAGS)
    partial = tmp_path / "out.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(kept) >= 2
    report = convert(checkpoint, target, **FLAGS)
    assert set(report.resumed) == set(kept)
    assert all((target / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_a_finished_shard_is_not_trusted_blindly(checkpoint, tmp_path, monkeypatch):
    expected = tmp_path / "expected"
    convert(checkpoint, expected, **FLAGS)
    target = tmp_path / "out"
    interrupted(checkpoint, target, monkeypatch, 150, **FLAGS)
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    content = bytearray(shards[0].read_bytes())
    content[-1] ^= 1
    shards[0].write_bytes(content)
    report = convert(checkpoint, target, **FLAGS)
    assert shards[0].name not in report.resumed
    assert shards[1].name in report.resumed
    assert digests(target) == digests(expected)


def test_a_damaged_journal_starts_over(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "out"
    interrupted(checkpoint, target, monkeypatch, 150, **FLAGS)
    (tmp_path / "out.partial" / "conversion.json").write_text("{")
    assert convert(checkpoint, target, **FLAGS).resumed == ()


@pytest.mark.parametrize("change", ["recipe", "source"])
def test_another_plan_starts_over(
    change, checkpoint, write, config, tensors, tmp_path, monkeypatch
):
    source = write(tmp_path / "source", config, tensors)
    target = tmp_path / "out"
    interrupted(source, target, monkeypatch, 150, **FLAGS)
    flags = dict(FLAGS)
    if change == "recipe":
        flags["q_bits"] = 6
    else:
        os.utime(source / "model.safetensors", ns=(1, 1))
    report = convert(source, target, **flags)
    assert report.resumed == ()
    fresh = convert(source, tmp_path / "fresh", **flags)
    assert fresh.total_size == report.total_size
    assert digests(target) == digests(tmp_path / "fresh")


def test_a_folder_that_is_not_ours_is_left_alone(checkpoint, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("chapter one")
    with pytest.raises(InputError, match="not an unfinished conversion"):
        convert(checkpoint, tmp_path / "out", quantize=True)
    assert (partial / "thesis.tex").read_text() == "chapter one"


def test_two_conversions_to_one_target(checkpoint, tmp_path):
    def second(what, done, total):
        with pytest.raises(ResourceError, match="another conversion"):
            convert(checkpoint, tmp_path / "out", quantize=True)
        raise Stop

    with pytest.raises(Stop):
        convert(checkpoint, tmp_path / "out", quantize=True, progress=second)


def test_a_scale_in_the_next_shard_than_its_weight(checkpoint, tmp_path, monkeypatch):
    """A shard may end between a module's weight and its scales; resuming quantizes it again."""
    target = tmp_path / "out"
    flags = {"quantize": True, "shard_bytes": 20_000}
    convert(checkpoint, tmp_path / "expected", **flags)
    index = json.loads((tmp_path / "expected/model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    torn = [
        name
        for name, shard in index.items()
        if name.endswith(".scales") and index[name.replace(".scales", ".weight")] != shard
    ]
    assert torn
    for after in (3, 20, 40, 55, 25, 10):
        interrupted(checkpoint, target, monkeypatch, after, **flags)
    convert(checkpoint, target, **flags)
    assert digests(target) == digests(tmp_path / "expected")
