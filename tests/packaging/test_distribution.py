"""The wheel and the sdist: complete, and working where nothing else of the project is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from mlx_dgemma.cli.verbs import VERBS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def committed(target: Path) -> None:
    """Copies to the new folder `target` what git would commit of this checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout, so there is nothing to say which files belong to it")
    for name in listed.stdout.splitlines():
        if not (ROOT / name).exists():
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to(os.readlink(ROOT / name))
        else:
            shutil.copy(ROOT / name, copy)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of what git would commit, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    committed(source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's bin folder: the wheel, and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    (wheel,) = distributions.glob("*.whl")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-q"),
        *("--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        cwd=folder,
    )
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    # A plain path: an editable install's own .pth file in there is not read.
    borrowed = Path(purelib.strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_the_wheel_holds_the_package_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = [path.relative_to(ROOT) for path in (ROOT / "mlx_dgemma").rglob("*.py")]
    modules += [
        Path("mlx_dgemma") / path.relative_to(ROOT) for path in (ROOT / "convert").glob("*.py")
    ]
    assert {str(path) for path in modules} <= set(names)
    tracked = subprocess.run(
        ["git", "ls-files", "mlx_dgemma"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    data = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    assert "mlx_dgemma/py.typed" in data
    assert "mlx_dgemma/demo/checkpoint/model.safetensors" in data
    assert data <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2, tops
    assert not any("__pycache__" in name for name in names)
    assert wheel.stat().st_size < 40_000_000


def test_the_sdist_can_be_tested_and_read(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "Makefile"} <= names
    assert "convert/__init__.py" in names
    assert "tests/packaging/test_distribution.py" in names
    assert "examples/generate.py" in names


@pytest.mark.parametrize("inside_the_repository", [False, True])
def test_the_commands_work_installed(
    installed: Path, tmp_path: Path, inside_the_repository: bool
) -> None:
    cwd = ROOT if inside_the_repository else tmp_path
    short = ["-p", "Reverse: abc", "-m", "4", "--max-denoising-steps", "2", "--json"]
    assert '"finish_reason"' in run(installed / "mlx_dgemma.generate", *short, cwd=cwd)
    assert '"finish_reason"' in run(
        installed / "python", "-m", "mlx_dgemma.generate", *short, cwd=cwd
    )
    for verb in VERBS:
        assert f"mlx_dgemma.{verb}" in run(installed / f"mlx_dgemma.{verb}", "--help", cwd=cwd)
        assert f"mlx_dgemma.{verb}" in run(installed / "mlx_dgemma", verb, "--help", cwd=cwd)


@pytest.mark.parametrize("inside_the_repository", [False, True])
def test_the_library_imports_installed(
    installed: Path, tmp_path: Path, inside_the_repository: bool
) -> None:
    program = (
        "import mlx_dgemma, mlx_dgemma.convert, mlx_dgemma.checkpoint.hub as hub;"
        "assert (hub.demo_path() / 'config.json').is_file();"
        "print(mlx_dgemma.__file__)"
    )
    where = Path(
        run(
            installed / "python",
            "-c",
            program,
            cwd=ROOT if inside_the_repository else tmp_path,
        ).strip()
    )
    # From the repository's root Python finds the checkout first, as it always does.
    assert where.is_relative_to(ROOT if inside_the_repository else installed.parent)
