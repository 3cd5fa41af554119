"""The example of docs/fine-tuning.md runs as it is written, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALLER = {"--iters 150": "--iters 2", "--batch-size 16": "--batch-size 2", "--rank 16": "--rank 2"}


def test_every_command_of_the_example_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/fine-tuning.md").read_text(encoding="utf-8")
    found = re.search(r"```bash\n(python examples/fine_tune/.*?)```", page, re.DOTALL)
    assert found is not None
    script = found[1]
    for whole, small in SMALLER.items():
        assert whole in script
        script = script.replace(whole, small)
    python = shlex.quote(sys.executable)
    script = script.replace("lora --t", "lora --val-replies 0 --val-batches 1 --test-batches 1 --t")
    script = script.replace("python examples", f"{python} {shlex.quote(str(ROOT))}/examples")
    script = re.sub(r"mlx_dgemma\.([a-z]+)", rf"{python} -m mlx_dgemma \1", script)
    verbs = re.findall(r"-m mlx_dgemma ([a-z]+)", script)
    assert verbs == ["lora", "lora", "generate", "fuse", "generate"]
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "data/train.jsonl").read_text().splitlines()) == 500
    lines = done.stdout.splitlines()
    assert any(line.startswith("Test loss ") for line in lines)
    assert any(line.startswith("Fused adapters into ") for line in lines)
    assert lines[-1].strip()
    config = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 2
    merged = json.loads((tmp_path / "doubling/conversion.json").read_text())["adapter"]
    assert merged["name"] == "adapters"
