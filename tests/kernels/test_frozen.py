"""A real PyInstaller bundle checks its kernels in itself and is started once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_dgemma
from mlx_dgemma.__pyinstaller import get_hook_dirs
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.kernels import dispatch, verdicts
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.kernel_shapes import kernel_shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("PyInstaller") is None,
        reason="PyInstaller is not installed: pip install -e '.[dev]'",
    ),
]
# What this environment has for tests and no app needs; without torch the bundle is a quarter.
LEFT_OUT = (
    *("torch", "transformers", "mlx_lm", "mlx_vlm", "peft", "av", "scipy", "pandas", "sklearn"),
    *("setuptools", "pkg_resources", "pytest", "playwright", "openai", "anthropic", "pydantic_ai"),
)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The bundle's program; building it takes a minute or two."""
    folder = tmp_path_factory.mktemp("bundle")
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--onedir", "--name", "app"]
    command += ["--additional-hooks-dir", get_hook_dirs()[0]]
    command += ["--paths", str(Path(mlx_dgemma.__file__).parents[1])]
    command += [part for name in LEFT_OUT for part in ("--exclude-module", name)]
    script = str(Path(__file__).parent / "frozen_app.py")
    done = subprocess.run([*command, script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "dist" / "app" / "app"


def test_it_checks_in_itself_and_is_never_started_again(app, tmp_path):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "MLX_DGEMMA_KERNELS"},
        "STARTS": str(tmp_path / "starts"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    done = subprocess.run([app], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["frozen"]
    assert not told["can_start_python"]
    assert told["reply"] == "3 4 5 6 7 8 9"
    assert (tmp_path / "starts").read_text() == "started\n"
    # Every check was made, and failed for want of a GPU, under the names that
    # `mlx_dgemma.doctor --check` gives them when it is run beforehand.
    planned = {
        verdicts.verdict_key(one, dispatch.shape_class(shape))
        for one, shape in kernel_shapes(ModelConfig.from_folder(CHECKPOINT))
        if one.supports(shape)
    }
    assert planned <= set(told["verdicts"])
    assert all("No Metal back-end" in reason for reason in told["verdicts"].values())
