"""The wheel in an environment of its own, as `uv tool install`, pipx and `uvx` make it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mlx_dgemma._version import __version__
from mlx_dgemma.cli.verbs import VERBS
from tests.packaging.test_distribution import committed

UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(UV is None, reason="uv is not installed: pip install -e '.[dev]'"),
]
# What uv says where the registry cannot be reached; any other failure is ours.
NO_NETWORK = ("error sending request", "dns error", "Could not connect", "Network connectivity")
QUICK = ("-p", "Reverse: abc", "-m", "4", "--max-denoising-steps", "2", "--json")


def uv(*arguments: object, home: Path) -> str:
    """uv with a home of its own and this machine's cache; what it wrote."""
    kept = ("PATH", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_CACHE_DIR", "HTTPS_PROXY")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    if certificates := os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"):
        environment["SSL_CERT_FILE"] = certificates
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    environment |= {
        "HOME": str(home),
        "UV_CACHE_DIR": str(cache),
        "UV_TOOL_DIR": str(home / "tools"),
        "UV_TOOL_BIN_DIR": str(home / "bin"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(UV), *map(str, arguments)],
        cwd=home, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode and any(words in done.stderr for words in NO_NETWORK):
        pytest.skip(f"the package registry cannot be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    committed(folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(
        [*command, str(folder / "source")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the tool in it, with both extras; bin/ has links to its commands."""
    folder = tmp_path_factory.mktemp("a home")
    wanted = f"mlx-dgemma[server,video] @ {wheel.as_uri()}"
    said = uv("tool", "install", "--python", sys.executable, wanted, home=folder)
    assert f"Installed {len(VERBS) + 1} executables" in said
    return folder


def command(home: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of its commands, where there is nothing else: no PATH, no clone."""
    return subprocess.run(
        [home / "bin" / name, *arguments],
        cwd=home, env={"HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_every_command_is_there(home: Path) -> None:
    names = ["mlx_dgemma", *(f"mlx_dgemma.{verb}" for verb in VERBS)]
    assert sorted(path.name for path in (home / "bin").iterdir()) == sorted(names)
    for name in names:
        done = command(home, name, "--version")
        assert (done.returncode, done.stdout) == (0, f"mlx_dgemma {__version__}\n"), done.stderr


def test_it_answers_without_anything_else(home: Path) -> None:
    done = command(home, "mlx_dgemma.generate", *QUICK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated_tokens"] == 4
    report = home / "doctor.json"
    assert command(home, "mlx_dgemma.doctor", "--report", str(report)).returncode == 0
    assert json.loads(report.read_text())["kind"] == "doctor"
    missing = command(home, "mlx_dgemma.evaluate", "--tasks", "arc_easy")
    assert missing.returncode == 2
    assert "pip install 'mlx-dgemma[evaluate]'" in missing.stderr


def test_the_extras_bring_the_server_and_the_video_reader(home: Path) -> None:
    (python,) = (home / "tools").glob("mlx-dgemma/bin/python")
    program = "import av, mlx_dgemma.prompt.video, mlx_dgemma; print(mlx_dgemma.__file__)"
    done = subprocess.run(
        [python, "-c", program], cwd=home, capture_output=True, text=True, check=True, timeout=120
    )
    assert str(home) in done.stdout
    serving = subprocess.Popen(
        [home / "bin" / "mlx_dgemma.server", "--port", "0"],
        cwd=home, env={"HOME": str(home), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert serving.stderr is not None
        address = next(
            word.rstrip(".,")
            for line in serving.stderr
            for word in line.split()
            if word.startswith("http://127.0.0.1:")
        )
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address.removesuffix('/v1')}/health") as answer:
                    assert json.load(answer)["version"] == __version__
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)
    finally:
        serving.terminate()
        serving.wait(timeout=60)


def test_uvx_runs_it_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    ran = ("tool", "run", "--python", sys.executable, "--from", wheel, "mlx_dgemma.generate")
    assert '"generated_tokens": 4' in uv(*ran, *QUICK, home=tmp_path)
