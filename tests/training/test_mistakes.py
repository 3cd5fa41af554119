"""What ends a run or refuses an adapter: a full disk, a base that holds it already, another base;
and data sets of the Hub."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dgemma.cli.fuse import main as fuse
from mlx_dgemma.cli.generate import main as generate
from mlx_dgemma.cli.lora import main as lora
from mlx_dgemma.training.loop import STATE
from mlx_dgemma.training.tuning import WEIGHTS
from tests.checkpoint.stub import HubStub

QUICK = (
    "--batch-size", "2", "--rank", "2", "--num-layers", "1", "--val-replies", "0",
    "--encoder-weight", "0", "--learning-rate", "1e-2",
)  # fmt: skip
LINE = {"prompt": "Double AB", "completion": "AABB"}
ROWS = "\n".join(json.dumps(LINE) for _ in range(2))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and an adapter of one step."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    (folder / "data/train.jsonl").write_text(ROWS)
    flags = ["--train", "--data", str(folder / "data"), "--adapter-path", str(folder / "adapter")]
    assert lora([*flags, *QUICK, "--iters", "1"]) == 0
    return folder


def test_a_full_disk_ends_the_run_and_keeps_the_last_save(made: Path) -> None:
    """A limit on the size of files fails a write as a full disk does, within a real process."""
    saves = [made / "adapter" / name for name in (WEIGHTS, STATE)]
    before = [path.read_bytes() for path in saves]
    limit = min(map(len, before)) // 2
    assert limit > 4096  # the configuration's file still fits
    flags = ["--train", "--data", str(made / "data"), "--adapter-path", str(made / "adapter")]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_dgemma", "lora", *flags, *QUICK, "--iters", "2"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"{STATE} cannot be written" in done.stderr
    assert "the last save is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.read_bytes() for path in saves] == before
    assert not list((made / "adapter").glob(".*"))


def test_an_adapter_is_not_merged_twice(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, fused = str(made / "adapter"), str(tmp_path / "fused")
    assert fuse(["--adapter-path", adapter, "--save-path", fused]) == 0
    again = ["--model", fused, "--adapter-path", adapter]
    capsys.readouterr()
    assert fuse([*again, "--save-path", str(tmp_path / "twice")]) == 2
    assert generate([*again, "--prompt", "Double AB"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("is merged into") == 2
    assert "Traceback" not in captured.err
    assert not captured.out
    assert not (tmp_path / "twice").exists()
    other = tmp_path / "other"
    data = ["--train", "--data", str(made / "data"), "--adapter-path", str(other)]
    assert lora(["--model", fused, *data, *QUICK, "--iters", "1", "--seed", "1"]) == 0
    more = ["--model", fused, "--adapter-path", str(other), "--save-path", str(tmp_path / "both")]
    assert fuse(more) == 0  # another one is no mistake


def test_an_adapter_of_another_base_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = mx.load(str(made / "adapter" / WEIGHTS))
    assert isinstance(tensors, dict)
    wider = {
        name: mx.concatenate([value, value], axis=0 if name.endswith("lora_a") else 1)
        for name, value in tensors.items()
    }
    mx.save_safetensors(str(tmp_path / WEIGHTS), wider)
    config = (made / "adapter/adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    assert fuse(["--adapter-path", str(tmp_path), "--save-path", str(tmp_path / "fused")]) == 2
    assert generate(["--adapter-path", str(tmp_path), "--prompt", "Double AB"]) == 2
    error = capsys.readouterr().err
    assert error.count("the adapter was trained on another model") == 2
    assert "Traceback" not in error
    assert not (tmp_path / "fused").exists()


def test_a_data_set_of_the_hub_is_fetched_by_its_id(
    hub: HubStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"train.jsonl": ROWS.encode(), "README.md": b"card", "big.parquet": b"not needed"}
    hub.add("someone/doubling", files)
    hub.add("someone/broken", {"train.jsonl": b"{}\n"})
    hub.add("someone/other", {"README.md": b"card"})

    def run(name: str) -> int:
        flags = ["--train", "--data", name, "--adapter-path", str(tmp_path / "adapter")]
        return lora([*flags, *QUICK, "--iters", "1"])

    assert run("someone/doubling") == 0
    assert (tmp_path / "adapter" / WEIGHTS).exists()
    assert {asked.path.rsplit("/", 1)[1] for asked in hub.downloads()} == {"train.jsonl"}
    assert all(asked.path.startswith("/datasets/") for asked in hub.downloads())
    capsys.readouterr()
    for name, message in (
        ("someone/broken", "train.jsonl, line 1: none of messages"),
        ("someone/other", "holds none of train.jsonl"),
        ("someone/nowhere", "The data set someone/nowhere cannot be downloaded"),
    ):
        assert run(name) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
