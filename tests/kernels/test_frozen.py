"""The example app as PyInstaller bundles it, on a virtual display: it answers, fills, checks its
kernels in itself, is started once, and needs none of our .py files.

One bundle serves all: building it takes a minute or two.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
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

EXAMPLE = Path(__file__).parents[2] / "examples" / "desktop"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("PyInstaller") is None,
        reason="PyInstaller is not installed: pip install -e '.[dev]'",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("tkinter") is None,
        reason="this Python was built without tkinter",
    ),
]
# What this environment has for tests and no app needs; without torch the bundle is a quarter.
LEFT_OUT = (
    *("torch", "transformers", "mlx_lm", "mlx_vlm", "peft", "av", "scipy", "pandas", "sklearn"),
    *("setuptools", "pkg_resources", "pytest", "playwright", "openai", "anthropic", "pydantic_ai"),
    *("lm_eval", "datasets", "evaluate", "pyarrow", "nltk", "aiohttp", "matplotlib"),
)
ASKED = "Count from 3 to 9."
HOLES = "the small cat <hole:1> the dog in the garden."


@pytest.fixture(scope="module")
def display():
    """DISPLAY of a screen of its own, or the one there is."""
    server = shutil.which("Xvfb")
    if server is None:
        if sys.platform != "darwin" and not os.environ.get("DISPLAY"):
            pytest.skip("there is no display and no Xvfb to make one: sudo apt-get install xvfb")
        yield os.environ.get("DISPLAY", "")
        return
    reading, writing = os.pipe()
    screen = subprocess.Popen(
        [server, "-displayfd", str(writing), "-screen", "0", "800x600x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as number:
        yield f":{number.readline().strip()}"
    screen.terminate()
    screen.wait()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The program in its bundle, built by the command of the example's page."""
    folder = tmp_path_factory.mktemp("bundle")
    (line,) = re.findall(r"(?m)^pyinstaller (.+)$", (EXAMPLE / "README.md").read_text())
    command = [sys.executable, "-m", "PyInstaller", *shlex.split(line)]
    command += ["--distpath", folder / "dist", "--workpath", folder / "work", "--specpath", folder]
    command += ["--additional-hooks-dir", get_hook_dirs()[0]]
    command += ["--paths", Path(mlx_dgemma.__file__).parents[1]]
    command += ["--runtime-hook", Path(__file__).parent / "frozen_hook.py"]
    command += [part for name in LEFT_OUT for part in ("--exclude-module", name)]
    done = subprocess.run(map(str, command), cwd=EXAMPLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "dist" / "Canvas" / "Canvas"


def started(app, display, folder):
    """(what it printed, what the hook says) of the app in a home of its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "MLX_DGEMMA_KERNELS"},
        "STARTS": str(folder / "starts"),
        "TOLD": str(folder / "told"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HOME": str(folder),
        "DISPLAY": display,
    }
    done = subprocess.run(
        [app, "--close", ASKED, HOLES],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((folder / "starts").read_text().splitlines()) == 1
    return done.stdout.splitlines(), json.loads((folder / "told").read_text())


def check_answers(lines):
    answer, filled = lines
    assert answer == "3 4 5 6 7 8 9"
    before, after = HOLES.split("<hole:1>")
    assert filled.startswith(before)
    assert filled.endswith(after)
    assert len(filled) > len(before + after)


def test_it_answers_and_fills_and_checks_in_itself_started_once(app, display, tmp_path):
    lines, told = started(app, display, tmp_path)
    check_answers(lines)
    assert told["frozen"]
    assert not told["can_start_python"]
    assert str(app.parent) in told["package"]
    # Every check was made, and failed because there is no GPU, under the names that
    # `mlx_dgemma.doctor --check` gives them when it is run beforehand.
    planned = {
        verdicts.verdict_key(one, dispatch.shape_class(shape))
        for one, shape in kernel_shapes(ModelConfig.from_folder(CHECKPOINT))
        if one.supports(shape)
    }
    assert planned <= set(told["verdicts"])
    assert all("No Metal back-end" in reason for reason in told["verdicts"].values())


def test_it_needs_none_of_our_sources(app, display, tmp_path):
    sources = [path for path in app.parent.rglob("*.py") if "mlx_dgemma" in path.parts]
    assert len(sources) > 100
    for path in sources:
        path.unlink()
    lines, told = started(app, display, tmp_path)
    check_answers(lines)
    assert told["verdicts"]
