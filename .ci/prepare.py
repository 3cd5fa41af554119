"""Installs what `make demo` and `make test` need into this Python's environment, and says what.

    python .ci/prepare.py demo|test

Only the standard library, so that it runs in an environment that is still empty. What the system
lacks is installed with apt-get by root on Linux; elsewhere its tests are skipped, and the command
that installs it is printed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
# PyPI's build for Linux brings gigabytes of CUDA libraries, and the tests need none of them.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    purpose = sys.argv[1]
    say(f"Python {platform.python_version()} in {sys.prefix}")
    if purpose == "demo":
        pip("this package and what it runs on, about 150 MB", "-e", ".[server]")
    else:
        # Of 32,000 modules the tests import few: those are compiled then, not all of them here.
        pip("PyTorch, an oracle of the tests (CPU)", "--no-compile", *torch())
        every = ".[dev,server,video,clients]"
        pip("this package, the other oracles and the tools", "--no-compile", "-e", every)
        compiler()
        system_parts()
        node_clients()
    return 0


def say(text: str) -> None:
    print(f"-- {text}", flush=True)


def pip(what: str, *arguments: str) -> None:
    say(f"installing {what}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*command, *arguments], cwd=ROOT, check=False).returncode:
        raise SystemExit(f"-- pip could not install {' '.join(arguments)}: its message is above")


def torch() -> list[str]:
    """PyTorch's own index where it can be reached; one that pip is set up with is asked anyway,
    and there the CPU build (2.13.0+cpu) is preferred to PyPI's 2.13.0."""
    if sys.platform != "linux":
        return [TORCH]
    try:
        with urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=10):
            return [TORCH, "--extra-index-url", TORCH_CPU_INDEX]
    except (URLError, OSError):
        say(f"{TORCH_CPU_INDEX} cannot be reached; the build of your own index is taken")
        return [TORCH]


def compiler() -> None:
    """The Metal kernels' emulator (x86-64 Linux) compiles them with clang."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return
    if all(shutil.which(name) for name in ("clang++-19", "clang-19")):
        say("the emulator's compiler: clang++-19")
    elif importlib.util.find_spec("ziglang"):
        say("the emulator's compiler: zig c++, from the ziglang wheel")
    else:
        pip("the emulator's compiler: zig c++ (ziglang, 100 MB)", "ziglang>=0.15,<0.18")


def node_clients() -> None:
    """The JavaScript clients that the server's tests drive; without npm those are skipped."""
    if (npm := shutil.which("npm")) is None:
        say("the tests of JavaScript clients will be skipped: they need Node.js with npm")
        return
    say("installing the JavaScript clients of the tests")
    command = [npm, "install", "--silent", "--prefix", "tests/server/node"]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=2000"]  # without a network: seconds
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        say("npm could not: the tests of JavaScript clients will be skipped")


def system_parts() -> None:
    missing = {}
    if not any(map(shutil.which, BROWSERS)):
        missing["chromium"] = "the tests of the server's page"
    if sys.platform == "linux" and importlib.util.find_spec("tkinter"):
        if not (os.environ.get("DISPLAY") or shutil.which("Xvfb")):
            missing["xvfb"] = "the tests of the example window"
    if not missing:
        return
    if sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing {' and '.join(missing)} with apt-get")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        get = ["apt-get", "-qq", "-o", "Acquire::Retries=1"]
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            subprocess.run(
                [*get, *arguments], env=environment, stdout=subprocess.DEVNULL, check=False
            )
        missing = {name: why for name, why in missing.items() if not installed(name)}
    how = "brew install --cask" if sys.platform == "darwin" else "sudo apt-get install"
    for name, why in missing.items():
        say(f"{why} will be skipped; to run them: {how} {name}")


def installed(package: str) -> bool:
    names = BROWSERS if package == "chromium" else ("Xvfb",)
    return any(map(shutil.which, names))


if __name__ == "__main__":
    sys.exit(main())
