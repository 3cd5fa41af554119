"""The verbs, the console scripts and the modules behind them are one list."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from mlx_dgemma import __main__ as launcher
from mlx_dgemma.__main__ import main
from mlx_dgemma._version import __version__
from mlx_dgemma.cli.command import command
from mlx_dgemma.cli.verbs import VERBS
from mlx_dgemma.errors import InputError

ROOT = Path(__file__).parents[2]


def test_scripts_verbs_and_modules_agree() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.pop("mlx_dgemma") == "mlx_dgemma.__main__:main"
    assert scripts == {f"mlx_dgemma.{verb}": f"mlx_dgemma.__main__:{verb}" for verb in VERBS}
    for verb in VERBS:
        assert getattr(launcher, verb).args == (verb,)
        assert callable(import_module(f"mlx_dgemma.cli.{verb}").main)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        import_module(f"mlx_dgemma.cli.{verb}").main(["--help"])
    assert left.value.code == 0
    assert f"mlx_dgemma.{verb}" in capsys.readouterr().out


def test_the_dispatcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"  {verb} ") == 2 for verb in VERBS)
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main(["dance"]) == 2
    assert "no verb 'dance'" in capsys.readouterr().err


def test_a_mistake_is_a_sentence_and_a_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def mistaken(argv: object = None) -> int:
        raise InputError("Say what to do.")

    def broken(argv: object = None) -> int:
        raise ZeroDivisionError

    def interrupted(argv: object = None) -> int:
        raise KeyboardInterrupt

    def locked(argv: object = None) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "/their/file")

    assert command(locked)() == 2
    assert capsys.readouterr().err == "error: /their/file: Permission denied.\n"
    assert command(mistaken)() == 2
    assert capsys.readouterr().err == "error: Say what to do.\n"
    assert command(interrupted)() == 130
    with pytest.raises(ZeroDivisionError):
        command(broken)()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "mlx_dgemma", "generate"],
        *(["-m", f"mlx_dgemma.{verb}"] for verb in VERBS),
    ],
)
def test_python_m_works(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mlx_dgemma {__version__}\n"
    assert done.stderr == ""


def test_a_command_imports_nothing_slow_before_it_can_be_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = "import sys, mlx_dgemma.__main__; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert "mlx_dgemma" in done.stdout
    assert not {"'mlx'", "'numpy'", "'rich'", "'transformers'"} & set(
        done.stdout.strip("[]\n").split(", ")
    )

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "import_module", interrupted)
    assert main(["generate"]) == launcher.server([]) == 130


def test_ctrl_c_that_an_import_swallows_ends_it_too() -> None:
    swallowing = """if True:
        import signal
        import mlx_dgemma.__main__ as launcher

        def swallow(name):
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                raise ImportError("as MLX's extension does")

        launcher.import_module = swallow
        launcher.doctor([])
    """
    done = subprocess.run([sys.executable, "-c", swallowing], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["argparse", "rich.console", "numpy", "mlx.core", "mlx_dgemma.model", "tokenizers", "jinja2"],
)
def test_ctrl_c_during_an_import_ends_a_command_without_a_traceback(
    module: str, tmp_path: Path
) -> None:
    """Whatever is imported when: the signal comes as the module is looked for."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""if True:
        import os, signal, sys

        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r} and "mlx_dgemma.__main__" in sys.modules:
                    print("interrupted", flush=True)
                    signal.raise_signal(signal.SIGINT)

        sys.meta_path.insert(0, Interrupting())
    """
    )
    start = "import sys, mlx_dgemma.__main__ as m; sys.exit(m.generate())"
    done = subprocess.run(
        [sys.executable, "-c", start, "-p", "abc", "--max-denoising-steps", "2"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert [line for line in done.stderr.splitlines() if "bundled demo" not in line] == []
    assert done.stdout == "interrupted\n"


def test_errors_are_there_before_anything_is_used() -> None:
    seen = "import mlx_dgemma; print(mlx_dgemma.errors.InputError.__name__)"
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=False)
    assert done.stdout == "InputError\n", done.stderr


def piped(to: str) -> subprocess.CompletedProcess[str]:
    generate = f'"{sys.executable}" -m mlx_dgemma generate --prompt abc --max-denoising-steps 1'
    line = f"{generate} {to}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)


def test_a_closed_pipe_is_no_error() -> None:
    done = piped("| true")
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def closed(verb: str, redirections: str) -> subprocess.CompletedProcess[str]:
    line = f'"{sys.executable}" -m mlx_dgemma {verb} {redirections}'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)


def test_a_closed_standard_input_holds_nothing() -> None:
    quick = "--prompt abc --max-denoising-steps 1 --max-tokens 4"
    assert closed(f"generate {quick}", "<&-").returncode == 0
    done = closed("generate --prompt -", "<&-")
    assert done.returncode == 2
    assert done.stderr == "error: The prompt is empty: write something to answer.\n"
    assert closed("chat", "<&-").returncode == 0


def test_a_closed_standard_output_is_one_sentence() -> None:
    done = closed("doctor", ">&-")
    assert done.returncode == 2
    assert done.stderr == "error: Standard output is closed: send it somewhere.\n"
    assert closed("--help", ">&-").stderr == ""


def test_what_the_terminals_encoding_lacks_is_a_question_mark() -> None:
    asked = "infill --edit 0:1 --strength 0 $'\\xe9 na\\u00efve'"  # a byte that is no UTF-8
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m mlx_dgemma {asked}'],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1:strict"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"? na\xefve\n"), done.stderr


def test_a_closed_standard_error_is_nobody_to_tell() -> None:
    done = closed("generate --prompt ' '", "2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_sentence() -> None:
    done = piped("--json >/dev/full")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "bundled demo" not in line]
    assert errors == ["error: The disk is full: free some space and run this again."]
